"""Types with blocks of 32 weights, float16 scales and codes that are integers: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Eight blocks are multiplied at a time: their scales are gathered into one vector and multiplied by the activations'.
What is the same for a whole block, minima and the codes' offset, then costs one multiplication with the sums of x.
"""

from numba import njit, uint64

from kimi_lite.native.cpu.blocks import dot8x32, implements, unpack
from kimi_lite.native.simd import (
    extend_f32x8,
    fma_f32x16,
    int_to_f32x16,
    join_i8x16,
    join_i8x32,
    load_f16,
    load_f32x8,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    load_u32,
    low_i8x64,
    spread32_0,
    spread32_1,
    spread32_2,
    spread32_3,
    store_f32,
    store_i8x32,
    zero_i32x16,
)
from kimi_lite.native.simd_bytes import bit_fields, twice_each_i8x16, where_bits
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, dot_i8x64, dot_u8x64
from kimi_lite.native.types.blocks_of_32.layout import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from kimi_lite.native.types.gathering import gather_field

_Q8_0_D, _Q8_0_QS = Q8_0.offsets("d", "qs")
_Q4_0_D, _Q4_0_QS = Q4_0.offsets("d", "qs")
_Q4_1_D, _Q4_1_M, _Q4_1_QS = Q4_1.offsets("d", "m", "qs")
_Q5_0_D, _Q5_0_QH = Q5_0.offsets("d", "qh")
_Q5_1_D, _Q5_1_M, _Q5_1_QH = Q5_1.offsets("d", "m", "qh")
_Q8_0_BYTES, _Q4_0_BYTES, _Q4_1_BYTES = Q8_0.block_bytes, Q4_0.block_bytes, Q4_1.block_bytes
_Q5_0_BYTES, _Q5_1_BYTES = Q5_0.block_bytes, Q5_1.block_bytes


@njit
def scaled_chunks(scales, values, p0, p1, p2, p3):
    """values + the int32 products of 4 x 64 weights times the scale of each 32."""
    scales = extend_f32x8(scales)
    values = fma_f32x16(int_to_f32x16(p0), spread32_0(scales), values)
    values = fma_f32x16(int_to_f32x16(p1), spread32_1(scales), values)
    values = fma_f32x16(int_to_f32x16(p2), spread32_2(scales), values)
    return fma_f32x16(int_to_f32x16(p3), spread32_3(scales), values)


# Q8_0

_q8_0_scales = gather_field(Q8_0, "d")

if HAS_FULL_UNSIGNED_DOT:
    _Q8_0_OFFSET = -128.0

    @njit
    def _q8_0_product(blocks, x):
        """codes + 128: the product wants one unsigned factor."""
        codes = join_i8x32(load_i8x32(blocks + _Q8_0_QS), load_i8x32(blocks + _Q8_0_BYTES + _Q8_0_QS))
        return dot_u8x64(zero_i32x16(), codes ^ 128, load_i8x64(x))
else:
    _Q8_0_OFFSET = 0.0

    @njit
    def _q8_0_product(blocks, x):
        codes = join_i8x32(load_i8x32(blocks + _Q8_0_QS), load_i8x32(blocks + _Q8_0_BYTES + _Q8_0_QS))
        return dot_i8x64(zero_i32x16(), codes, load_i8x64(x))


@implements(dot8x32, "Q8_0")
def _q8_0_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _q8_0_scales(blocks) * load_f32x8(x_scales)
    p0, p1 = _q8_0_product(blocks, x), _q8_0_product(blocks + 2 * _Q8_0_BYTES, x + 64)
    p2, p3 = _q8_0_product(blocks + 4 * _Q8_0_BYTES, x + 128), _q8_0_product(blocks + 6 * _Q8_0_BYTES, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * _Q8_0_OFFSET, p0, p1, p2, p3)


@njit
def store_block(codes, scales, minima, values, scale, minimum):
    """One block of 32 in the common form."""
    store_i8x32(codes, values)
    store_f32(scales, scale)
    store_f32(minima, minimum)


@implements(unpack, "Q8_0")
def _q8_0_unpack(name, block, codes, scales, minima):
    store_block(codes, scales, minima, load_i8x32(block + _Q8_0_QS), load_f16(block + _Q8_0_D), 0.0)


# Q4_0

_q4_0_scales = gather_field(Q4_0, "d")
_nibbles = bit_fields(15, 0, 4, 0, 4)


@njit
def nibbles_of_two(first, second):
    """Twice 16 bytes as 64 codes: the low nibbles, then the high ones."""
    return _nibbles(twice_each_i8x16(load_i8x16(first), load_i8x16(second)))


@njit
def nibbles_of_one(address):
    """16 bytes as 32 codes."""
    packed = load_i8x16(address)
    return join_i8x16(packed & 15, packed >> 4)


