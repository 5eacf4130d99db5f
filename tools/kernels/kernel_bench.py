"""How fast the decode kernels are, against memory, llama.cpp and data in cache. Tables, then JSON as the last line.

    python -m tools.kernels --types tq1_0,q4_k --threads 2
    python -m tools.kernels --target avx2 --prefill
    python -m tools.kernels --types tq1_0,q2_k --few-tokens

The read bandwidth comes first: it bounds everything else. Then each type multiplies a matrix larger than the caches
with one vector, as the runtime does, in turns with a plain read of the same bytes and with llama.cpp's `vec_dot` over
them (same threads, same bytes). The last columns come from one core and a matrix in its cache: what the kernel could do
if memory were infinitely fast. `tools.bench.predict` reads the JSON.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.isa import isa
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.native.types.random_blocks import random_rows
from kimi_lite.tools.bench.measure import is_lost_time_known, measure, read_stolen_s
from kimi_lite.tools.bench.workloads import CLOCK_CYCLES, Bench, clock_program
from kimi_lite.tools.kernels.ggml_cpu import describe_ggml, find_vec_dot
from kimi_lite.tools.kernels.kernel_report import (
    PrefillResult,
    TypeResult,
    print_few_tokens,
    print_machine,
    print_prefill,
    print_types,
)

ROW_WEIGHTS = 7168  # Kimi K2.5's hidden size
_PART_BYTES = 4 << 20  # for each thread: what a timed run reads, in about a millisecond
_MIN_BYTES = 256 << 20
_CACHED_BYTES, _CACHED_RUNS = 192 << 10, 64
_PREFILL_ROWS, _PREFILL_TOKENS = 64, (128, 512)  # rows for each thread
_FEW_ROWS = 512  # of an expert, a part that a core's cache holds
_FEW_TOKENS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.1,+sse4.2,+ssse3,+popcnt,+lzcnt",
}


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    types: Annotated[str, typer.Option(help="Comma-separated, e.g. tq1_0,q4_k. Default: all that have kernels.")] = "",
    threads: Annotated[int, typer.Option(help="Default: all cores.", min=1)] = os.cpu_count() or 1,
    repeats: Annotated[int, typer.Option(help="Undisturbed rounds for each type.", min=1)] = 30,
    target: Annotated[
        str, typer.Option(help="native, or avx2: our kernels as an older CPU would run them.")
    ] = "native",
    prefill: Annotated[bool, typer.Option("--prefill", help="Many tokens at a time as well.")] = False,
    few_tokens: Annotated[
        bool, typer.Option("--few-tokens", help="Only this: from how many tokens on unpacking pays.")
    ] = False,
) -> None:
    """Time the kernels: read bandwidth, then each type and llama.cpp's, and in cache."""
    if target == "avx2":  # Numba reads its target once, at import
        rest = ["--types", types, "--threads", str(threads), "--repeats", str(repeats), *["--prefill"] * prefill]
        rest += ["--few-tokens"] * few_tokens
        sys.exit(subprocess.call([sys.executable, "-m", "tools.kernels", *rest], env=os.environ | _AVX2))
    if target != "native":
        raise typer.BadParameter(f"{target!r} is neither native nor avx2", param_hint="--target")
    try:
        if few_tokens:
            _bench_few_tokens(_known_types(types), repeats)
        else:
            _bench(_known_types(types), threads, repeats, prefill)
    except KimiLiteError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _known_types(types: str) -> list[str]:
    names = [name.strip().upper() for name in types.split(",") if name.strip()] or list(BY_NAME)
    for name in names:
        if name not in BY_NAME:
            raise KimiLiteError(f"There is no CPU kernel for {name!r}.", f"Choose from {', '.join(BY_NAME).lower()}.")
    return names


def _bench(names: list[str], threads: int, repeats: int, has_prefill: bool) -> None:
    team, core = Team(threads), Team(1)
    stolen_s = read_stolen_s()
    report = _measure_machine(team, core, repeats)
    print_machine(report)
    results = {}
    with print_types(threads) as add_row:
        for name in names:
            results[name] = _measure_type(team, core, name, repeats)
            add_row(name, results[name])
    report["types"] = {name: asdict(result) for name, result in results.items()}
    if has_prefill:
        prefill = {name: _measure_prefill(team, name, repeats) for name in names}
        print_prefill(prefill)
        report["prefill"] = {name: asdict(result) for name, result in prefill.items()}
    report["stolen_s"] = round(read_stolen_s() - stolen_s, 2)
    team.close()
    print(json.dumps(report))


