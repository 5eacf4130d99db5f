"""The tower on the CPU: programs of dense products and full attention, run by a team of threads.

An item's patches go through each layer in chunks, except that attention wants them all: memory grows by the residual
stream, the context and the heads' queries, keys and values (25 KB a patch for K2.5's tower, 16 KB in int8), and by
nothing that is quadratic. Files with a quantized matrix (Q8_0) are computed in int8, attention too, all others in
float32 with the file's weights.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.moonvit import LAYER_NORM_EPS, VisionFile
from kimi_lite.hardware.host import usable_cores
from kimi_lite.model.vision.patches import Grid, Patches
from kimi_lite.model.vision.positions import position_rows, rope_angles
from kimi_lite.model.vision.weights import Stored, VisionWeights
from kimi_lite.native.cpu.activations import aligned_zeros
from kimi_lite.native.cpu.byte_attention import (
    MAX_HEAD,
    ByteHeads,
    byte_attention_op,
    byte_attention_scratch_bytes,
    byte_split_op,
)
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
from kimi_lite.native.cpu.full_attention import Heads, attention_scratch_bytes, full_attention_op, split_op
from kimi_lite.native.cpu.patch_merge import merge_op, merge_scratch_bytes
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.threads import Team

CHUNK_ROWS = 1152  # that go through a layer's products at once: whole tiles, whole blocks of keys
_ROW_MULTIPLE = 48  # of buffers: tiles of rows and panels of 16
_TILE_BYTES = 4096  # of sums, at most

Report = Callable[[str, int, int], None]


class Attention(NamedTuple):
    """How patches attend: float32, or int8 where the matrices are."""

    heads: type[Heads] | type[ByteHeads]
    scratch_bytes: Callable[[int], int]
    split_op: Callable[..., Op]
    attention_op: Callable[..., Op]


FLOATS = Attention(Heads, attention_scratch_bytes, split_op, full_attention_op)
BYTES = Attention(ByteHeads, byte_attention_scratch_bytes, byte_split_op, byte_attention_op)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A matrix and its bias, padded as the matrix is."""

    matrix: DenseMatrix
    bias: np.ndarray

    @classmethod
    def pack(cls, stored: Stored, bias: np.ndarray, is_int8: bool) -> "Linear":
        if is_int8 or not stored.is_float:
            matrix = DenseMatrix.of_int8(stored.values())
        else:
            matrix = DenseMatrix.of_floats(stored.data, stored.type_name)
        padded = aligned_zeros((matrix.padded_rows,), np.float32)
        padded[: len(bias)] = bias
        return cls(matrix, padded)

    @property
    def num_bytes(self) -> int:
        return self.matrix.num_bytes + self.bias.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    ln1: Norm
    qkv: Linear
    out: Linear
    ln2: Norm
    up: Linear
    down: Linear


