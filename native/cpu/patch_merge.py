"""What a vision tower's last layer becomes before the projector: normalized, averaged over frames, patches joined.

merge_op    token (y, x) = the patches (m y + a, m x + b) behind one another, each LayerNorm(mean over frames of
            LayerNorm(patch)): Kimi K2.5's `sd2_tpool` and the norm of its projector; with one frame Kimi-VL's.
"""

import numpy as np
from numba import njit, types

from kimi_lite.native.cpu.compiler import FASTMATH, kernel
from kimi_lite.native.cpu.dense import (
    DenseRows,
    Norm,
    Span,
    layer_norm,
    place_row,
    span_count,
    span_first,
    span_scratch,
)
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.simd import load_f32, load_f32x16, load_i64, splat_f32x16, store_f32x16, zero_f32x16


def merge_scratch_bytes(k: int, merge: int) -> int:
    """A thread's, for patches of k values."""
    return 4 * k * (merge * merge + 2)


@njit(fastmath=FASTMATH, error_model="numpy")
def _add(source, target, k):
    for i in range(0, 4 * k, 64):
        store_f32x16(target + i, load_f32x16(target + i) + load_f32x16(source + i))


@kernel
def _merge_kernel(args, thread, team):
    span, x, stride, rows = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    weight, bias, eps = load_i64(args + 32), load_i64(args + 40), load_f32(args + 48)
    last_weight, last_bias, last_eps = load_i64(args + 56), load_i64(args + 64), load_f32(args + 72)
    k, frames, height = load_i64(args + 80), load_i64(args + 88), load_i64(args + 96)
    width, merge = load_i64(args + 104), load_i64(args + 112)
    normed = span_scratch(span, thread)
    mean, token = normed + 4 * k, normed + 8 * k
    share = splat_f32x16(types.float32(1) / types.float32(frames))
    task = next_task(team)
    while task < span_count(span):
        y, column = (span_first(span) + task) // (width // merge), (span_first(span) + task) % (width // merge)
        for part in range(merge * merge):
            patch = (merge * y + part // merge) * width + merge * column + part % merge
            for i in range(0, 4 * k, 64):
                store_f32x16(mean + i, zero_f32x16())
            for frame in range(frames):
                layer_norm(x + (frame * height * width + patch) * stride, weight, bias, normed, k, eps)
                _add(normed, mean, k)
            for i in range(0, 4 * k, 64):
                store_f32x16(mean + i, load_f32x16(mean + i) * share)
            layer_norm(mean, last_weight, last_bias, token + 4 * k * part, k, last_eps)
        place_row(rows, task, token)
        task = next_task(team)


def merge_op(
    span: Span, x: np.ndarray, norm: Norm, last_norm: Norm, grid: tuple[int, int, int], merge: int, rows: DenseRows
) -> Op:
    """rows[i] = token first + i of a grid (t, h, w). x: float32 (>= t * h * w, >= k); rows of merge^2 * k values."""
    frames, height, width = grid
    k = len(norm.weight)
    assert rows.k == merge * merge * k and height % merge == width % merge == 0, (rows.k, k, grid, merge)
    assert len(x) >= frames * height * width and x.dtype == np.float32, (x.shape, x.dtype, grid)
    sizes = (k, frames, height, width, merge)
    norms = (norm.weight, norm.bias, float(norm.eps), last_norm.weight, last_norm.bias, float(last_norm.eps))
    return Op.of(_merge_kernel, span, x, x.strides[0], rows, *norms, *sizes)