def _bench_few_tokens(names: list[str], repeats: int) -> None:
    core, report = Team(1), {}
    with print_few_tokens(_FEW_TOKENS) as add_row:
        for name in names:
            report[name] = _measure_few_tokens(core, name, repeats)
            add_row(name, report[name])
    core.close()
    print(json.dumps({"tool": "kernel_bench", "cpu": _cpu_name(), "isa": isa()._asdict(), "few_tokens": report}))


def _measure_few_tokens(core: Team, name: str, repeats: int) -> dict[int, tuple[float, float]]:
    """By number of tokens: how many times the products of rows take the time of unpacking and multiplying a panel, and
    how many times that of one token's rows."""
    layout, bench = BY_NAME[name], Bench(core, ROW_WEIGHTS, max(_FEW_TOKENS))
    data, out = _random_matrix(layout, _FEW_ROWS), np.zeros((max(_FEW_TOKENS), _FEW_ROWS), np.float32)
    program, found = bench.ours(layout, data, out), {}
    bench.set_tokens(1)
    one_s = measure(core, {"rows": [program]}, repeats).median_s("rows")
    for num_tokens in _FEW_TOKENS:
        seconds = {}
        for kind, num_generated in (("rows", num_tokens), ("panel", 0)):
            bench.set_tokens(num_tokens, num_generated)
            seconds[kind] = measure(core, {kind: [program]}, repeats).median_s(kind)
        found[num_tokens] = (seconds["rows"] / seconds["panel"], seconds["rows"] / one_s)
    return found


