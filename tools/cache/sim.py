"""Which experts would be found in a cache: routing traces through cache policies, and the tokens/s that follow for a
machine.

    kimi-lite run -m model.gguf --record-routing trace.npz "A long question"
    python -m tools.cache trace.npz --sizes 5,12.5,25
    python -m tools.cache --machine "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores" --budget 120

Without a trace one is made up from published reuse statistics (`tools.cache.routing_synthetic`). Sizes are percent of
all routed experts. LRU, LFU with decay, the runtime's policy (`experts.policy.HeatPolicy`, the class itself) and
Belady's optimum. By default what is missed comes in at once, as in the RAM tier; `--budget N` promotes up to N experts
a token instead, as into VRAM. Tokens of a prompt count as single steps, so a prompt looks worse here than it is. With
`--machine` the size is the one that its VRAM leaves, and K2.5's bytes at `--bits` a weight turn hits into tokens/s: the
GPU's part, then the CPU's, one after the other.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kimi_lite.arch.known import K2_5
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.recorder import RoutingTrace, read_trace
from kimi_lite.tools.cache.policies import BeladyCache, Cache, HeatCache, LruCache
from kimi_lite.tools.cache.routing_synthetic import make_trace

_LFU_HALF_LIFE = (256.0,)
_SKIPPED_SHARE = 0.25  # of the tokens: the caches fill
_PCIE_GB_S = {3: 11.8, 4: 23.5, 5: 47.0}  # of 16 lanes, pinned memory, measured by others
_DENSE_BITS, _WORK_GB, _CACHE_GB = (
    8.5,
    2.0,
    2.2,
)  # on the GPU: everything but routed experts, activations, 32K of context
_VRAM_GB_S, _OVERHEAD_S = 920.0, 0.001
_WEIGHTS_PER_CORE = 47e9  # a second, TQ1_0 on AVX-512 at 2.6 GHz (tools.kernels)


@dataclass(frozen=True, slots=True)
class Machine:
    """Bandwidths are what is really delivered, 10^9 bytes/s."""

    vram_gb: float
    ram_gb_s: float
    num_cores: int
    pcie_gb_s: float = _PCIE_GB_S[4]
    vram_gb_s: float = _VRAM_GB_S

    @classmethod
    def parse(cls, text: str) -> "Machine":
        """`24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores`; `1000 GB/s VRAM` may be added. Raises KimiLiteError."""
        patterns = {
            "vram_gb": r"(\d+(?:\.\d+)?) ?GB(?: VRAM)?",
            "ram_gb_s": r"(\d+(?:\.\d+)?) ?GB/s(?: RAM)?",
            "vram_gb_s": r"(\d+(?:\.\d+)?) ?GB/s VRAM",
            "num_cores": r"(\d+) ?cores",
        }
        found: dict[str, float] = {}
        for part in map(str.strip, text.split(",")):
            pcie = re.fullmatch(r"PCIe ?([345])(?:\.0)?(?: x(\d+))?", part, re.IGNORECASE)
            names = [name for name, pattern in patterns.items() if re.fullmatch(pattern, part, re.IGNORECASE)]
            if pcie:
                found["pcie_gb_s"] = _PCIE_GB_S[int(pcie[1])] * int(pcie[2] or 16) / 16
            elif names:
                found[names[0]] = float(re.match(r"[\d.]+", part)[0])
            else:
                raise KimiLiteError(
                    f"--machine has {part!r}.", 'Write it like "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores".'
                )
        if missing := {"vram_gb", "ram_gb_s", "num_cores"} - found.keys():
            raise KimiLiteError(
                f"--machine lacks {', '.join(sorted(missing))}.", "Name VRAM in GB, RAM in GB/s, and cores."
            )
        return cls(**{**found, "num_cores": int(found["num_cores"])})

    def slot_share(self, bits: float) -> float:
        """Of all routed experts that fit on the GPU."""
        dense_gb = K2_5.other_parameters * _DENSE_BITS / 8e9
        routed_gb = K2_5.routed_parameters * bits / 8e9
        return min(1.0, max(0.0, self.vram_gb - dense_gb - _WORK_GB - _CACHE_GB) / routed_gb)

    def tok_s(self, hit_share: float, bits: float, num_copies: float) -> float:
        """Decoding: dense weights and hits on the GPU, then misses on the CPU; copies take bandwidth from its
        reads."""
        c = K2_5
        expert_gb = c.expert_parameters * bits / 8e9
        used_gb = c.num_moe_layers * c.num_experts_used * expert_gb
        dense_gb = (
            (c.active_parameters - c.num_moe_layers * c.num_experts_used * c.expert_parameters) * _DENSE_BITS / 8e9
        )
        gpu_s = (dense_gb + hit_share * used_gb) / self.vram_gb_s
        core_gb_s = min(self.ram_gb_s, self.num_cores * _WEIGHTS_PER_CORE * bits / 8e9)
        copied_gb = num_copies * expert_gb
        cpu_s = max((1 - hit_share) * used_gb / core_gb_s, ((1 - hit_share) * used_gb + copied_gb) / self.ram_gb_s)
        return 1 / (_OVERHEAD_S + gpu_s + max(cpu_s, copied_gb / self.pcie_gb_s))


@dataclass(frozen=True, slots=True)
class Outcome:
    policy: str
    size_share: float
    num_slots: int
    hit_share: float
    tok_s: float | None


def simulate(cache: Cache, trace: RoutingTrace, layers: Sequence[int]) -> float:
    """Share of the experts that were there, after the first quarter of the tokens."""
    hits = asked = 0
    skipped = int(len(trace.ids) * _SKIPPED_SHARE)
    for token, chosen in enumerate(trace.ids.astype(np.int64)):
        for layer in layers:
            found = cache.look_up(token, layer, chosen[layer])
            if token >= skipped:
                hits, asked = hits + int(found.sum()), asked + len(found)
    return hits / asked


def policies(
    trace: RoutingTrace, layers: Sequence[int], num_slots: int, budget: int | None
) -> dict[str, Callable[[], Cache]]:
    """By name; made when their turn comes."""
    shape = (trace.num_layers, trace.num_experts, num_slots, budget)
    return {
        "LRU": lambda: LruCache(trace.num_experts, num_slots, budget),
        "LFU, decay": lambda: HeatCache(*shape, half_lives=_LFU_HALF_LIFE),
        "runtime": lambda: HeatCache(*shape),
        "optimum": lambda: BeladyCache(trace.ids.astype(np.int64), layers, trace.num_experts, num_slots),
    }


def run(
    trace: RoutingTrace, shares: Sequence[float], budget: int | None, machine: Machine | None, bits: float
) -> list[Outcome]:
    layers = trace.moe_layers.tolist()
    num_experts = len(layers) * trace.num_experts
    scale = K2_5.num_moe_layers / len(layers)  # a budget is for all of K2.5's layers
    outcomes = []
    for share in shares:
        num_slots = round(share * num_experts)
        own_budget = None if budget is None else max(1, round(budget / scale))
        for name, make in policies(trace, layers, num_slots, own_budget).items():
            hit_share = simulate(make(), trace, layers) if num_slots else 0.0
            tok_s = machine.tok_s(hit_share, bits, budget or 0) if machine else None
            outcomes.append(Outcome(name, share, num_slots, hit_share, tok_s))
    return outcomes


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    trace: Annotated[
        Path | None, typer.Argument(help="What --record-routing wrote. Default: synthetic.", dir_okay=False)
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="Slots, percent of all routed experts, comma-separated.")
    ] = "2,4.6,12.5,25",
    budget: Annotated[int | None, typer.Option(help="Promotions a token, in all layers together.", min=1)] = None,
    machine: Annotated[str | None, typer.Option(help='Such as "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores".')] = None,
    bits: Annotated[float, typer.Option(help="A routed weight, for --machine.", min=1, max=16)] = 1.6875,
    layers: Annotated[
        int, typer.Option(help="Of a long trace, that are simulated; the others are like them.", min=1)
    ] = 6,
    tokens: Annotated[
        int, typer.Option(help="Of a synthetic trace; and at most so many of a recorded one.", min=8)
    ] = 600,
) -> None:
    """Simulate caches of experts."""
    try:
        described = Machine.parse(machine) if machine else None
        shares = [described.slot_share(bits)] if described else [_parse_percent(part) for part in sizes.split(",")]
        found = _shorten(read_trace(trace), layers, tokens) if trace else make_trace(tokens, layers, 384, 8)
    except KimiLiteError as error:
        print(f"cache_sim: {error}", file=sys.stderr)
        sys.exit(2)
    outcomes = run(found, shares, budget, described, bits)
    way = f"up to {budget} promotions a token" if budget else "what is missed comes in at once"
    print(
        f"{found.name}: {len(found.ids)} tokens, {len(found.moe_layers)} layers of {found.num_experts} experts; {way}\n"
    )
    print(f"| {'slots':>7} | {'a layer':>7} | {'policy':<10} | {'found':>6} | {'tok/s':>6} |")
    print(f"|{'-' * 8}:|{'-' * 8}:|{'-' * 12}|{'-' * 7}:|{'-' * 7}:|")
    for o in outcomes:
        a_layer, rate = o.num_slots / len(found.moe_layers), "-" if o.tok_s is None else f"{o.tok_s:.1f}"
        print(f"| {o.size_share:>7.1%} | {a_layer:>7.1f} | {o.policy:<10} | {o.hit_share:>6.1%} | {rate:>6} |")
    print(
        json.dumps({"tool": "cache_sim", "schema": 1, "trace": found.name, "outcomes": [asdict(o) for o in outcomes]})
    )


def _shorten(trace: RoutingTrace, num_layers: int, num_tokens: int) -> RoutingTrace:
    """Evenly spaced layers and the first tokens: simulation is Python."""
    if not len(trace.ids) or not len(trace.moe_layers):
        raise KimiLiteError(f"{trace.name}: the record is empty.", "Record some tokens.")
    chosen = trace.moe_layers[
        np.linspace(0, len(trace.moe_layers) - 1, min(num_layers, len(trace.moe_layers))).astype(int)
    ]
    return RoutingTrace(trace.name, trace.num_experts, trace.ids[:num_tokens, chosen], trace.starts)


def _parse_percent(text: str) -> float:
    try:
        value = float(text) / 100
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise KimiLiteError(f"--sizes has {text!r}.", "Give percent of all routed experts, such as 5,12.5,25.")
    return value
