"""Which decode functions, lanes and planes each GGUF type has on the GPU. `native.gpu.types` says what these are."""

from dataclasses import dataclass
from functools import cache

import torch

from kimi_lite.native.gpu.tables import table
from kimi_lite.native.gpu.types import blocks_of_32 as b32
from kimi_lite.native.gpu.types import code_books as cb
from kimi_lite.native.gpu.types import floats, k_quants, ternary
from kimi_lite.native.layouts import BY_NAME

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Format:
    """`num_lanes` lanes a block, `num_planes` weights a lane, `run` lanes a thread (`native.gpu.types`).

    `is_padded`: some planes hold no weight (column >= block_size).
    """

    name: str
    decode: object
    column: object
    num_lanes: int
    num_planes: int
    run: int
    table_name: str = ""
    is_padded: bool = False

    @property
    def block_size(self) -> int:
        return BY_NAME[self.name].block_size

    @property
    def block_bytes(self) -> int:
        return BY_NAME[self.name].block_bytes

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
    """name -> Format, for all 28 types."""
    found = [
        *(Format(name, floats.float_decode, floats.float_column, 1, 1, 1) for name in FLOATS),
        Format("Q4_0", b32.q4_0_decode, b32.halves_column, 16, 2, 2),
        Format("Q4_1", b32.q4_1_decode, b32.halves_column, 16, 2, 4),
        Format("Q5_0", b32.q5_0_decode, b32.halves_column, 16, 2, 2),
        Format("Q5_1", b32.q5_1_decode, b32.halves_column, 16, 2, 4),
        Format("Q8_0", b32.q8_0_decode, b32.same_column, 32, 1, 2),
        Format("IQ4_NL", b32.iq4_nl_decode, b32.halves_column, 16, 2, 2, "IQ4"),
        Format("MXFP4", b32.mxfp4_decode, b32.halves_column, 16, 2, 1),
        Format("NVFP4", b32.nvfp4_decode, b32.nvfp4_column, 32, 2, 4),
        Format("TQ1_0", ternary.tq1_0_decode, ternary.tq1_0_column, 52, 5, 2, is_padded=True),
        Format("TQ2_0", ternary.tq2_0_decode, ternary.quarters_column, 64, 4, 2),
        Format("Q1_0", ternary.q1_0_decode, ternary.eight_column, 16, 8, 1),
        Format("Q2_0", ternary.q2_0_decode, ternary.four_column, 16, 4, 1),
        Format("Q2_K", k_quants.q2_k_decode, ternary.quarters_column, 64, 4, 4),
        Format("Q3_K", k_quants.q3_k_decode, ternary.quarters_column, 64, 4, 2),
        Format("Q4_K", k_quants.q4_k_decode, k_quants.pairs_column, 128, 2, 4),
        Format("Q5_K", k_quants.q5_k_decode, k_quants.pairs_column, 128, 2, 4),
        Format("Q6_K", k_quants.q6_k_decode, k_quants.q6_k_column, 128, 2, 2),
        Format("IQ4_XS", cb.iq4_xs_decode, cb.iq4_xs_column, 128, 2, 4, "IQ4"),
        Format("IQ1_S", cb.iq1_s_decode, ternary.eight_column, 32, 8, 1, "IQ1_S"),
        Format("IQ1_M", cb.iq1_m_decode, ternary.eight_column, 32, 8, 1, "IQ1_S"),
        Format("IQ2_XXS", cb.iq2_xxs_decode, ternary.eight_column, 32, 8, 1, "IQ2_XXS"),
        Format("IQ2_XS", cb.iq2_xs_decode, ternary.eight_column, 32, 8, 1, "IQ2_XS"),
        Format("IQ2_S", cb.iq2_s_decode, ternary.eight_column, 32, 8, 1, "IQ2_S"),
        Format("IQ3_XXS", cb.iq3_xxs_decode, ternary.four_column, 64, 4, 1, "IQ3_XXS"),
        Format("IQ3_S", cb.iq3_s_decode, ternary.four_column, 64, 4, 1, "IQ3_S"),
    ]
    return {each.name: each for each in found}


def weights_of(data: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 (..., row_bytes) as kernels take it: unchanged, or a float type's own elements (..., k)."""
    assert data.dtype == torch.uint8 and data.stride(-1) == 1, (name, data.dtype, data.stride())
    return data.view(FLOATS[name]) if name in FLOATS else data


def table_for(each: Format, like: torch.Tensor) -> torch.Tensor:
    """The type's code book on the device of `like`; where it has none, `like` itself: never read."""
    return table(each.table_name, like.device) if each.table_name else like
