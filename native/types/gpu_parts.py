"""How a GPU thread decodes a GGUF type, and what the families' decoders share.

A block is cut into lanes (one byte of codes, or one code book index) and a lane into planes, its weights. Each type has

    decode(base, first, unit, mask, table, PLANE) -> float32 weights
    column(unit, PLANE) -> the place of that weight in its block

A thread takes a run of neighbouring lanes: `unit` (..., runs, RUN) says which lanes of their blocks, `first` (...,
runs, 1) the first of each run, `base` (..., runs, 1) points to the blocks. What a run has in common, as a scale, is
loaded from `first` and `base` and so once a run; codes are loaded from `unit`, RUN neighbouring bytes in one load. What
the planes of a lane have in common is loaded once too: the compiler merges equal loads. RUN is 4 where blocks and codes
lie at multiples of four bytes, 2 where they lie at even addresses, as in nearly all other types, and 1 for MXFP4's 17
bytes and for code books. Every layout in registers is then the same, [..., runs, RUN] with a thread for each run, and
nothing is exchanged between threads.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from kimi_lite.native.types.layout import Layout


@dataclass(frozen=True, slots=True)
class Decoder:
    """`num_lanes` lanes a block, `num_planes` weights a lane, `run` lanes a thread. `table_name`: of the code book that
    it looks up (`native.gpu.tables`). `is_padded`: some planes hold no weight (column >= block_size)."""

    decode: object
    column: object
    num_lanes: int
    num_planes: int
    run: int
    table_name: str = ""
    is_padded: bool = False


def offsets(layout: Layout, *fields: str) -> list[tl.constexpr]:
    """Where these fields of a block begin, as constants that kernels may use."""
    return [tl.constexpr(offset) for offset in layout.offsets(*fields)]


# Loads of bytes, 16-bit and 32-bit words and float16 scales; words and scales at even addresses


@triton.jit
def byte_at(address, mask):
    """The byte there as int32."""
    return tl.load(address, mask, other=0).to(tl.int32)


@triton.jit
def signed_byte_at(address, mask):
    return tl.load(address.to(tl.pointer_type(tl.int8)), mask, other=0).to(tl.int32)


@triton.jit
def word_at(address, mask):
    """The 16-bit word there as int32; the address is even."""
    return tl.load(address.to(tl.pointer_type(tl.uint16)), mask, other=0).to(tl.int32)


@triton.jit
def double_word_at(address, mask):
    """The 32-bit word there as uint32; the address is even."""
    low = word_at(address, mask).to(tl.uint32)
    return low | (word_at(address + 2, mask).to(tl.uint32) << 16)


@triton.jit
def half_at(address, mask):
    """The float16 there as float32; the address is even."""
    return tl.load(address.to(tl.pointer_type(tl.float16)), mask, other=0.0).to(tl.float32)


@triton.jit
def row_scale(row, HEADER: tl.constexpr):
    """The float32 that multiplies all weights of the row at this address: a float16 or float32, by the bytes that its
    blocks have in front of them; 1 where there are none."""
    if HEADER == 2:
        return tl.load(row.to(tl.pointer_type(tl.float16))).to(tl.float32)
    if HEADER == 4:
        return tl.load(row.to(tl.pointer_type(tl.float32)))
    return tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def float_of_bits(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def turn_sign(value, bit):
    """-value where the lowest bit of `bit` is set."""
    return float_of_bits(value.to(tl.int32, bitcast=True) ^ (bit.to(tl.int32) << 31))


# Where a lane's weights are in their block


@triton.jit
def halves_column(unit, PLANE: tl.constexpr):
    """Low nibbles first, then the high ones: 16 bytes, 32 weights."""
    return unit + 16 * PLANE


@triton.jit
def quarters_column(unit, PLANE: tl.constexpr):
    """Per 32 bytes, four times 32 weights: TQ2_0, Q2_K, Q3_K."""
    return unit // 32 * 128 + PLANE * 32 + unit % 32


@triton.jit
def eight_column(unit, PLANE: tl.constexpr):
    """Eight neighbours a lane: Q1_0 and the code books of eight."""
    return unit * 8 + PLANE


@triton.jit
def four_column(unit, PLANE: tl.constexpr):
    """Four neighbours a lane: Q2_0 and the code books of four."""
    return unit * 4 + PLANE


# Codes and signs


@triton.jit
def nibble_at(address, mask, PLANE: tl.constexpr):
    return (byte_at(address, mask) >> (4 * PLANE)) & 15


@triton.jit
def point_value(point, PLANE: tl.constexpr):
    return ((point >> (8 * PLANE)).to(tl.int32) & 255).to(tl.float32)


@triton.jit
def even_signs(seven):
    """Eight sign bits: seven, and an eighth that makes their number even."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return seven | (parity << 7)


@triton.jit
def even_sign(seven, PLACE):
    """Bit `PLACE` of those."""
    return (even_signs(seven) >> PLACE) & 1


@triton.jit
def nibble_scale(address, group, mask):
    """The 4 bits of one of the groups of 16 (IQ2) or 32 (IQ3_S) weights, two groups a byte."""
    return ((byte_at(address + group // 2, mask) >> (group % 2 * 4)) & 15).to(tl.float32)
