"""How fast the GPU kernels are, and which share of the GPU's memory bandwidth that is. Tables, then JSON as the last
line. Needs CUDA.

    python -m tools.kernels.gpu_bench
    python -m tools.kernels.gpu_bench --types tq1_0,q8_0 --tokens 4

The read bandwidth comes first: it bounds everything else. Then each type multiplies a matrix larger than the caches
with a few vectors, as decoding does; its share is of that bandwidth. Dequantizing reads the same bytes and writes
bfloat16. Last, latent attention over a long context and the products of prompts, which are bound by tensor cores.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.gpu.support import Unusable, is_interpreted, why_unusable
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.random_blocks import random_rows

ROW_WEIGHTS, WIDTH, HEADS, RANK, ROPE = 7168, 2048, 64, 512, 64  # Kimi K2.5
_MATRIX_BYTES = 512 << 20  # far more than any cache holds
_TILE_BYTES = 4 << 20

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True, slots=True)
class TypeResult:
    """Of one type; bandwidths in 10^9 bytes of weights as stored."""

    bits_per_weight: float
    product_gb_s: float
    bandwidth_share: float
    dequantize_gb_s: float
    relative_error: float


@app.command()
def main(
    types: Annotated[str, typer.Option(help="Comma-separated, e.g. tq1_0,q4_k. Default: all.")] = "",
    tokens: Annotated[int, typer.Option(help="Vectors that a matrix is multiplied with.", min=1, max=16)] = 1,
    repeats: Annotated[int, typer.Option(help="Timed runs, of which the median counts.", min=1)] = 30,
) -> None:
    """Time the GPU kernels: read bandwidth, every type, latent attention, products of prompts."""
    try:
        names = _known_types(types)
        check_device()
        _bench(names, tokens, repeats)
    except KimiLiteError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _known_types(types: str) -> list[str]:
    names = [name.strip().upper() for name in types.split(",") if name.strip()] or list(BY_NAME)
    for name in names:
        if name not in BY_NAME:
            raise KimiLiteError(f"There is no type {name!r}.", f"Choose from {', '.join(BY_NAME).lower()}.")
    return names


def check_device() -> None:
    """Raises KimiLiteError where there is nothing to measure."""
    unusable = why_unusable()
    if unusable is None and is_interpreted():
        problem = (
            "TRITON_INTERPRET is set: kernels would run in the interpreter, on the CPU, at no speed that says much."
        )
        unusable = Unusable(problem, "Unset it.")
    if unusable:
        other = "python -m tools.kernels    measures this machine's CPU kernels instead."
        raise KimiLiteError(unusable.problem, f"{unusable.remedy}\n  {other}")


def _bench(names: list[str], num_tokens: int, repeats: int) -> None:
    import torch

    console = Console()
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    read_gb_s = _read_gb_s(repeats)
    console.print(f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, torch {torch.__version__}")
    console.print(f"reads {read_gb_s:.0f} GB/s (a sum of {_MATRIX_BYTES >> 20} MiB)")
    report = {
        "tool": "gpu_bench",
        "gpu": properties.name,
        "tokens": num_tokens,
        "repeats": repeats,
        "read_gb_s": read_gb_s,
    }
    results = {name: _measure_type(name, num_tokens, repeats, read_gb_s) for name in names}
    console.print(_type_table(results, num_tokens))
    report["types"] = {name: asdict(result) for name, result in results.items()}
    report["attention"] = _measure_attention(repeats)
    report["prompt_tflop_s"] = _measure_prompt(repeats)
    report["experts"] = _measure_experts(names[0] if len(names) == 1 else "TQ1_0", repeats)
    for name, gb_s in report["attention"].items():
        console.print(f"latent attention, 32,768 positions, {name}: {gb_s:.0f} GB/s, {gb_s / read_gb_s:.0%} of reading")
    for name, tflop_s in report["prompt_tflop_s"].items():
        console.print(f"2,048 tokens, {name}: {tflop_s:.1f} TFLOP/s")
    experts = report["experts"]
    console.print(f"8 experts of {experts['type']}, a token: {experts['few_gb_s']:.0f} GB/s")
    console.print(f"8 experts, 85 tokens each: {experts['many_tflop_s']:.1f} TFLOP/s")
    print(json.dumps(report))


def _read_gb_s(repeats: int) -> float:
    import torch

    plain = torch.ones(_MATRIX_BYTES // 4, device="cuda")
    return _MATRIX_BYTES / median_s(lambda: torch.sum(plain), repeats) / 1e9


def median_s(run: Callable[[], object], repeats: int) -> float:
    """Seconds on the GPU between two events, after three runs to compile and warm up."""
    import torch

    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times))


def _measure_type(name: str, num_tokens: int, repeats: int, read_gb_s: float) -> TypeResult:
    import torch

    from kimi_lite.native.gpu.dequant import dequantize
    from kimi_lite.native.gpu.linear import linear

    layout = BY_NAME[name]
    row_bytes = layout.row_bytes(ROW_WEIGHTS)
    tile = random_rows(layout, _TILE_BYTES // row_bytes, ROW_WEIGHTS, ROW_WEIGHTS**-0.5, np.random.default_rng(0))
    data = torch.from_numpy(tile).cuda().repeat(_MATRIX_BYTES // tile.nbytes, 1)
    x = torch.randn((num_tokens, ROW_WEIGHTS), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    out = torch.empty((num_tokens, len(data)), device="cuda")
    product_s = median_s(lambda: linear(x, data, name, ROW_WEIGHTS, out=out), repeats)
    some = data[: max(1, len(data) // 8)]
    plain = torch.empty((len(some), ROW_WEIGHTS), dtype=torch.bfloat16, device="cuda")
    dequantize_s = median_s(lambda: dequantize(some, name, torch.bfloat16, plain), repeats)
    expected = x.double() @ dequantize(data[: len(tile)], name).double().T
    error = float((out[:, : len(tile)] - expected).norm() / expected.norm())
    assert error < 1e-5, f"{name}: the product is {error:.1e} off"
    return TypeResult(
        bits_per_weight=layout.bits_per_weight,
        product_gb_s=data.nbytes / product_s / 1e9,
        bandwidth_share=data.nbytes / product_s / 1e9 / read_gb_s,
        dequantize_gb_s=some.nbytes / dequantize_s / 1e9,
        relative_error=error,
    )


def _type_table(results: dict[str, TypeResult], num_tokens: int) -> Table:
    table = Table(title=f"{num_tokens} x {ROW_WEIGHTS} times quantized matrices of {_MATRIX_BYTES >> 20} MiB")
    for title in ("type", "bits", "GB/s", "of reading", "G weights/s", "dequantize GB/s"):
        table.add_column(title, justify="left" if title == "type" else "right")
    for name, r in results.items():
        weights_s = r.product_gb_s * 8 / r.bits_per_weight
        values = (f"{r.bits_per_weight:.4g}", f"{r.product_gb_s:.0f}", f"{r.bandwidth_share:.0%}", f"{weights_s:.0f}")
        table.add_row(name, *values, f"{r.dequantize_gb_s:.0f}")
    return table


def _measure_attention(repeats: int) -> dict[str, float]:
    """GB/s of cache read by one token's attention in one layer, by cache type."""
    import torch

    from kimi_lite.native.gpu.mla import mla_decode
    from kimi_lite.native.latent_rows import row_bytes

    num_pages, found = 512, {}
    q = torch.randn((1, HEADS, RANK + ROPE), device="cuda")
    table = torch.randperm(num_pages, device="cuda").to(torch.int32)[None]
    lengths = torch.tensor([64 * num_pages], dtype=torch.int32, device="cuda")
    for name, dtype in (("bf16", torch.bfloat16), ("q8", torch.uint8)):
        width = row_bytes("q8", RANK + ROPE) if name == "q8" else RANK + ROPE
        storage = torch.zeros((num_pages, 64, width), dtype=dtype, device="cuda")
        run = median_s(lambda s=storage: mla_decode(q[:, :, :RANK], q[:, :, RANK:], s, table, lengths, 0.1), repeats)
        found[name] = storage.nbytes / run / 1e9
    return found


