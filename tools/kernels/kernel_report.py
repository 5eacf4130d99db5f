"""What `tools.kernels` finds, and how it is printed: the machine, a line for each type as it is measured, many
tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

_COLUMNS = (
    ("type", 8), ("bits", 6), ("G w/s", 7), ("GB/s", 6), ("% read", 6), ("ggml", 7), ("ratio (10-90 %)", 18),
    ("core", 6), ("cyc/256", 8), ("ratio", 6), ("dropped", 9),
)  # fmt: skip
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class TypeResult:
    """One line of the table. Rates are medians over the kept rounds; `ratio` is our speed over llama.cpp's."""

    bits_per_weight: float
    gweights_s: float
    gb_s: float
    bandwidth_share: float  # of a plain read of the same bytes in the same round
    ggml_gweights_s: float | None
    ratio: tuple[float, float, float] | None  # median, 10th and 90th percentile of the rounds
    core_gweights_s: float
    cycles_per_weight: float
    core_ratio: float | None
    num_rounds: int  # kept
    num_runs: int  # timed, kept or not
    num_dropped: int
    is_noisy: bool
    stolen_share: float


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """Many tokens: unpacking rows into panels alone, and whole products (unpacking included) by number of tokens."""

    unpack_gweights_s: float
    gmac_s: dict[int, float]
    num_runs: int
    num_dropped: int
    is_noisy: bool


def _console() -> Console:
    return Console(width=_WIDTH, highlight=False, markup=False)


def print_machine(report: Mapping) -> None:
    """CPU, code path, clock and bandwidth: what bounds every line that follows."""
    isa, console = report["isa"], _console()
    console.print(f"CPU        {report['cpu']}, {report['clock_ghz']:.2f} GHz, {report['threads']} threads")
    console.print(f"kernels    {isa['name']} ({isa['instruction']}), compiled for {isa['cpu']}")
    console.print(f"llama.cpp  {report['ggml']}")
    where = f"{report['buffer_bytes'] >> 20} MiB, all threads"
    console.print(f"read       {report['read_gb_s']:.1f} GB/s ({where}){' (noisy)' if report['is_noisy'] else ''}")
    if report["is_lost_time_known"]:
        console.print(f"stolen     {report['stolen_share']:.1%} of CPU time while reading")
    else:
        console.print("stolen     unknown on this system: disturbed runs cannot be told apart, none is dropped")


@contextmanager
def print_types(threads: int) -> Iterator[Callable[[str, TypeResult], None]]:
    """Yields `add_row(name, result)`; a line appears as soon as its type is measured."""
    console = _console()
    console.print(f"\n{'':8}|- {threads} threads, matrix out of cache {'-' * 30}|- one core, in cache -|")
    console.print(_line([name for name, _ in _COLUMNS]))

    def add_row(name: str, r: TypeResult) -> None:
        spread = "{:.2f} ({:.2f}-{:.2f})".format(*r.ratio) if r.ratio else "-"
        cells = [
            *(
                name,
                f"{r.bits_per_weight:.4g}",
                f"{r.gweights_s:.1f}",
                f"{r.gb_s:.1f}",
                f"{100 * r.bandwidth_share:.0f}",
            ),
            *(_number(r.ggml_gweights_s), spread, f"{r.core_gweights_s:.1f}", f"{256 * r.cycles_per_weight:.1f}"),
            *(_number(r.core_ratio, 2), _dropped(r)),
        ]
        console.print(_line(cells))

    yield add_row
    console.print("ggml: llama.cpp's vec_dot, G weights/s; ratio: our speed / llama.cpp's; dropped: disturbed runs")


def _dropped(r: TypeResult | PrefillResult) -> str:
    return f"{r.num_dropped / r.num_runs:.0%}{' noisy' if r.is_noisy else ''}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(cells: list[str]) -> str:
    first, *rest = zip(cells, (width for _, width in _COLUMNS), strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}} " for cell, width in rest).rstrip()


def print_prefill(results: Mapping[str, PrefillResult]) -> None:
    """Products with many tokens: unpacking alone, then whole products."""
    tokens = list(next(iter(results.values())).gmac_s)
    table = Table("type", title="many tokens, all threads", title_justify="left", box=None)
    for column in ("unpack G w/s", *(f"T={count} GMAC/s" for count in tokens), "dropped"):
        table.add_column(column, justify="right")
    for name, r in results.items():
        table.add_row(name, f"{r.unpack_gweights_s:.2f}", *(f"{r.gmac_s[count]:.0f}" for count in tokens), _dropped(r))
    console = _console()
    console.print()
    console.print(table)


@contextmanager
def print_few_tokens(tokens: Sequence[int]) -> Iterator[Callable[[str, Mapping[int, tuple[float, float]]], None]]:
    """Yields `add_row(name, {tokens: (rows / panel, rows / one token's)})`."""
    console = _console()
    console.print("one core: time of rows / time of a panel, and of one token's rows, by tokens")
    console.print(" " * 8 + "".join(f"{count:>12}" for count in tokens), soft_wrap=True)

    def add_row(name: str, found: Mapping[int, tuple[float, float]]) -> None:
        cells = (f"{ratio:.2f} ({times:.1f})" for ratio, times in found.values())
        console.print(f"{name:<8}" + "".join(f"{cell:>12}" for cell in cells), soft_wrap=True)

    yield add_row
