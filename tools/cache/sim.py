"""Which experts would be found in a cache: routing traces through cache policies; and what to do with those that are
not: the CPU, or the bus?

    kimi-lite run -m model.gguf --record-routing trace.npz "A long question"
    python -m tools.cache policies trace.npz --sizes 0.75,1.5,3
    python -m tools.cache shares --machine "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores"
    python -m tools.cache prompts

Without a trace one is made up from published reuse statistics (`tools.cache.routing_synthetic`). Sizes are in units of
T, the experts that one token uses in all layers: 480 for Kimi K2.5, 4.5 GB in TQ1_0. Tokens of a prompt count as single
steps, so a prompt looks worse here than it is.
"""

import json
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
from kimi_lite.tools.cache.machine import Machine
from kimi_lite.tools.cache.policies import BeladyCache, Cache, FavouriteCache, HeatCache, LruCache, Swaps
from kimi_lite.tools.cache.routing_synthetic import make_trace, reuse

_LFU_HALF_LIFE = (256.0,)
_SKIPPED_SHARE = 0.25  # of the tokens: the caches fill
_PRICES = (1.0, 3.0)  # of a copy, in misses: RAM is read once, or read, written and read again


@dataclass(frozen=True, slots=True)
class Outcome:
    """size: in units of T. num_copies: a token, in units of T too. found: share of all choices. net: misses a token
    plus the copies at each of the prices, in units of T; without a cache it is 1."""

    way: str
    policy: str
    size: float
    found: float
    num_copies: float
    net: tuple[float, ...]


def simulate(cache: Cache, trace: RoutingTrace, layers: Sequence[int]) -> tuple[float, float]:
    """Share of the experts that were there, and copies per choice, after the first quarter of the tokens."""
    hits = asked = copies = 0
    skipped = int(len(trace.ids) * _SKIPPED_SHARE)
    for token, chosen in enumerate(trace.ids.astype(np.int64)):
        if token == skipped:
            copies = cache.num_copies
        for layer in layers:
            found = cache.look_up(token, layer, chosen[layer])
            if token >= skipped:
                hits, asked = hits + int(found.sum()), asked + len(found)
    return hits / asked, (cache.num_copies - copies) / asked


def at_once(trace: RoutingTrace, layers: Sequence[int], num_slots: int) -> dict[str, Callable[[], Cache]]:
    """By name, made when their turn comes: what is missed comes in at once, as into RAM from the disk."""
    ids, num_experts = trace.ids.astype(np.int64), trace.num_experts
    shape, num_layers = (trace.num_layers, num_experts, num_slots, None), len(layers)
    return {
        "LRU": lambda: LruCache(num_experts, num_slots),
        "LRU, shares": lambda: LruCache(num_experts, num_slots, num_layers),
        "LFU, decay": lambda: HeatCache(*shape, half_lives=_LFU_HALF_LIFE),
        "heat": lambda: HeatCache(*shape),
        "heat, shares (runtime)": lambda: HeatCache(*shape, num_sharing=num_layers),
        "optimum": lambda: BeladyCache(ids, layers, num_experts, num_slots),
    }


def by_swaps(trace: RoutingTrace, layers: Sequence[int], num_slots: int) -> dict[str, Callable[[], Cache]]:
    """The same where misses are computed elsewhere and swaps have a price, as in VRAM."""
    ids, shape = trace.ids.astype(np.int64), (trace.num_layers, trace.num_experts, num_slots)
    scale = len(layers) / K2_5.num_moe_layers
    named = {f"gain {gain:g} (runtime)": Swaps(32 * scale, gain) for gain in (0.5, 1.0, 2.0, 4.0)}
    caches = {name: lambda swaps=swaps: HeatCache(*shape, swaps) for name, swaps in named.items()}
    unlimited = {"every gain": lambda: HeatCache(*shape, Swaps(trace.num_experts, 0.0))}
    lfu = {"LFU, gain 1": lambda: HeatCache(*shape, Swaps(32 * scale, 1.0), half_lives=_LFU_HALF_LIFE)}
    favourites = {"whole trace's favourites": lambda: FavouriteCache(ids, layers, trace.num_experts, num_slots)}
    return caches | unlimited | lfu | favourites


def run(trace: RoutingTrace, sizes: Sequence[float]) -> list[Outcome]:
    """sizes: in units of T."""
    layers = trace.moe_layers.tolist()
    outcomes = []
    for way, caches in (("at once", at_once), ("swaps", by_swaps)):
        for size in sizes:
            num_slots = round(size * len(layers) * trace.ids.shape[2])
            for name, make in caches(trace, layers, num_slots).items():
                found, copies = simulate(make(), trace, layers)
                net = tuple(1 - found + price * copies for price in _PRICES)
                outcomes.append(Outcome(way, name, size, found, copies, net))
    return outcomes


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)