def _measure_prompt(repeats: int) -> dict[str, float]:
    """TFLOP/s of products with 2,048 tokens."""
    import torch

    from kimi_lite.native.gpu.linear import linear

    found, num_tokens, num_rows = {}, 2048, 12288
    for name in ("Q8_0", "TQ1_0"):
        rows = random_rows(BY_NAME[name], num_rows, ROW_WEIGHTS, ROW_WEIGHTS**-0.5, np.random.default_rng(0))
        data = torch.from_numpy(rows).cuda()
        x = torch.randn((num_tokens, ROW_WEIGHTS), device="cuda").to(torch.bfloat16)
        out = torch.empty((num_tokens, num_rows), device="cuda")
        run = median_s(lambda d=data, n=name, x=x, out=out: linear(x, d, n, ROW_WEIGHTS, out=out), repeats)
        found[name] = 2 * num_tokens * num_rows * ROW_WEIGHTS / run / 1e12
    return found


def _measure_experts(name: str, repeats: int) -> dict[str, object]:
    """Eight of Kimi K2.5's experts: GB/s for one token, which reads all their bytes, and TFLOP/s for 85 tokens each."""
    import torch

    from kimi_lite.native.gpu.experts import ExpertMatrix, expert_choices

    layout, shapes = BY_NAME[name], ((WIDTH, ROW_WEIGHTS), (WIDTH, ROW_WEIGHTS), (ROW_WEIGHTS, WIDTH))
    sizes = [num_rows * layout.row_bytes(k) for num_rows, k in shapes]
    matrices = [ExpertMatrix(name, sum(sizes[:i]), *shapes[i], layout.row_bytes(shapes[i][1])) for i in range(3)]
    form = SimpleNamespace(gate=matrices[0], up=matrices[1], down=matrices[2])
    rng = np.random.default_rng(0)
    one = np.concatenate([random_rows(layout, *shape, 0.02, rng).reshape(1, -1) for shape in shapes], axis=1)
    slots, found = torch.from_numpy(one).cuda().repeat(16, 1), {"type": name}
    for key, tokens_each in (("few_gb_s", 1), ("many_tflop_s", 85)):
        choices = torch.arange(8, dtype=torch.int32, device="cuda").repeat_interleave(tokens_each)
        tokens = torch.arange(tokens_each, dtype=torch.int32, device="cuda").repeat(8)
        x = torch.randn((tokens_each, ROW_WEIGHTS), device="cuda")
        turns = cycle((choices, choices + 8))  # so that no run finds its experts in the L2 cache
        run = median_s(lambda x=x, turns=turns, t=tokens: expert_choices(x, slots, form, next(turns), t), repeats)
        num_flop = 2 * len(choices) * 3 * WIDTH * ROW_WEIGHTS
        found[key] = 8 * sum(sizes) / run / 1e9 if tokens_each == 1 else num_flop / run / 1e12
    return found


if __name__ == "__main__":
    app()