@njit
def _q4_product(packed, gap, x):
    return dot_u8x64(zero_i32x16(), nibbles_of_two(packed, packed + gap), load_i8x64(x))


@implements(dot8x32, "Q4_0")
def _q4_0_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _q4_0_scales(blocks) * load_f32x8(x_scales)
    qs, gap = blocks + _Q4_0_QS, _Q4_0_BYTES
    p0, p1 = _q4_product(qs, gap, x), _q4_product(qs + 2 * gap, gap, x + 64)
    p2, p3 = _q4_product(qs + 4 * gap, gap, x + 128), _q4_product(qs + 6 * gap, gap, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * -8.0, p0, p1, p2, p3)


@implements(unpack, "Q4_0")
def _q4_0_unpack(name, block, codes, scales, minima):
    scale = load_f16(block + _Q4_0_D)
    store_block(codes, scales, minima, nibbles_of_one(block + _Q4_0_QS), scale, 8 * scale)


# Q4_1

_q4_1_scales, _q4_1_minima = gather_field(Q4_1, "d"), gather_field(Q4_1, "m")


@implements(dot8x32, "Q4_1")
def _q4_1_dot(name, blocks, x, x_scales, sums16, sums32):
    x_scale = load_f32x8(x_scales)
    qs, gap = blocks + _Q4_1_QS, _Q4_1_BYTES
    p0, p1 = _q4_product(qs, gap, x), _q4_product(qs + 2 * gap, gap, x + 64)
    p2, p3 = _q4_product(qs + 4 * gap, gap, x + 128), _q4_product(qs + 6 * gap, gap, x + 192)
    minima = extend_f32x8(_q4_1_minima(blocks) * (x_scale * load_f32x8(sums32)))
    return scaled_chunks(_q4_1_scales(blocks) * x_scale, minima, p0, p1, p2, p3)


@implements(unpack, "Q4_1")
def _q4_1_unpack(name, block, codes, scales, minima):
    store_block(
        codes, scales, minima, nibbles_of_one(block + _Q4_1_QS), load_f16(block + _Q4_1_D), -load_f16(block + _Q4_1_M)
    )


# Q5_0

_q5_0_scales = gather_field(Q5_0, "d")


@njit
def _q5_product(qh, gap, x):
    """64 products; `qh` is the address of the first block's high bits, the nibbles follow."""
    bits = uint64(load_u32(qh)) | (uint64(load_u32(qh + gap)) << uint64(32))
    return dot_u8x64(zero_i32x16(), nibbles_of_two(qh + 4, qh + gap + 4) | where_bits(bits, 16), load_i8x64(x))


@njit
def _five_bits_of_one(address):
    return nibbles_of_one(address + 4) | low_i8x64(where_bits(uint64(load_u32(address)), 16))


@implements(dot8x32, "Q5_0")
def _q5_0_dot(name, blocks, x, x_scales, sums16, sums32):
    scales = _q5_0_scales(blocks) * load_f32x8(x_scales)
    qh, gap = blocks + _Q5_0_QH, _Q5_0_BYTES
    p0, p1 = _q5_product(qh, gap, x), _q5_product(qh + 2 * gap, gap, x + 64)
    p2, p3 = _q5_product(qh + 4 * gap, gap, x + 128), _q5_product(qh + 6 * gap, gap, x + 192)
    return scaled_chunks(scales, extend_f32x8(scales * load_f32x8(sums32)) * -16.0, p0, p1, p2, p3)


@implements(unpack, "Q5_0")
def _q5_0_unpack(name, block, codes, scales, minima):
    scale = load_f16(block + _Q5_0_D)
    store_block(codes, scales, minima, _five_bits_of_one(block + _Q5_0_QH), scale, 16 * scale)


# Q5_1

_q5_1_scales, _q5_1_minima = gather_field(Q5_1, "d"), gather_field(Q5_1, "m")


@implements(dot8x32, "Q5_1")
def _q5_1_dot(name, blocks, x, x_scales, sums16, sums32):
    x_scale = load_f32x8(x_scales)
    qh, gap = blocks + _Q5_1_QH, _Q5_1_BYTES
    p0, p1 = _q5_product(qh, gap, x), _q5_product(qh + 2 * gap, gap, x + 64)
    p2, p3 = _q5_product(qh + 4 * gap, gap, x + 128), _q5_product(qh + 6 * gap, gap, x + 192)
    minima = extend_f32x8(_q5_1_minima(blocks) * (x_scale * load_f32x8(sums32)))
    return scaled_chunks(_q5_1_scales(blocks) * x_scale, minima, p0, p1, p2, p3)


@implements(unpack, "Q5_1")
def _q5_1_unpack(name, block, codes, scales, minima):
    store_block(
        codes,
        scales,
        minima,
        _five_bits_of_one(block + _Q5_1_QH),
        load_f16(block + _Q5_1_D),
        -load_f16(block + _Q5_1_M),
    )
