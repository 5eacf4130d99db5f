"""From measured kernels to tokens/s on another machine: a model of decode in one multiplication and one maximum.

    python -m tools.kernels | tee /tmp/bench.txt; python -m tools.bench.predict /tmp/bench.txt --cores 16 --bandwidth
    60,80

A weight costs `cycles` on a core (from `kernel_bench`, in cache) and `bytes` from memory (its type), and the two
overlap:

    seconds = weights * max(cycles / (cores * clock), bytes / bandwidth)

So a type is memory-bound from `cores = bandwidth * cycles / (bytes * clock)` on, and compute-bound below. K2.5
multiplies each token with 21.14 G weights of routed experts and 10.5 G others; those are either on a GPU, in series
(`--gpu-ms`), or on the CPU as Q8_0. What the model leaves out: attention over the context, barriers, the router,
experts already on the GPU, and what keeps a kernel from both limits at once (`kernel_bench` shows it: its out-of-cache
columns).

`--sockets 2` simulates a token thread by thread (`token_on_paper`), with what more it assumes; so does `--sockets 1`:

    python -m tools.bench.predict /tmp/bench.txt --cores 64 --sockets 2 --bandwidth 400 --clock-ghz 2.8
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kimi_lite.arch.known import K2_5
from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench.token_on_paper import USES, Server, Weights, busier, simulate_token

_REST_TYPE = "Q8_0"  # of everything but routed experts


@dataclass(frozen=True, slots=True)
class Machine:
    cores: int
    clock_ghz: float
    bandwidth_gb_s: float  # really delivered, all cores reading


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a weight of one type costs."""

    bytes_per_weight: float
    cycles_per_weight: float

    def compute_s(self, machine: Machine) -> float:
        """Seconds a weight, if memory were infinitely fast."""
        return self.cycles_per_weight / (machine.cores * machine.clock_ghz * 1e9)

    def memory_s(self, machine: Machine) -> float:
        """Seconds a weight, if cores were infinitely fast."""
        return self.bytes_per_weight / (machine.bandwidth_gb_s * 1e9)

    def seconds(self, machine: Machine) -> float:
        return max(self.compute_s(machine), self.memory_s(machine))

    def is_memory_bound(self, machine: Machine) -> bool:
        return self.memory_s(machine) >= self.compute_s(machine)

    def core_gb_s(self, clock_ghz: float) -> float:
        """Bandwidth that one core can eat."""
        return self.bytes_per_weight / self.cycles_per_weight * clock_ghz

    def turning_cores(self, machine: Machine) -> float:
        """Cores from which on memory is the bound."""
        return machine.bandwidth_gb_s / self.core_gb_s(machine.clock_ghz)


def experts_s(kernel: Kernel, machine: Machine) -> float:
    """Seconds a token for K2.5's routed experts."""
    config = K2_5
    return config.num_moe_layers * config.num_experts_used * config.expert_parameters * kernel.seconds(machine)


def rest_s(kernel: Kernel, machine: Machine) -> float:
    """Seconds a token for every other matrix, on the CPU."""
    config = K2_5
    routed = config.num_moe_layers * config.num_experts_used * config.expert_parameters
    return (config.active_parameters - routed) * kernel.seconds(machine)


def read_report(path: Path) -> dict:
    """The JSON that `kernel_bench` prints as its last line. Raises KimiLiteError."""
    try:
        report = json.loads(path.read_text(encoding="utf-8").strip().rpartition("\n")[2])
    except (OSError, ValueError) as error:
        raise KimiLiteError(f"{path}: {error}.", "Give a file with what `python -m tools.kernels` printed.") from error
    if not isinstance(report, dict) or report.get("tool") != "kernel_bench":
        raise KimiLiteError(f"{path} does not end in kernel_bench's JSON.", "Give a file with what it printed.")
    return report


def kernels_of(report: Mapping) -> dict[str, Kernel]:
    """Each measured type's costs."""
    return {name: Kernel(r["bits_per_weight"] / 8, r["cycles_per_weight"]) for name, r in report["types"].items()}


def _table(kernels: Mapping[str, Kernel], machine: Machine, gpu_s: float) -> Table:
    title = f"{machine.cores} cores at {machine.clock_ghz:.2f} GHz, {machine.bandwidth_gb_s:g} GB/s"
    table = Table("type", title=title, title_justify="left", title_style="bold", box=None)
    columns = ("bits", "cyc/256", "a core eats", "memory-bound from", "so here it is", "with GPU", "CPU alone")
    for column in columns:
        table.add_column(column, justify="right")
    rest = kernels.get(_REST_TYPE)
    for name, kernel in kernels.items():
        expert_time = experts_s(kernel, machine)
        table.add_row(
            name,
            f"{8 * kernel.bytes_per_weight:.4g}",
            f"{256 * kernel.cycles_per_weight:.1f}",
            f"{kernel.core_gb_s(machine.clock_ghz):.1f} GB/s",
            f"{kernel.turning_cores(machine):.1f} cores",
            "memory-bound" if kernel.is_memory_bound(machine) else "compute-bound",
            f"{1 / (expert_time + gpu_s):.1f} tok/s",
            f"{1 / (expert_time + rest_s(rest, machine)):.1f} tok/s" if rest else "-",
        )
    return table