def _part_sizes(num_threads: int) -> tuple[int, int]:
    """(number of parts, bytes of each) of a matrix of eight times the largest cache, and of at least 256 MiB and 8
    parts."""
    sizes = [size.read_text().strip() for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kibibytes = [int(size[:-1]) << (10 if size.endswith("M") else 0) for size in sizes if size[-1] in "KM"]
    num_bytes = max(_MIN_BYTES, 8 * 1024 * max(kibibytes, default=0))
    return max(8, num_bytes // (_PART_BYTES * num_threads)), _PART_BYTES * num_threads


def _measure_machine(team: Team, core: Team, repeats: int) -> dict:
    """CPU, clock and read bandwidth."""
    num_parts, part_bytes = _part_sizes(team.num_threads)
    parts = np.ones((num_parts, part_bytes // 4), np.int32)
    bench = Bench(team, 256)
    reading = measure(team, {"read": [bench.read(part) for part in parts]}, repeats)
    clock = measure(core, {"clock": [clock_program()]}, 9)
    return {
        "tool": "kernel_bench",
        "cpu": _cpu_name(),
        "isa": isa()._asdict(),
        "ggml": describe_ggml(),
        "threads": team.num_threads,
        "repeats": repeats,
        "clock_ghz": CLOCK_CYCLES / clock.seconds["clock"].min() / 1e9,
        "read_gb_s": parts[0].nbytes / reading.median_s("read") / 1e9,
        "buffer_bytes": parts.nbytes,
        "stolen_share": reading.stolen_share,
        "is_noisy": reading.is_noisy,
        "is_lost_time_known": is_lost_time_known(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _measure_type(team: Team, core: Team, name: str, repeats: int) -> TypeResult:
    layout, bench = BY_NAME[name], Bench(team, ROW_WEIGHTS)
    num_parts, part_bytes = _part_sizes(team.num_threads)
    num_rows = part_bytes // layout.row_bytes(ROW_WEIGHTS) // 16 * 16
    parts = np.split(_random_matrix(layout, num_parts * num_rows), num_parts)
    out, ggml_out = np.zeros((1, len(parts[0])), np.float32), np.zeros(len(parts[0]), np.float32)
    vec_dot = find_vec_dot(layout, bench.x.values[0])
    workloads = {
        "read": [bench.read(part) for part in parts],
        "ours": [bench.ours(layout, part, out) for part in parts],
    }
    cached = parts[0][: max(16, _CACHED_BYTES // parts[0].shape[1] // 16 * 16)]
    in_cache = {"clock": [clock_program()], "ours": [bench.ours(layout, cached, out, _CACHED_RUNS)]}
    if vec_dot:
        workloads["ggml"] = [bench.ggml(vec_dot, part, ggml_out) for part in parts]
        in_cache["ggml"] = [bench.ggml(vec_dot, cached, ggml_out, _CACHED_RUNS)]
        _check_agreement(team, name, (workloads["ours"][0], out[0]), (workloads["ggml"][0], ggml_out))
    cold, hot = measure(team, workloads, repeats), measure(core, in_cache, repeats)
    num_weights, num_cached = len(parts[0]) * ROW_WEIGHTS, len(cached) * ROW_WEIGHTS * _CACHED_RUNS
    return TypeResult(
        bits_per_weight=layout.bits_per_weight,
        gweights_s=num_weights / cold.median_s("ours") / 1e9,
        gb_s=parts[0].nbytes / cold.median_s("ours") / 1e9,
        bandwidth_share=cold.ratio("ours", "read")[0],
        ggml_gweights_s=num_weights / cold.median_s("ggml") / 1e9 if vec_dot else None,
        ratio=cold.ratio("ours", "ggml") if vec_dot else None,
        core_gweights_s=num_cached / hot.median_s("ours") / 1e9,
        cycles_per_weight=CLOCK_CYCLES / num_cached / hot.ratio("ours", "clock")[0],
        core_ratio=hot.ratio("ours", "ggml")[0] if vec_dot else None,
        num_rounds=min(cold.num_kept, hot.num_kept),
        num_runs=cold.num_runs + hot.num_runs,
        num_dropped=cold.num_dropped + hot.num_dropped,
        is_noisy=cold.is_noisy or hot.is_noisy,
        stolen_share=max(cold.stolen_share, hot.stolen_share),
    )


def _random_matrix(layout: Layout, num_rows: int) -> np.ndarray:
    """uint8 (rows, row_bytes): a random tile, again and again."""
    row_bytes = layout.row_bytes(ROW_WEIGHTS)
    tile = random_rows(layout, (4 << 20) // row_bytes, ROW_WEIGHTS, ROW_WEIGHTS**-0.5, np.random.default_rng(0))
    return np.resize(tile, (num_rows, row_bytes))


def _check_agreement(
    team: Team, name: str, ours: tuple[Program, np.ndarray], theirs: tuple[Program, np.ndarray]
) -> None:
    """Both must compute the same products, or timing them is of no use."""
    for program, _ in (ours, theirs):
        team.run(program)
    error = np.linalg.norm(ours[1] - theirs[1]) / np.linalg.norm(theirs[1])
    assert error < 0.02, f"{name}: our products differ from llama.cpp's by {error:.2%}"


def _measure_prefill(team: Team, name: str, repeats: int) -> PrefillResult:
    layout, bench = BY_NAME[name], Bench(team, ROW_WEIGHTS, max(_PREFILL_TOKENS))
    data = _random_matrix(layout, _PREFILL_ROWS * team.num_threads)
    out, num_rounds = np.zeros((max(_PREFILL_TOKENS), len(data)), np.float32), max(3, repeats // 5)
    rounds = [measure(team, {"unpack": [bench.unpack(layout, data)]}, num_rounds)]
    unpack_s, gmac_s = rounds[0].median_s("unpack"), {}
    for num_tokens in _PREFILL_TOKENS:
        bench.set_tokens(num_tokens)
        rounds.append(measure(team, {"product": [bench.ours(layout, data, out)]}, num_rounds))
        gmac_s[num_tokens] = num_tokens * len(data) * ROW_WEIGHTS / rounds[-1].median_s("product") / 1e9
    return PrefillResult(
        unpack_gweights_s=len(data) * ROW_WEIGHTS / unpack_s / 1e9,
        gmac_s=gmac_s,
        num_runs=sum(each.num_runs for each in rounds),
        num_dropped=sum(each.num_dropped for each in rounds),
        is_noisy=any(each.is_noisy for each in rounds),
    )
