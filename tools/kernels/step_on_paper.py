"""A decode step of the hybrid path on paper: its launches counted in the step itself, its time from bytes and stated
inputs. No GPU is needed, and none has confirmed it.

    python -m tools.kernels.step_on_paper                           # Kimi K2.5, TQ1_0 experts, an RTX 4090, 80 GB/s
    python -m tools.kernels.step_on_paper --ram 60 --hits 0.33 --cpu-share 0.98

The step that a CUDA graph would hold (`model.hybrid.decode`) runs over tensors without memory, and every launch and
copy is kept with the bytes of weights that it reads. A layer then takes

    GPU alone     sum of its launches until the choices are posted, and from the answer on: latency + bytes / bandwidth
    both          the longer of: the CPU's experts, bytes / (share * bandwidth); shared expert and hits on the GPU
    hand over     a flag each way through PCIe, the rows that come back, barriers of the team

The latencies are estimates, named in `Inputs` with their source; the bound is bytes alone, both sides at full
bandwidth.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_lite.arch.known import K2_5
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.model.hybrid.decode import DecodeStep, pages_for
from kimi_lite.native.layouts import BY_NAME

_WAIT, _ROUTE, _JOIN, _PRODUCT = "await_answer_kernel", "route_kernel", "join_kernel", "matvec_kernel"
_EXPERTS = ("gate_up_kernel", "down_kernel")  # of slots: at no hits they end at once
_ATTENDS = ("decode_kernel", "merge_kernel")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the times are made of; microseconds and GB/s."""

    vram_gb_s: float = 920.0  # an RTX 4090 delivers of its 1,008
    ram_gb_s: float = 80.0  # dual-channel DDR5 at its best
    pcie_gb_s: float = 23.0  # 4.0 x16, pinned
    cpu_share: float = 0.9  # of the RAM's bandwidth that the experts' kernels reach; all of it on quiet cores (LOG)
    hit_share: float = 0.0  # of choices that have a slot in VRAM
    small_us: float = 3.0  # a dependent kernel or copy in a graph: 2.5 to 4 (review of 26 November)
    product_us: float = 5.0  # a product's launch, ramp and tail: it lost 36 us in 7 of them (the same)
    route_us: float = 10.0  # eight dependent rounds of three reductions
    attend_us: float = 6.0  # each of the two kernels of attention over a short context, some 1,000 positions
    flag_us: float = 1.5  # a flag through PCIe until the other side sees it
    barrier_us: float = 1.0  # 16 threads
    num_barriers: int = 5  # of a turn, once the choices are there: two operations', three inside the experts'
    step_us: float = 750.0  # a token: the sampler 650 (measured by the review), tables and the host's wait


class Node(NamedTuple):
    """A launch or copy of the captured step."""

    name: str
    num_bytes: int  # of weights

    def microseconds(self, inputs: Inputs) -> float:
        if self.name in _EXPERTS:
            return inputs.small_us
        if self.name in _ATTENDS:
            return inputs.attend_us
        if self.name == _ROUTE:
            return inputs.route_us
        if self.name == _PRODUCT:
            return inputs.product_us + self.num_bytes / inputs.vram_gb_s / 1e3
        return inputs.small_us


class Step(NamedTuple):
    """The nodes of a step: what comes once, of a layer without routed experts, of one with them."""

    once: list[Node]
    dense: list[Node]
    routed: list[Node]

    def num_nodes(self) -> int:
        return len(self.once) + len(self.dense) * K2_5.num_dense_layers + len(self.routed) * K2_5.num_moe_layers


