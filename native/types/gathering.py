"""Fields of consecutive blocks, gathered into one vector."""

from kimi_lite.native.simd_scales import gather_f16, gather_u8
from kimi_lite.native.types.layout import Layout


def gather_field(layout: Layout, field: str):
    """Makes `f(blocks)`: the float16 `field` of every 32 of 256 weights as f32x8, a block's once for each 32 of it."""
    return gather_f16(*_offsets(layout, field))


def gather_bytes(layout: Layout, field: str):
    """Makes `f(blocks)`: the byte `field` of every 32 of 256 weights as i8x16, then zeros."""
    return gather_u8(*_offsets(layout, field))


def _offsets(layout: Layout, field: str) -> list[int]:
    [first] = layout.offsets(field)
    return [first + layout.block_bytes * (32 * i // layout.block_size) for i in range(8)]