class CpuTower:
    """Weights packed for the kernels; `encode` makes features of one item at a time."""

    def __init__(
        self, weights: VisionWeights, file: VisionFile, num_threads: int | None = None, report: Report | None = None
    ) -> None:
        self._file, self._tower = file, file.tower
        self.is_int8 = weights.has_quantized
        self.attention = BYTES if self.is_int8 and file.tower.head_dim <= MAX_HEAD else FLOATS
        report = report or (lambda stage, done, total: None)
        self._team = Team(num_threads or usable_cores().num_usable)
        try:
            self._load(weights, report)
            self._span = Span(self._team.num_threads, self._scratch_bytes())
            self._compile(report)
        except BaseException:
            self._team.close()
            raise

    @property
    def num_bytes(self) -> int:
        """Of packed weights."""
        layers = sum(part.num_bytes for layer in self._layers for part in (layer.qkv, layer.out, layer.up, layer.down))
        return layers + self._patch.num_bytes + self._first.num_bytes + self._second.num_bytes + self._positions.nbytes

    def encode(self, patches: Patches, should_stop: Callable[[], bool], report: Report) -> np.ndarray:
        """float32 (tokens, D). Raises InterruptedError between layers when `should_stop()` becomes true."""
        item = _Item(self, patches)
        item.embed(patches)
        for number, layer in enumerate(self._layers):
            if should_stop():
                raise InterruptedError
            report("reading the image", number, len(self._layers))
            item.run_layer(layer)
        report("reading the image", len(self._layers), len(self._layers))
        return item.project()

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()

    def _load(self, weights: VisionWeights, report: Report) -> None:
        tower = self._tower
        names = ["v.patch_embd", "mm.1", "mm.2"]
        jobs: dict[str, Callable[[], Linear]] = {name: lambda name=name: self._linear(weights, name) for name in names}
        for number in range(tower.layers):
            block = f"v.blk.{number}."
            jobs[f"{block}attn_qkv"] = lambda number=number: Linear.pack(*weights.qkv(number), self.is_int8)
            for name in ("attn_out", "ffn_up", "ffn_down"):
                jobs[block + name] = lambda name=block + name: self._linear(weights, name)
        packed: dict[str, Linear] = {}
        with ThreadPoolExecutor(self._team.num_threads) as pool:
            for name, linear in zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True):
                report("reading the vision tower", len(packed), len(jobs))
                packed[name] = linear
        self._patch, self._first, self._second = (packed[name] for name in names)
        self._positions = weights.positions()
        self._post, self._last = _norm(weights, "v.post_ln"), _norm(weights, "mm.input_norm", tower.eps)
        self._layers = [self._layer(weights, f"v.blk.{number}.", packed) for number in range(tower.layers)]

    def _linear(self, weights: VisionWeights, name: str) -> Linear:
        is_int8 = self.is_int8 and name != "v.patch_embd"
        return Linear.pack(weights.matrix(f"{name}.weight"), weights.vector(f"{name}.bias"), is_int8)

    def _layer(self, weights: VisionWeights, block: str, packed: dict[str, Linear]) -> _Layer:
        return _Layer(
            ln1=_norm(weights, f"{block}ln1"),
            qkv=packed[f"{block}attn_qkv"],
            out=packed[f"{block}attn_out"],
            ln2=_norm(weights, f"{block}ln2"),
            up=packed[f"{block}ffn_up"],
            down=packed[f"{block}ffn_down"],
        )

    def _scratch_bytes(self) -> int:
        """Of a thread, for any operation."""
        tower = self._tower
        staged = max(
            merge_scratch_bytes(tower.hidden, tower.merge), 4 * tower.hidden, 64 * round_up(tower.head_dim, 16)
        )
        return max(attention_scratch_bytes(tower.head_dim), staged, _TILE_BYTES) + 4096

    def _compile(self, report: Report) -> None:
        """All kernels: an item of few patches goes through them."""
        side = self._tower.merge
        pixels = np.zeros((side * side, 3, self._tower.patch, self._tower.patch), np.uint8)
        report("preparing the vision tower's kernels", 0, 2)
        patches = Patches(pixels, Grid(1, side, side))
        item = _Item(self, patches)
        item.embed(patches)
        report("preparing the vision tower's kernels", 1, 2)
        item.run_layer(self._layers[0])
        item.project()
        report("preparing the vision tower's kernels", 2, 2)


