"""What the exact products on the GPU share: four codes a word, int8 dot products, and the spans of blocks of 32.

A type's `gpu_exact.py` has one function for each of its types,

    values(base, x, steps, sums, limit, lane, table, BIAS, HALF) -> float32 (ROWS, 8)

the lanes 8 * HALF .. 8 * HALF + 7 of what `dot256` or `dot8x32` of `native/types/*/cpu.py` returns, bit for bit. Lane l
of 16 has the columns 64 k + 4 l .. 64 k + 4 l + 3 of 256, for k = 0 .. 3. `base` (ROWS, 1) points to the block, or to
the first of a span of 256 weights; x: to the span's int8 activations as int32 words, from the half's first on (word
16 k + lane); steps (1, 1): to their float32 scales, one per 32 (blocks of 32 and more); sums: to the int32 sums of each
16 of them; limit int32 (1, 1): how many groups of 32 the row still has; lane int32 (1, 8), 0 .. 7; BIAS:
`native.isa.SumOrder.bias`.
"""

import triton
import triton.language as tl

from kimi_lite.native.gpu.support import is_interpreted
from kimi_lite.native.types.gpu_parts import half_at, word_at

_HAS_DP4A = tl.constexpr(not is_interpreted())  # exact integers: the interpreter's sums are the same


@triton.jit
def word2(address, mask):
    """The 32 bits there as int32; the address is even."""
    return word_at(address, mask) | (word_at(address + 2, mask) << 16)


@triton.jit
def word4(address):
    """The 32 bits there as int32; the address is a multiple of four."""
    return tl.load(address.to(tl.pointer_type(tl.int32)))


@triton.jit
def byte_of(word, PLACE: tl.constexpr):
    """int32, 0 .. 255."""
    return (word >> (8 * PLACE)) & 255


@triton.jit
def dot4(codes, x, IS_SIGNED: tl.constexpr = False):
    """int32: the sum of four products of bytes, those of `x` signed, those of `codes` unsigned or signed."""
    codes, x = tl.broadcast(codes, x)
    if _HAS_DP4A:
        if IS_SIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [codes, x], dtype=tl.int32, is_pure=True, pack=1
            )
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, 0;", "=r,r,r", [codes, x], dtype=tl.int32, is_pure=True, pack=1
        )
    place = 24 - 8 * tl.arange(0, 4)[None, None, :]
    wide = codes[:, :, None] << place  # the byte is the highest one
    code = wide >> 24
    return tl.sum((code if IS_SIGNED else code & 255) * ((x[:, :, None] << place) >> 24), 2)


@triton.jit
def bits_to_bytes(four):
    """Bits 0 .. 3 as the lowest bits of four bytes."""
    return (four * 0x00204081) & 0x01010101


@triton.jit
def negated(codes, signs):
    """Four signed bytes: `codes`, none of them zero, negative where the bit of `signs` is set."""
    ones = bits_to_bytes(signs & 15)
    return (codes ^ (ones * 255)) + ones


@triton.jit
def sum_of_32(sums, group):
    """int32: the sum of the activations of a group of 32."""
    return tl.load(sums + 2 * group) + tl.load(sums + 2 * group + 1)


@triton.jit
def span_values(
    base, x, steps, sums, limit, lane, table, BIAS: tl.constexpr, HALF: tl.constexpr, CODES: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    IS_SIGNED: tl.constexpr = False,
):  # fmt: skip
    """Of types whose blocks have one scale and whose codes are OFFSET too large.

    CODES(block, part, lane, mask, table, BIAS): four codes of the `part`-th 32 weights of a block; SCALE(block, mask).
    """
    value = first_values(base, steps, sums, limit, lane, HALF, SCALE, OFFSET, BLOCK_SIZE, BLOCK_BYTES)
    for chunk in tl.static_range(4):
        group = 2 * chunk + HALF
        block, mask = base + group * 32 // BLOCK_SIZE * BLOCK_BYTES, limit > group
        codes = CODES(block, group % (BLOCK_SIZE // 32), lane, mask, table, BIAS)
        total = dot4(codes, tl.load(x + 16 * chunk + lane, mask, other=0), IS_SIGNED)
        scale = SCALE(block, mask) * tl.load(steps + group, mask, other=0.0)
        value = tl.fma(total.to(tl.float32), scale + tl.zeros_like(value), value)
    return value


@triton.jit
def first_values(
    base, steps, sums, limit, lane, HALF: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Lane l < 8: minus OFFSET times the scaled sum of the l-th group of 32."""
    value = tl.zeros((base.shape[0], lane.shape[1]), tl.float32)
    if HALF == 0:
        mask = lane < limit
        scale = SCALE(base + lane * 32 // BLOCK_SIZE * BLOCK_BYTES, mask) * tl.load(steps + lane, mask, other=0.0)
        value = scale * sum_of_32(sums, tl.minimum(lane, limit - 1)).to(tl.float32) * (-OFFSET)
    return value


@triton.jit
def d_first(block, mask):
    """The float16 at the beginning of a block."""
    return half_at(block, mask)
