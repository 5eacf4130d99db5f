"""The programs that `tools.kernels` times, all run by the runtime's own team of threads.

Reading memory, our products, llama.cpp's products and unpacking differ only in the kernel; tasks are handed out in the
same way. `clock` is a chain of instructions whose length in cycles is known, so that its time gives the clock
frequency.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kimi_lite.hardware.bandwidth import read_program
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.linear import Product, linear_op, quantize_op, thread_scratch
from kimi_lite.native.cpu.matrix import Matrix, matrix_panel, panel_scratch_bytes
from kimi_lite.native.cpu.panel import PANEL_ROWS
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team, next_task
from kimi_lite.native.layouts import Layout
from kimi_lite.native.simd import load_i64, store_i64

CLOCK_CYCLES = 6_000_000  # of the chain: six dependent one-cycle instructions a step
_GGML_ROWS = 64  # rows a task: llama.cpp's own chunk for one vector (ggml_compute_forward_mul_mat)


@intrinsic
def _call_vec_dot(typingctx, function, n, out, weights, x):
    """ggml-cpu.h `ggml_vec_dot_t(n, out, 0, weights, 0, x, 0, 1)` through its address."""

    def codegen(context, builder, sig, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [i32, i64, i64, i64, i64, i64, i64, i32])
        function, n, out, weights, x = args
        zero = ir.Constant(i64, 0)
        values = [builder.trunc(n, i32), out, zero, weights, zero, x, zero, ir.Constant(i32, 1)]
        builder.call(builder.inttoptr(function, kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@kernel
def _ggml_kernel(args, thread, team):
    function, n, weights, row_bytes = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    num_rows, x, out = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    first = next_task(team) * _GGML_ROWS
    while first < num_rows:
        for row in range(first, min(first + _GGML_ROWS, num_rows)):
            _call_vec_dot(function, n, out + 4 * row, weights + row * row_bytes, x)
        first = next_task(team) * _GGML_ROWS


@kernel
def _clock_kernel(args, thread, team):
    value = types.uint64(load_i64(args))
    for _ in range(CLOCK_CYCLES // 6):  # xorshift: every instruction needs the one before
        value ^= value << types.uint64(13)
        value ^= value >> types.uint64(7)
        value ^= value << types.uint64(17)
    store_i64(args, types.int64(value))


@kernel
def _unpack_kernel(args, thread, team):
    run, matrix, num_rows = load_i64(args), load_i64(args + 8), load_i64(args + 16)
    panel = thread_scratch(run, thread)
    first = next_task(team) * PANEL_ROWS
    while first < num_rows:
        matrix_panel(matrix, first, min(PANEL_ROWS, num_rows - first), panel)
        first = next_task(team) * PANEL_ROWS


def clock_program() -> Program:
    return Program([Op.of(_clock_kernel, 88172645463325252)])


class VecDot(NamedTuple):
    """`vec_dot` as a number, and one activation vector in the form it multiplies."""

    address: int
    x: np.ndarray  # uint8


class Bench:
    """Activations of K values for up to `capacity` tokens, quantized, and the programs that multiply with them."""

    def __init__(self, team: Team, k: int, capacity: int = 1) -> None:
        self.k = k
        self._run = RunTable(capacity, team.num_threads, panel_scratch_bytes(k))
        self.sums = np.zeros((team.num_threads, 16), np.int32)
        self.x = Activations(capacity, k, {32, 256})
        self.x.values[:] = np.random.default_rng(0).standard_normal((capacity, k), np.float32)
        self.set_tokens(capacity)
        team.run(Program([quantize_op(self._run, self.x)]))

    def set_tokens(self, num_tokens: int, num_generated: int | None = None) -> None:
        """How many tokens the programs multiply with from now on: one as in decoding, more as those of a prompt, or so
        many of them as if they were generated."""
        num_generated = int(num_tokens == 1) if num_generated is None else num_generated
        self._run.set_tokens(np.zeros(num_tokens, np.int32), num_generated)

    def read(self, data: np.ndarray) -> Program:
        """data: contiguous; whole tasks of it are read."""
        return read_program(data, self.sums)

    def ours(self, layout: Layout, data: np.ndarray, out: np.ndarray, num_times: int = 1) -> Program:
        """data: uint8 (rows, row_bytes); out: float32 (capacity, rows)."""
        matrix = Matrix.of(data, layout.name, self.k)
        return Program([linear_op(self._run, self.x, Product(matrix, out))] * num_times)

    def ggml(self, vec_dot: VecDot, data: np.ndarray, out: np.ndarray, num_times: int = 1) -> Program:
        """out: float32 (rows,)."""
        op = Op.of(_ggml_kernel, vec_dot.address, self.k, data, data.strides[0], len(data), vec_dot.x, out)
        return Program([op] * num_times)

    def unpack(self, layout: Layout, data: np.ndarray) -> Program:
        """Panels of all rows, one after the other into the same scratch."""
        return Program([Op.of(_unpack_kernel, self._run, Matrix.of(data, layout.name, self.k), len(data))])