class _Copies(TorchDispatchMode):
    """Keeps torch's own launches, and does those that give a tensor its form."""

    def __init__(self, found: list[Node]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        is_view = any(each.alias_info and not each.alias_info.is_write for each in schema.returns)
        if is_view or "empty" in func.__name__:
            return func(*args, **(kwargs or {}))
        self._found.append(Node(func.__name__, 0))
        return args[0] if func.__name__.startswith("copy_") else func(*args, **(kwargs or {}))


@contextmanager
def _keeping(found: list[Node]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def keep(kernel, *args, grid, warmup, **kwargs):
        weights = args[kernel.arg_names.index("data")] if kernel.__name__ == _PRODUCT else None
        found.append(Node(kernel.__name__, 0 if weights is None else weights.nbytes))

    JITFunction.run = keep
    try:
        with _Copies(found):
            yield
    finally:
        JITFunction.run = run


def count_nodes(expert_type: str = "TQ1_0", num_tokens: int = 1) -> Step:
    """Of a step of so many tokens of Kimi K2.5, as `DecodeStep` would give it to the GPU."""
    from kimi_lite.tools.kernels.launches import HybridPath

    path = HybridPath(expert_type)
    dense, routed = path.layers
    streams, steps = GpuStreams("meta"), []
    rows = streams.pinned((num_tokens, path.config.vocab_size), torch.float32)
    for layers in ([dense, routed], [dense, dense, routed], [dense, routed, routed]):
        found: list[Node] = []
        step = DecodeStep(layers, path.head, path, path.config, streams, rows, num_tokens, pages_for(1))
        with _keeping(found):
            step._run()
        steps.append(found)
    base, with_dense, with_routed = steps
    return Step(
        _more(base, [*_more(with_dense, base), *_more(with_routed, base)]),
        _more(with_dense, base),
        _more(with_routed, base),
    )


def _more(nodes: list[Node], others: list[Node]) -> list[Node]:
    """Those of `nodes` that `others` lack, in order."""
    left = list(others)
    return [node for node in nodes if node not in left or left.remove(node)]


class LayerTime(NamedTuple):
    """Microseconds of a layer with routed experts, in the order of time."""

    attention_bytes: float  # of attention and router, at full bandwidth
    attention_launches: float  # what their launches take on top of that
    posted: float  # until the CPU has seen the choices
    cpu: float  # its experts
    gpu: float  # shared expert and hits, which run at the same time
    answered: float  # until the GPU has seen the rows and joined them

    @property
    def total(self) -> float:
        return self.attention_bytes + self.attention_launches + self.posted + max(self.cpu, self.gpu) + self.answered


def layer_time(step: Step, expert_type: str, inputs: Inputs) -> LayerTime:
    """Of one token."""
    names = [node.name for node in step.routed]
    route, wait = names.index(_ROUTE), names.index(_WAIT)
    before, during = step.routed[: route + 1], step.routed[route + 1 : wait]
    num_bytes = sum(node.num_bytes for node in before)
    ideal_us = num_bytes / inputs.vram_gb_s / 1e3
    missed = (1 - inputs.hit_share) * K2_5.num_experts_used
    cpu_us = missed * expert_bytes(expert_type) / (inputs.cpu_share * inputs.ram_gb_s) / 1e3
    hit_us = (K2_5.num_experts_used - missed) * expert_bytes(expert_type) / inputs.vram_gb_s / 1e3
    rows_us = missed * K2_5.hidden_size * 4 / inputs.pcie_gb_s / 1e3
    return LayerTime(
        attention_bytes=ideal_us,
        attention_launches=sum(node.microseconds(inputs) for node in before) - ideal_us,
        posted=inputs.flag_us,
        cpu=cpu_us + inputs.num_barriers * inputs.barrier_us,
        gpu=sum(node.microseconds(inputs) for node in during) + hit_us,
        answered=inputs.flag_us + 2 * inputs.small_us + rows_us,
    )


def expert_bytes(expert_type: str) -> int:
    layout, hidden, width = BY_NAME[expert_type], K2_5.hidden_size, K2_5.expert_feed_forward_size
    return 2 * width * layout.row_bytes(hidden) + hidden * layout.row_bytes(width)


def token_us(step: Step, expert_type: str, inputs: Inputs) -> float:
    """All of a token."""
    others = sum(node.microseconds(inputs) for node in [*step.once, *step.dense * K2_5.num_dense_layers])
    return K2_5.num_moe_layers * layer_time(step, expert_type, inputs).total + others + inputs.step_us


def bound_us(step: Step, expert_type: str, inputs: Inputs) -> float:
    """If bytes were all: the GPU's own, then the longer of the two sides, each at full bandwidth."""
    names = [node.name for node in step.routed]
    place = names.index(_ROUTE)
    missed = (1 - inputs.hit_share) * K2_5.num_experts_used
    cpu = missed * expert_bytes(expert_type) / inputs.ram_gb_s
    hits = (K2_5.num_experts_used - missed) * expert_bytes(expert_type)
    during = (sum(node.num_bytes for node in step.routed[place:]) + hits) / inputs.vram_gb_s
    alone = sum(node.num_bytes for node in step.routed[:place]) / inputs.vram_gb_s
    once = sum(node.num_bytes for node in [*step.once, *step.dense * K2_5.num_dense_layers]) / inputs.vram_gb_s
    return (K2_5.num_moe_layers * (alone + max(cpu, during)) + once) / 1e3


_TYPICAL = Inputs()
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    experts: Annotated[str, typer.Option(help="Type of routed experts.")] = "tq1_0",
    vram: Annotated[float, typer.Option(help="GB/s of VRAM.", min=1)] = _TYPICAL.vram_gb_s,
    ram: Annotated[float, typer.Option(help="GB/s of RAM.", min=1)] = _TYPICAL.ram_gb_s,
    cpu_share: Annotated[
        float, typer.Option(help="Of it, for the CPU's experts.", min=0.1, max=1)
    ] = _TYPICAL.cpu_share,
    hits: Annotated[float, typer.Option(help="Share of choices in VRAM.", min=0, max=1)] = _TYPICAL.hit_share,
) -> None:
    """A decode step on paper: launches, microseconds of a layer, tokens/s and the bound."""
    name = experts.upper()
    if name not in BY_NAME:
        print(f"Error: There is no type {experts!r}.\nChoose from {', '.join(BY_NAME).lower()}.", file=sys.stderr)
        sys.exit(2)
    inputs = Inputs(vram_gb_s=vram, ram_gb_s=ram, cpu_share=cpu_share, hit_share=hits)
    step = count_nodes(name)
    time, token, bound = layer_time(step, name, inputs), token_us(step, name, inputs), bound_us(step, name, inputs)
    console = Console(width=110, highlight=False)
    counted = ", ".join(f"{count} {each}" for each, count in Counter(node.name for node in step.routed).items())
    console.print(
        f"{step.num_nodes():,} nodes in one graph; a layer with routed experts has {len(step.routed)}: {counted}"
    )
    table = Table("a layer", title=f"{name}, estimated: {inputs}", title_justify="left", box=None)
    table.add_column("us", justify="right")
    for field, value in time._asdict().items():
        table.add_row(field.replace("_", " "), f"{value:.0f}")
    table.add_row("total (the longer of cpu and gpu)", f"{time.total:.0f}")
    console.print(table)
    share = bound / token
    console.print(f"{1e6 / token:.1f} tokens/s; bytes alone allow {1e6 / bound:.1f}: {share:.0%}. An estimate, no GPU.")
    result = {
        "tool": "step_on_paper",
        "nodes": step.num_nodes(),
        "layer_nodes": len(step.routed),
        "inputs": asdict(inputs),
    }
    result |= {"layer_us": time._asdict(), "tok_s": 1e6 / token, "bound_tok_s": 1e6 / bound}
    print(json.dumps(result))


if __name__ == "__main__":
    app()