class _Item:
    """The buffers of one item and what is done to them."""

    def __init__(self, owner: CpuTower, patches: Patches) -> None:
        self._owner, self._grid, tower = owner, Grid(*patches.grid), owner._tower
        count, self._span, self._team = self._grid.num_patches, owner._span, owner._team
        capacity, chunk = round_up(count, _ROW_MULTIPLE), min(CHUNK_ROWS, round_up(count, _ROW_MULTIPLE))
        d, first = tower.hidden, owner._layers[0]
        self._x = aligned_zeros((capacity, first.out.matrix.padded_rows), np.float32, 64)
        self._context = aligned_zeros((capacity, round_up(d, 16)), np.float32, 64)
        self._heads = owner.attention.heads.make(count, tower.heads, tower.head_dim)
        self._pixels = DenseRows(chunk, 3 * tower.patch**2, is_int8=False)
        self._wide = DenseRows(chunk, tower.feed_forward, owner.is_int8)
        self._normed = DenseRows(chunk, d, owner.is_int8)
        self._qkv = aligned_zeros((chunk, first.qkv.matrix.padded_rows), np.float32, 64)
        self._turns = _turn_tables(rope_angles(tower, self._grid, owner._file.row_order), capacity, self._heads.width)

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        for first in range(0, count, CHUNK_ROWS):
            yield first, min(CHUNK_ROWS, count - first)

    def embed(self, patches: Patches) -> None:
        """x = the patch filter's products, with positions."""
        owner, file, count = self._owner, self._owner._file, self._grid.num_patches
        op = dense_op(self._span, self._pixels, owner._patch.matrix, self._x, owner._patch.bias, is_global=True)
        program, k = Program([op]), self._pixels.k
        mean, std = (np.repeat(np.float32(values), self._owner._tower.patch**2) for values in (file.mean, file.std))
        for first, length in self._chunks(count):
            part = patches.pixels[first : first + length].reshape(length, k)
            self._pixels.values[:length, :k] = (part.astype(np.float32) / np.float32(255) - mean) / std
            self._span.set(first, length)
            self._team.run(program)
        self._x[:count, : owner._tower.hidden] += position_rows(owner._positions, self._grid)

    def run_layer(self, layer: _Layer) -> None:
        span, count, x = self._span, self._grid.num_patches, self._x
        before = Program(
            [
                layer_norm_op(span, x, layer.ln1, self._normed),
                dense_op(span, self._normed, layer.qkv.matrix, self._qkv, layer.qkv.bias),
                self._owner.attention.split_op(span, self._qkv, self._owner._tower.heads, *self._turns, self._heads),
            ]
        )
        hidden, quantize = _dense_into(span, self._normed, layer.up, self._wide, "gelu_tanh")
        after = Program(
            [
                rows_op(span, self._context, self._normed, is_global=True),
                dense_op(span, self._normed, layer.out.matrix, x, layer.out.bias, is_added=True, is_global=True),
                layer_norm_op(span, x, layer.ln2, self._normed),
                hidden,
                *quantize,
                dense_op(span, self._wide, layer.down.matrix, x, layer.down.bias, is_added=True, is_global=True),
            ]
        )
        for chunk in self._chunks(count):
            span.set(*chunk)
            self._team.run(before)
        span.set(0, count)
        self._team.run(Program([self._owner.attention.attention_op(span, self._heads, self._context)]))
        for chunk in self._chunks(count):
            span.set(*chunk)
            self._team.run(after)

    def project(self) -> np.ndarray:
        """float32 (tokens, D of the language model)."""
        owner, span, tower = self._owner, self._span, self._owner._tower
        num_tokens = self._grid.num_tokens(tower.merge)
        capacity, chunk = round_up(num_tokens, _ROW_MULTIPLE), min(CHUNK_ROWS, round_up(num_tokens, _ROW_MULTIPLE))
        merged, hidden = (DenseRows(chunk, tower.merged, owner.is_int8) for _ in range(2))
        out = aligned_zeros((capacity, owner._second.matrix.padded_rows), np.float32)
        first, quantize = _dense_into(span, merged, owner._first, hidden, "gelu")
        ops = [
            merge_op(span, self._x, owner._post, owner._last, self._grid, tower.merge, merged),
            first,
            *quantize,
            dense_op(span, hidden, owner._second.matrix, out, owner._second.bias, is_global=True),
        ]
        program = Program(ops)
        for part in self._chunks(num_tokens):
            span.set(*part)
            self._team.run(program)
        return out[:num_tokens, : tower.text_hidden].copy()


def _dense_into(span: Span, rows: DenseRows, linear: Linear, out: DenseRows, activation: str) -> tuple[Op, list[Op]]:
    """A product whose results another one reads: the operation, and what brings them into int8 where that is wanted."""
    if not out.is_int8:
        return dense_op(span, rows, linear.matrix, out.values, linear.bias, activation), []
    values = aligned_zeros((out.capacity, linear.matrix.padded_rows), np.float32, 64)
    return dense_op(span, rows, linear.matrix, values, linear.bias, activation), [
        rows_op(span, values, out, is_global=False)
    ]


def _turn_tables(angles: np.ndarray, capacity: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of each value's pair, as `native.cpu.full_attention.split_op` wants them."""
    cos, sin = (aligned_zeros((capacity, width), np.float32) for _ in range(2))
    count, pairs = angles.shape
    cos[:count, : 2 * pairs] = np.repeat(np.cos(angles), 2, axis=1)
    sin[:count, : 2 * pairs] = np.repeat(np.sin(angles), 2, axis=1) * np.tile([-1, 1], pairs)
    return cos, sin


def _norm(weights: VisionWeights, name: str, eps: float = LAYER_NORM_EPS) -> Norm:
    return Norm(weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias"), eps)
