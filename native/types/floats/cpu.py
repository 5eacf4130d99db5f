"""F32, F16, BF16: 16 weights as float32 lanes."""

from kimi_lite.native.cpu.blocks import implements, load16
from kimi_lite.native.simd import load_bf16x16, load_f16x16, load_f32x16


@implements(load16, "F32")
def _f32(name, address):
    return load_f32x16(address)


@implements(load16, "F16")
def _f16(name, address):
    return load_f16x16(address)


@implements(load16, "BF16")
def _bf16(name, address):
    return load_bf16x16(address)