def _paper_table(kernels: Mapping[str, Kernel], server: Server) -> Table:
    """A type's routed experts in a row for each way in which memory may be used, the rest in `_REST_TYPE`."""
    table = Table("type", box=None)
    for column in ("memory", "tokens/s", "of what bytes allow", "in barriers", "one core at half speed"):
        table.add_column(column, justify="right")
    rest = _weights(kernels[_REST_TYPE])
    for name, kernel in kernels.items():
        for use in USES if server.sockets > 1 else USES[:1]:
            token, busy = (simulate_token(each, use, _weights(kernel), rest) for each in (server, busier(server)))
            table.add_row(
                name,
                use if server.sockets > 1 else "",
                f"{token.tok_s:.1f}",
                f"{token.share_of(server.bandwidth_gb_s):.0%}",
                f"{token.barriers_s * token.tok_s:.0%}",
                f"{busy.tok_s:.1f}",
            )
    return table


def _weights(kernel: Kernel) -> Weights:
    return Weights(kernel.bytes_per_weight, kernel.cycles_per_weight)


def _assumptions(server: Server) -> str:
    counter = f"arriving at a barrier's counter takes {server.arrival_ns:g} ns"
    far = (
        f", {server.far_share:.0%} of that from another socket's, whose link brings {server.link_share:.0%} of a "
        f"socket's bandwidth; {counter}, {server.far_arrival_ns:g} after a thread of another socket"
    )
    near = f"; {counter}"
    return (
        f"on paper, the whole model on the CPU: a core reads {server.core_gb_s:g} GB/s of its own socket's RAM at most"
        f"{far if server.sockets > 1 else near}; no attention over the context. Nothing of it was measured"
    )


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    report: Annotated[Path, typer.Argument(help="What kernel_bench printed.")],
    cores: Annotated[int, typer.Option(min=1)] = 16,
    bandwidth: Annotated[str, typer.Option(help="GB/s that memory really delivers, comma-separated.")] = "60,80",
    sockets: Annotated[
        int | None, typer.Option(help="Simulate a token, cores and memory spread over so many.", min=1, max=16)
    ] = None,
    clock_ghz: Annotated[float, typer.Option(help="Of all cores at work. 0: as measured.", min=0)] = 0,
    gpu_ms: Annotated[
        float, typer.Option(help="Everything but routed experts, on a GPU: 11.2 GB at 0.92 TB/s.", min=0)
    ] = 12.0,
) -> None:
    """Predict K2.5's tokens/s for each type of routed experts, and whether memory or cores set it."""
    try:
        measured = read_report(report)
        clock = clock_ghz or measured["clock_ghz"]
        machines = [Machine(cores, clock, _parse_bandwidth(part)) for part in bandwidth.split(",")]
        _check_sockets(sockets, cores, measured)
    except KimiLiteError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    kernels = kernels_of(measured)
    console = Console(width=100, highlight=False)
    console.print(f"measured on {measured['cpu']}, {measured['isa']['name']}, {measured['clock_ghz']:.2f} GHz")
    for machine in machines:
        console.print()
        console.print(_table(kernels, machine, gpu_ms / 1000))
        if sockets:
            server = Server(cores, sockets, machine.clock_ghz, machine.bandwidth_gb_s)
            console.print(f"\n{_assumptions(server)}")
            console.print(_paper_table(kernels, server))
    console.print(f"\nwith GPU: the experts on the CPU in this type, then the rest on a GPU in {gpu_ms:g} ms")
    console.print(f"CPU alone: the rest on the CPU too, as {_REST_TYPE}")


def _check_sockets(sockets: int | None, cores: int, report: Mapping) -> None:
    if sockets and sockets > cores:
        raise KimiLiteError(f"--sockets {sockets} with --cores {cores}.", "Give each socket a core at least.")
    if sockets and _REST_TYPE not in report["types"]:
        raise KimiLiteError(
            f"The report has no {_REST_TYPE}, the type of everything but routed experts.",
            f"python -m tools.kernels --types tq1_0,{_REST_TYPE.lower()} measures it.",
        )


def _parse_bandwidth(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise KimiLiteError(f"--bandwidth has {text!r}.", "Give GB/s, such as 60,80.")
    return value


if __name__ == "__main__":
    app()
