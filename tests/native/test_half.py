"""float16 conversion: every half there is, and rounding, by instruction and by arithmetic."""

import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kimi_lite.native import half
from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.simd import load_f16x16, load_f32x16, store_f16x16, store_f32x16
from kimi_lite.native.vectors import f32x16


@function("void(int64, int64, int64)")
def _widen(x, out, count):
    for i in range(0, count, 16):
        store_f32x16(out + 4 * i, load_f16x16(x + 2 * i))


@function("void(int64, int64, int64)")
def _narrow(x, out, count):
    for i in range(0, count, 16):
        store_f16x16(out + 2 * i, load_f32x16(x + 4 * i))


@intrinsic
def _widen_by_arithmetic(typingctx, address):
    def codegen(context, builder, sig, args):
        value = builder.load(builder.inttoptr(args[0], ir.VectorType(ir.HalfType(), 16).as_pointer()))
        value.align = 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(half, "has_half_instructions", lambda: False)
            return half.widen_half(builder, value)

    return f32x16(types.int64), codegen


@intrinsic
def _narrow_by_arithmetic(typingctx, value, address):
    def codegen(context, builder, sig, args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(half, "has_half_instructions", lambda: False)
            bits = half.narrow_to_half(builder, args[0])
        builder.store(bits, builder.inttoptr(args[1], bits.type.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(f32x16, types.int64), codegen


@njit("void(int64, int64, int64)")
def _widen_portably(x, out, count):
    for i in range(0, count, 16):
        store_f32x16(out + 4 * i, _widen_by_arithmetic(x + 2 * i))


@njit("void(int64, int64, int64)")
def _narrow_portably(x, out, count):
    for i in range(0, count, 16):
        _narrow_by_arithmetic(load_f32x16(x + 4 * i), out + 2 * i)


@pytest.mark.parametrize("kernel", [_widen, _widen_portably])
def test_every_half_widens_exactly(kernel):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    out = np.empty(65536, np.float32)
    kernel(halves.ctypes.data, out.ctypes.data, len(halves))
    assert np.array_equal(out, halves.astype(np.float32), equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(halves))


@pytest.mark.parametrize("kernel", [_narrow, _narrow_portably])
def test_narrowing_rounds_to_nearest_even(kernel):
    """Every half, the ties between neighbours and what lies just beside them, and random bits, NaN among them."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    special = np.array(
        [65504, 65519.99, 65520, 65535, 65536, 1e10, np.inf, np.nan, 2**-25, 2**-24, 1e-40, 0], np.float32
    )
    anything = np.random.default_rng(1).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    x = np.concatenate(
        [halves, ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(1e9)), special, -ties, -special, anything]
    )
    x = np.resize(x, -(-len(x) // 16) * 16).astype(np.float32)
    out = np.empty(len(x), np.float16)
    kernel(x.ctypes.data, out.ctypes.data, len(x))
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(out, x.astype(np.float16), equal_nan=True)
