"""How fast one core decodes and multiplies an own trellis of `tools.quality.rates`: a kernel for AVX-512 with VBMI.

The bits of 64 weights are 13 bytes, those before them the beginning of their windows. One permutation gives each eight
weights a word of 64 bits, vpmultishiftqb cuts 8 bits a weight, of which vpermb looks up six; int32 sums take the scale
of a block of 256 once.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.cpu import dot
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.compiler import Kernel
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.simd import (
    fma_f32x16,
    int_to_f32x16,
    load_f16,
    load_i8x64,
    splat_f32x16,
    store_f32,
    sum_f32x16,
    zero_f32x16,
    zero_i32x16,
)
from kimi_lite.native.simd_bytes import HAS_BYTE_PERMUTES
from kimi_lite.native.simd_dot import dot_u8x64
from kimi_lite.native.types.random_blocks import random_rows
from kimi_lite.native.vectors import call_llvm, constant, i8x64

BLOCK_BYTES = 54  # a float16, then 256 * 13 / 8 bits; the kernel reads up to 64 bytes behind a row's end
_AHEAD = 2  # the bits before the first weight's own are the scale's: windows of up to 16 bits
_SIGNATURE = types.void(*[types.int64] * 5)


def _cutter(schedule: Sequence[int], bits: int, first_bit: int):
    """Makes `f(bytes)`: i8x64 of the windows of 64 weights, those bits of each from `first_bit` on, in a byte's low
    bits."""
    ends = np.cumsum(np.tile(schedule, 8)) + 8 * _AHEAD  # where each weight's window ends, in bits
    starts = ends - bits + first_bit
    words = starts[::8] // 8  # the first byte of the word of eight weights
    chosen = [int(word) + i for word in words for i in range(8)]
    shifts = [int(starts[i]) - 8 * int(words[i // 8]) for i in range(64)]
    assert max(shifts) <= 56 and max(chosen) < 64, (shifts, chosen)

    @intrinsic
    def cut(typingctx, data):
        def codegen(context, builder, sig, args):
            spread = call_llvm(
                builder, "llvm.x86.avx512.permvar.qi.512", i8x64.llvm, [args[0], constant(i8x64, chosen)]
            )
            cut_all = "llvm.x86.avx512.pmultishift.qb.512"
            return call_llvm(builder, cut_all, i8x64.llvm, [constant(i8x64, shifts), spread])

        return i8x64(i8x64), codegen

    return cut


@intrinsic
def _look_up(typingctx, table, windows):
    """The entries of a table of 64 bytes; of a window the low six bits count."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "llvm.x86.avx512.permvar.qi.512", i8x64.llvm, args)

    return i8x64(i8x64, i8x64), codegen


def rows_kernel(schedule: Sequence[int], num_tables: int) -> Kernel:
    """`rows(weights, num_rows, k, arguments, out)` of the products with int8 activations; `arguments` (int64,): their
    address, and that of 64 unsigned bytes for each table."""
    cut_low, cut_high = (_cutter(schedule, 6 * num_tables, 6 * i * (num_tables > 1)) for i in (0, 1))
    is_double = num_tables == 2

    def rows(weights, num_rows, k, x, out):
        tables = x + k
        for row in range(num_rows):
            at, acc = weights + row * (k // 256 * BLOCK_BYTES), zero_f32x16()
            low_table, high_table = load_i8x64(tables), load_i8x64(tables + 64)
            for block in range(k // 256):
                total = zero_i32x16()
                for chunk in range(4):
                    data, codes = load_i8x64(at + 13 * chunk), load_i8x64(x + 256 * block + 64 * chunk)
                    total = dot_u8x64(total, _look_up(low_table, cut_low(data)), codes)
                    if is_double:
                        total = dot_u8x64(total, _look_up(high_table, cut_high(data)), codes)
                acc = fma_f32x16(int_to_f32x16(total), splat_f32x16(load_f16(at)), acc)
                at += BLOCK_BYTES
            store_f32(out + 4 * row, sum_f32x16(acc))

    return Kernel(rows, _SIGNATURE)


def decode_speed(schedule: Sequence[int], num_tables: int, num_rows: int = 128, k: int = 7168) -> float | None:
    """10^9 weights/s of CPU time; None without AVX-512 VBMI."""
    if not HAS_BYTE_PERMUTES:
        return None
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 256, num_rows * (k // 256) * BLOCK_BYTES + 64, np.uint8)
    weights[:-64].reshape(-1, BLOCK_BYTES)[:, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    x, out = rng.integers(-127, 128, k + 128, np.int8), np.zeros(num_rows, np.float32)
    multiply = rows_kernel(schedule, num_tables).compiled.ctypes
    return (
        num_rows
        * k
        / least_cpu_seconds(lambda: multiply(weights.ctypes.data, num_rows, k, x.ctypes.data, out.ctypes.data))
        / 1e9
    )


def stored_speed(name: str, num_rows: int = 128, k: int = 7168) -> float:
    """The same of a type that files have."""
    rng = np.random.default_rng(0)
    weights = random_rows(BY_NAME[name], num_rows, k, k**-0.5, rng)
    x = Activations(1, k, {activation_kind(name)})  # zeros: what they are does not change the time
    out, token = np.zeros((1, num_rows), np.float32), np.zeros(1, np.int32)
    multiply = dot.rows_kernel(name).compiled.ctypes
    arguments = (weights.ctypes.data, weights.shape[1], num_rows, x.address, token.ctypes.data, 1, out.ctypes.data, 0)
    return num_rows * k / least_cpu_seconds(lambda: multiply(*arguments)) / 1e9


def least_cpu_seconds(work: Callable[[], None], rounds: int = 30) -> float:
    """Of a call, the least CPU time of this thread: what other programs take does not count."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(4):
            work()
        found.append((time.thread_time() - start) / 4)
    return min(found)
