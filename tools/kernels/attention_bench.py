"""How fast attention over a long context decodes on the CPU, for every dtype of the cache. A table, then JSON as the
last line.

    python -m tools.kernels.attention_bench --depth 32768 --threads 2

One layer of Kimi K2.5 (64 heads over a latent of 512 + 64), one token, absorbed; the cache's dtypes take turns with
each other and with a plain read of as many bytes as the float16 cache has. The error is that of the output against a
float32 cache.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.attention import AttentionBuffers, attention_op
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.latent import write_latent_op
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import Attending, RunTable
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.latent_rows import PAGE_TOKENS, ROW_FORMS, MlaShape, row_bytes, row_length
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.random_blocks import random_rows
from kimi_lite.tools.bench.measure import Rounds, measure
from kimi_lite.tools.bench.workloads import CLOCK_CYCLES, Bench, clock_program

SHAPE = MlaShape(heads=64, nope=128, rope=64, kv_lora=512, value=128)
HEADS, NOPE, ROPE, KV_LORA, VALUE = SHAPE
LAYERS = 61
_SOFTMAX_SCALE = 0.08  # with the random queries here scores deviate by about 2
_WRITTEN_TOKENS = 256  # at a time


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """Of one layer and token, the products with W_UK and W_UV in the time but not in the flops; rates are medians over
    the kept rounds."""

    seconds: float
    gflop_s: float
    flop_per_cycle: float  # of a core
    gb_s: float  # of the cache
    bandwidth_share: float  # of a plain read in the same round
    error: float  # against float32


class Layer:
    """One token's attention over `depth` earlier positions whose latents are random and lie in pages out of order."""

    def __init__(self, team: Team, depth: int, dtype: str, latents: np.ndarray) -> None:
        """latents: float32 (depth, kv_lora + rope), written to the cache by the kernel that always does it."""
        rng = np.random.default_rng(1)
        num_pages = -(-depth // PAGE_TOKENS)
        pages = rng.permutation(num_pages).astype(np.int32)
        form = ROW_FORMS[dtype]
        self.storage = np.zeros((num_pages, PAGE_TOKENS, row_length(dtype, KV_LORA + ROPE)), form.storage)
        self._write(team, latents, pages, dtype)
        self._run = RunTable(1, team.num_threads, 1 << 20)
        self._run.set_tokens(np.zeros(1, np.int32), num_generated=1)
        self._run.set_positions(np.zeros(1, np.int64), *_no_turn(1))
        self._run.set_attention([Attending(0, 1, depth - 1, pages)], [])
        self.out = Activations(1, HEADS * VALUE, set())
        self._q = rng.standard_normal((1, HEADS * (NOPE + ROPE)), np.float32)
        k_b, v_b = _random_matrix(HEADS * KV_LORA, NOPE, rng), _random_matrix(HEADS * VALUE, KV_LORA, rng)
        kind = {activation_kind("Q8_0")}
        buffers = AttentionBuffers(1, SHAPE, kind, kind)
        op = attention_op(self._run, self._q, k_b, v_b, self.storage, buffers, self.out, SHAPE, _SOFTMAX_SCALE, dtype)
        self.program = Program([op])

    def _write(self, team: Team, latents: np.ndarray, pages: np.ndarray, dtype: str) -> None:
        run = RunTable(_WRITTEN_TOKENS, team.num_threads, 1 << 16)
        rows, weight = np.zeros((_WRITTEN_TOKENS, KV_LORA + ROPE), np.float32), np.ones(KV_LORA, np.float32)
        program = Program([write_latent_op(run, rows, weight, self.storage, SHAPE, 1e-6, dtype)])
        for first in range(0, len(latents), _WRITTEN_TOKENS):
            positions = np.arange(first, min(first + _WRITTEN_TOKENS, len(latents)))
            rows[: len(positions)] = latents[positions]
            run.set_tokens(np.zeros(len(positions), np.int32))
            cache_rows = pages[positions // PAGE_TOKENS].astype(np.int64) * PAGE_TOKENS + positions % PAGE_TOKENS
            run.set_positions(cache_rows, *_no_turn(len(positions)))
            team.run(program)


def _no_turn(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of angle 0."""
    return np.ones((num_tokens, ROPE // 2), np.float32), np.zeros((num_tokens, ROPE // 2), np.float32)


def _random_matrix(num_rows: int, k: int, rng: np.random.Generator) -> Matrix:
    """Rows of Q8_0 whose products are as large as what they multiply."""
    return Matrix.of(random_rows(BY_NAME["Q8_0"], num_rows, k, k**-0.5, rng), "Q8_0", k)


def attention_bench(depth: int, num_threads: int, num_rounds: int) -> dict[str, AttentionResult]:
    """Times every dtype of the cache, in turns."""
    team = Team(num_threads)
    latents = np.random.default_rng(0).standard_normal((depth, KV_LORA + ROPE), np.float32)
    layers = {dtype: Layer(team, depth, dtype, latents) for dtype in ROW_FORMS}
    for layer in layers.values():
        team.run(layer.program)
    bench = Bench(team, 256)
    data = np.ones(layers["f16"].storage.nbytes // 4, np.int32)
    workloads = {"read": [bench.read(data)]} | {dtype: [layer.program] for dtype, layer in layers.items()}
    rounds = measure(team, workloads, num_rounds)
    core = Team(1)
    hz = CLOCK_CYCLES / measure(core, {"clock": [clock_program()]}, 3).seconds["clock"].min()
    core.close()
    team.close()
    exact = layers["f32"].out.values
    errors = {
        dtype: float(np.linalg.norm(layer.out.values - exact) / np.linalg.norm(exact))
        for dtype, layer in layers.items()
    }
    return {dtype: _result(rounds, dtype, depth, hz * num_threads, data.nbytes, errors[dtype]) for dtype in layers}


def _result(rounds: Rounds, dtype: str, depth: int, cycles_s: float, read_bytes: int, error: float) -> AttentionResult:
    seconds = rounds.median_s(dtype)
    flops = 2 * HEADS * depth * (2 * KV_LORA + ROPE)
    num_bytes = depth * row_bytes(dtype, KV_LORA + ROPE)
    return AttentionResult(
        seconds=seconds,
        gflop_s=flops / seconds / 1e9,
        flop_per_cycle=flops / seconds / cycles_s,
        gb_s=num_bytes / seconds / 1e9,
        bandwidth_share=num_bytes / read_bytes * rounds.median_s("read") / seconds,
        error=error,
    )


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    depth: Annotated[int, typer.Option(help="Positions in the context.", min=64)] = 32768,
    threads: Annotated[int, typer.Option(help="Default: all cores.", min=1)] = os.cpu_count() or 1,
    repeats: Annotated[int, typer.Option(help="Undisturbed rounds.", min=1)] = 10,
) -> None:
    """Time absorbed attention of one Kimi K2.5 layer at a depth."""
    results = attention_bench(depth, threads, repeats)
    table = Table(title=f"one layer, one token, {depth:,} positions, {threads} threads", title_justify="left")
    for name in ("cache", "ms", f"{LAYERS} layers, s", "GFLOP/s", "a core's flop/cycle", "GB/s", "% of read", "error"):
        table.add_column(name, justify="right")
    for dtype, r in results.items():
        numbers = (f"{1e3 * r.seconds:.2f}", f"{LAYERS * r.seconds:.2f}", f"{r.gflop_s:.1f}", f"{r.flop_per_cycle:.1f}")
        table.add_row(dtype, *numbers, f"{r.gb_s:.2f}", f"{100 * r.bandwidth_share:.1f}", f"{r.error:.2%}")
    Console(file=sys.stdout, width=100).print(table)
    document = {"tool": "attention_bench", "depth": depth, "threads": threads}
    print(json.dumps(document | {"results": {dtype: asdict(result) for dtype, result in results.items()}}))


if __name__ == "__main__":
    app()