@app.command("policies")
def policies_command(
    trace: Annotated[
        Path | None, typer.Argument(help="What --record-routing wrote. Default: synthetic.", dir_okay=False)
    ] = None,
    sizes: Annotated[str, typer.Option(help="Slots, in units of what a token uses.")] = "0.75,1,1.9,3,5",
    layers: Annotated[
        int, typer.Option(help="Of a long trace, that are simulated; the others are like them.", min=1)
    ] = 6,
    tokens: Annotated[
        int, typer.Option(help="Of a synthetic trace; and at most so many of a recorded one.", min=8)
    ] = 1000,
    experts: Annotated[int, typer.Option(help="A layer of a synthetic trace; 8 are chosen.", min=16)] = 384,
) -> None:
    """Compare caches of experts by what they find and what they copy."""
    try:
        wanted = [_parse_size(part) for part in sizes.split(",")]
        found = _shorten(read_trace(trace), layers, tokens) if trace else make_trace(tokens, layers, experts, 8)
    except KimiLiteError as error:
        _give_up(error)
    used = reuse(found)
    print(
        f"{found.name}: {len(found.ids)} tokens, {len(found.moe_layers)} layers of {found.num_experts} experts, of "
        f"which a token uses {found.ids.shape[2]}; {used.next_token:.0%} of them again with the next token, "
        f"{used.within_8:.0%} within 8\n"
    )
    outcomes = run(found, wanted)
    print("| slots / T | way | policy | found | copies / T | net, copy = 1 miss | net, copy = 3 |")
    print("|--:|---|---|--:|--:|--:|--:|")
    for o in outcomes:
        cells = (f"{o.size:g}", o.way, o.policy, f"{o.found:.1%}", f"{o.num_copies:.3f}", *(f"{n:.3f}" for n in o.net))
        print(f"| {' | '.join(cells)} |")
    document = {"tool": "cache_policies", "schema": 2, "trace": found.name, "outcomes": [asdict(o) for o in outcomes]}
    print(json.dumps(document))


@app.command("shares")
def shares_command(
    machine: Annotated[
        list[str] | None,
        typer.Option(help='Such as "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores". Default: seven of them.'),
    ] = None,
    bits: Annotated[float, typer.Option(help="A routed weight.", min=1, max=16)] = 1.6875,
    layers: Annotated[int, typer.Option(help="That are simulated; the others are like them.", min=1)] = 12,
    tokens: Annotated[int, typer.Option(help="Of the synthetic trace.", min=64)] = 800,
) -> None:
    """Decoding with a constant share of the misses on the CPU, and where the program decides."""
    from kimi_lite.tools.cache.shares import MACHINES, compare  # the runtime's own classes, and torch with them

    try:
        described = {text: Machine.parse(text) for text in machine or MACHINES}
    except KimiLiteError as error:
        _give_up(error)
    trace = make_trace(tokens, layers, K2_5.num_experts, K2_5.num_experts_used)
    rows = [compare(text, each, trace, bits) for text, each in described.items()]
    constants = list(rows[0].constant_tok_s)
    print("tokens/s of Kimi K2.5, computed; constant share of the misses on the CPU, the others uploaded in time\n")
    print(f"| machine | no cache | {' | '.join(f'{share:.0%}' for share in constants)} | kimi-lite | copies / token |")
    print("|---|" + "--:|" * (len(constants) + 3))
    for row in rows:
        cells = [f"{row.uncached_tok_s:.1f}", *(f"{rate:.1f}" for rate in row.constant_tok_s.values())]
        print(f"| {row.machine} | {' | '.join(cells)} | **{row.own_tok_s:.1f}** | {row.own_copies:.1f} |")
    print(json.dumps({"tool": "cache_shares", "schema": 1, "bits": bits, "rows": [asdict(row) for row in rows]}))


@app.command("prompts")
def prompts_command(
    machine: Annotated[
        list[str] | None,
        typer.Option(help='Such as "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores". Default: seven of them.'),
    ] = None,
    bits: Annotated[float, typer.Option(help="A routed weight.", min=1, max=16)] = 1.6875,
    layers: Annotated[int, typer.Option(help="That are counted, behind 60 in which costs are learned.", min=1)] = 240,
) -> None:
    """Prompts with a constant share of a layer's experts on the CPU, and where the program decides."""
    from kimi_lite.tools.cache.prompts import PROMPT_TOKENS, compare_prompts
    from kimi_lite.tools.cache.shares import MACHINES

    try:
        described = {text: Machine.parse(text) for text in machine or MACHINES}
    except KimiLiteError as error:
        _give_up(error)
    rows = [compare_prompts(text, each, n, bits, layers) for text, each in described.items() for n in PROMPT_TOKENS]
    print("ms of a layer's experts of Kimi K2.5, computed; constant share of them on the CPU, the others streamed\n")
    print(f"| machine | tokens | {' | '.join(f'{s:.0%}' for s in rows[0].constant_s)} | kimi-lite | its share |")
    print("|---|" + "--:|" * (len(rows[0].constant_s) + 3))
    for row in rows:
        cells = " | ".join(f"{1e3 * each_s:.1f}" for each_s in row.constant_s.values())
        own = f"**{1e3 * row.own_s:.1f}** | {row.own_share:.0%}"
        print(f"| {row.machine} | {row.num_tokens:,} | {cells} | {own} |")
    print(json.dumps({"tool": "cache_prompts", "schema": 1, "bits": bits, "rows": [asdict(row) for row in rows]}))


def _give_up(error: KimiLiteError) -> None:
    print(f"tools.cache: {error}", file=sys.stderr)
    sys.exit(2)


def _shorten(trace: RoutingTrace, num_layers: int, num_tokens: int) -> RoutingTrace:
    """Evenly spaced layers and the first tokens: simulation is Python."""
    if not len(trace.ids) or not len(trace.moe_layers):
        raise KimiLiteError(f"{trace.name}: the record is empty.", "Record some tokens.")
    chosen = trace.moe_layers[
        np.linspace(0, len(trace.moe_layers) - 1, min(num_layers, len(trace.moe_layers))).astype(int)
    ]
    return RoutingTrace(trace.name, trace.num_experts, trace.ids[:num_tokens, chosen], trace.starts)


def _parse_size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1000:
        raise KimiLiteError(f"--sizes has {text!r}.", "Give slots in units of a token's experts, such as 0.75,1.5,3.")
    return value
