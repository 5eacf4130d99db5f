"""Dense products and full attention beside PyTorch in float64, at odd sizes; hostile values stay where they are."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from kimi_lite.model.vision.cpu import BYTES, FLOATS
from kimi_lite.native.cpu.activations import aligned_zeros
from kimi_lite.native.cpu.dense import (
    DenseMatrix,
    DenseRows,
    Norm,
    Span,
    dense_op,
    layer_norm_op,
    round_up,
    rows_op,
)
from kimi_lite.native.cpu.dense_tiles import TILE_ROWS
from kimi_lite.native.cpu.patch_merge import merge_op, merge_scratch_bytes
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.threads import Team

DTYPES = {"F32": 3e-6, "F16": 3e-6, "BF16": 3e-6, "int8": 1.2e-2}
GELUS = {"": None, "gelu_tanh": "tanh", "gelu": "none"}


@pytest.fixture(scope="module")
def team():
    team = Team(2)
    yield team
    team.close()


def error(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


def packed(values: np.ndarray, dtype: str) -> tuple[DenseMatrix, np.ndarray]:
    """The matrix, and the values that it holds before any rounding to int8."""
    if dtype == "BF16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return DenseMatrix.of_floats(bits, dtype), (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "int8":
        return DenseMatrix.of_int8(values), values
    stored = values.astype(np.float16 if dtype == "F16" else np.float32)
    return DenseMatrix.of_floats(stored, dtype), stored.astype(np.float32)


def check_product(team: Team, dtype: str, num_rows: int, k: int, num_outputs: int, activation: str = "") -> None:
    """A chunk in the middle of an item: what is before and behind it stays as it was."""
    rng, first = np.random.default_rng(num_rows), TILE_ROWS
    matrix, values = packed((rng.standard_normal((num_outputs, k)) / k**0.5).astype(np.float32), dtype)
    x, bias = rng.standard_normal((num_rows, k)).astype(np.float32), rng.standard_normal(num_outputs).astype(np.float32)
    capacity = round_up(num_rows, TILE_ROWS)
    source = np.zeros((capacity, round_up(k, 16)), np.float32)
    source[:num_rows, :k] = x
    padded = np.zeros(matrix.padded_rows, np.float32)
    padded[:num_outputs] = bias
    rows, span = DenseRows(capacity, k, dtype == "int8"), Span(team.num_threads, 1 << 13)
    out = np.full((first + capacity + 1, matrix.padded_rows), 7, np.float32)
    span.set(first, num_rows)
    product = dense_op(span, rows, matrix, out, padded, activation, is_added=True, is_global=True)
    team.run(Program([rows_op(span, source, rows, is_global=False), product]))
    want = functional.linear(*(torch.from_numpy(each).double() for each in (x, values, bias)))
    if activation:
        want = functional.gelu(want, approximate=GELUS[activation])
    assert error(out[first : first + num_rows, :num_outputs] - 7, want.numpy()) < DTYPES[dtype]
    assert (out[:first] == 7).all() and (out[first + capacity :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (29, 80, 50), (25, 144, 33), (200, 272, 130)], ids=str)
def test_products(team, dtype, shape):
    check_product(team, dtype, *shape)


@pytest.mark.parametrize("activation", GELUS)
def test_activations(team, activation):
    check_product(team, "F32", 40, 64, 96, activation)


@pytest.mark.parametrize("dtype", ["F32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_row_alone(team, dtype, value):
    x = np.ones((TILE_ROWS, 64), np.float32)
    x[3, 5] = value
    matrix = packed(np.ones((32, 64), np.float32), dtype)[0]
    rows, span = DenseRows(TILE_ROWS, 64, dtype == "int8"), Span(team.num_threads, 1 << 13)
    out = np.zeros((TILE_ROWS, matrix.padded_rows), np.float32)
    span.set(0, TILE_ROWS)
    bias = np.zeros(matrix.padded_rows, np.float32)
    team.run(Program([rows_op(span, x, rows, is_global=False), dense_op(span, rows, matrix, out, bias)]))
    is_finite = np.isfinite(out[:, :32]).all(axis=1)
    assert not is_finite[3] and is_finite.sum() == TILE_ROWS - 1


# rows of a chunk, and how far the form may be from float64
WAYS = {"float32": (FLOATS, 48, 3e-6), "int8": (BYTES, 128, 2e-2)}


def check_attention(
    team: Team, num_rows: int, num_heads: int, head_dim: int, name: str = "float32", spread: float = 1.0
) -> None:
    """Packed in chunks, as the tower does."""
    rng, d = np.random.default_rng(num_rows), num_heads * head_dim
    way, cut, limit = WAYS[name]
    capacity = round_up(num_rows, cut)
    span = Span(team.num_threads, max(way.scratch_bytes(head_dim), 64 * round_up(head_dim, 16)))
    heads = way.heads.make(num_rows, num_heads, head_dim)
    qkv = aligned_zeros((capacity, 3 * d), np.float32, 64)
    qkv[:num_rows] = spread * rng.standard_normal((num_rows, 3 * d))
    angles = rng.standard_normal((num_rows, head_dim // 2))
    cos, sin = np.zeros((2, capacity, heads.width), np.float32)
    cos[:num_rows, :head_dim] = np.repeat(np.cos(angles), 2, axis=1)
    sin[:num_rows, :head_dim] = np.repeat(np.sin(angles), 2, axis=1) * np.tile([-1, 1], head_dim // 2)
    out = np.zeros((capacity, d), np.float32)
    for first in range(0, num_rows, cut):
        chunk = aligned_zeros((cut, 3 * d), np.float32, 64)
        chunk[: len(qkv[first : first + cut])] = qkv[first : first + cut]
        span.set(first, min(cut, num_rows - first))
        team.run(Program([way.split_op(span, chunk, num_heads, cos, sin, heads)]))
    span.set(0, num_rows)
    team.run(Program([way.attention_op(span, heads, out)]))
    parts = torch.from_numpy(qkv[:num_rows].astype(np.float64)).view(num_rows, 3, num_heads, head_dim)
    q, k, v = parts.permute(1, 2, 0, 3)
    turns = torch.from_numpy(np.exp(1j * angles))
    q, k = (
        torch.view_as_real(torch.view_as_complex(each.reshape(*each.shape[:2], -1, 2).contiguous()) * turns).flatten(2)
        for each in (q, k)
    )
    want = functional.scaled_dot_product_attention(q, k, v).permute(1, 0, 2).reshape(num_rows, d).numpy()
    assert error(out[:num_rows], want) < limit


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 2, 16), (97, 3, 72), (130, 2, 24), (300, 1, 128)], ids=str)
def test_attention(team, shape, way):
    check_attention(team, *shape, way)


def test_attention_to_one_key(team):
    """Scores of hundreds: all weight on single keys, and nothing overflows."""
    check_attention(team, 140, 2, 32, spread=12)


def test_layer_norm(team):
    x, rng = np.random.default_rng(0).standard_normal((30, 80)).astype(np.float32) * 3 + 5, np.random.default_rng(1)
    norm = Norm(*rng.standard_normal((2, 80)).astype(np.float32), 1e-5)
    rows, span = DenseRows(round_up(10, TILE_ROWS), 80, is_int8=False), Span(team.num_threads, 1 << 12)
    span.set(20, 10)
    team.run(Program([layer_norm_op(span, x, norm, rows)]))
    weight, bias = (torch.from_numpy(each).double() for each in norm[:2])
    want = functional.layer_norm(torch.from_numpy(x[20:]).double(), (80,), weight, bias, 1e-5).numpy()
    assert error(rows.values[:10, :80], want) < 1e-6


def test_merge(team):
    """Frames are averaged after the first norm, patches joined row by row."""
    rng, (t, h, w), k = np.random.default_rng(0), (3, 4, 6), 32
    x = rng.standard_normal((t * h * w, k)).astype(np.float32)
    norms = [Norm(*rng.standard_normal((2, k)).astype(np.float32), 1e-5) for _ in range(2)]
    rows, span = DenseRows(round_up(6, TILE_ROWS), 4 * k, is_int8=False), Span(1 + 1, merge_scratch_bytes(k, 2))
    span.set(0, 6)
    team.run(Program([merge_op(span, x, *norms, (t, h, w), 2, rows)]))

    def apply(norm: Norm, values: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(values, (k,), *(torch.from_numpy(each) for each in norm[:2]), norm.eps)

    mean = apply(norms[0], torch.from_numpy(x)).view(t, h // 2, 2, w // 2, 2, k).mean(0)
    want = apply(norms[1], mean).permute(0, 2, 1, 3, 4).reshape(6, 4 * k).numpy()
    assert error(rows.values[:6, : 4 * k], want) < 1e-6
