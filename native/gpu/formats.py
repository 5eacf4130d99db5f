"""The decoder of every GGUF type on the GPU, from `native.types`, as kernels take it."""

from dataclasses import dataclass, fields
from functools import cache

import torch

from kimi_lite.native.gpu.tables import table
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.families import parts
from kimi_lite.native.types.gpu_parts import Decoder

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Format(Decoder):
    """A type's decoder with what kernels want to know of its blocks."""

    name: str = ""

    @property
    def block_size(self) -> int:
        return BY_NAME[self.name].block_size

    @property
    def block_bytes(self) -> int:
        return BY_NAME[self.name].block_bytes

    @property
    def header_bytes(self) -> int:
        return BY_NAME[self.name].header_bytes

    def constants(self, prefix: str = "") -> dict:
        """The compile-time arguments that every kernel over this type takes; kernels over two types tell them by
        prefix."""
        found = {
            "DECODE": self.decode,
            "COLUMN": self.column,
            "LANES": self.num_lanes,
            "PLANES": self.num_planes,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_BYTES": self.block_units,
            "HEADER": self.header_bytes,
            "RUN": self.run,
            "IS_PADDED": self.is_padded,
        }
        return {prefix + name: value for name, value in found.items()}

    @property
    def block_units(self) -> int:
        """How far apart blocks are for a pointer as `weights_of` gives it: bytes, or elements of a float type."""
        return 1 if self.name in FLOATS else self.block_bytes

    @property
    def align(self) -> int:
        """The unit, in what pointers count, that row strides and offsets are given in: tells the compiler that they are
        even."""
        return 1 if self.name in FLOATS else self.run

    def units(self, num_bytes: int) -> int:
        """Bytes -> multiples of `align`."""
        unit_bytes = self.block_bytes if self.name in FLOATS else self.run
        assert num_bytes % unit_bytes == 0, (self.name, num_bytes)
        return num_bytes // unit_bytes


@cache
def formats() -> dict[str, Format]:
    """name -> Format, for all types."""
    return {
        name: Format(**_fields(decoder), name=name) for part in parts("gpu") for name, decoder in part.DECODERS.items()
    }


def _fields(decoder: Decoder) -> dict:
    return {field.name: getattr(decoder, field.name) for field in fields(decoder)}


def weights_of(data: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 (..., row_bytes) as kernels take it: unchanged, or a float type's own elements (..., k)."""
    assert data.dtype == torch.uint8 and data.stride(-1) == 1, (name, data.dtype, data.stride())
    return data.view(FLOATS[name]) if name in FLOATS else data


def table_for(each: Format, like: torch.Tensor) -> torch.Tensor:
    """The type's code book on the device of `like`; where it has none, `like` itself: never read."""
    return table(each.table_name, like.device) if each.table_name else like
