"""Loads out of blocks: bytes, 16-bit and 32-bit words and float16 scales at even addresses."""

import triton
import triton.language as tl


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
def float_of_bits(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def turn_sign(value, bit):
    """-value where the lowest bit of `bit` is set."""
    return float_of_bits(value.to(tl.int32, bitcast=True) ^ (bit.to(tl.int32) << 31))
