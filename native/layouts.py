"""Every GGUF block layout, drawn once: used by the CPU and GPU kernels, the reference and the quantizer.

A tensor row is a run of blocks. `fields` draws one block as a packed little-endian numpy dtype, named as in ggml's
`ggml-common.h`; `ggml_id` is the number stored in the file (ggml.h `enum ggml_type`).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Layout:
    """One quantization type: `block_size` weights are stored in `block_bytes` bytes."""

    name: str
    ggml_id: int
    block_size: int
    fields: tuple[tuple, ...]

    @property
    def dtype(self) -> np.dtype:
        """The packed dtype of one block, e.g. Q8_0 -> {d: f2, qs: 32 i1}, 34 bytes."""
        return np.dtype(list(self.fields))

    @property
    def block_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, num_weights: int) -> int:
        """Bytes of a row; the caller has checked that `num_weights` is a multiple of `block_size`."""
        assert num_weights % self.block_size == 0, (self.name, num_weights)
        return num_weights // self.block_size * self.block_bytes


_F16, _U8, _I8 = "<f2", "u1", "i1"
QK_K = 256  # weights in a super-block of the K, IQ and TQ types

LAYOUTS: dict[int, Layout] = {
    layout.ggml_id: layout
    for layout in (
        Layout("F32", 0, 1, (("x", "<f4"),)),
        Layout("F16", 1, 1, (("x", _F16),)),
        Layout("BF16", 30, 1, (("x", "<u2"),)),
        Layout("Q4_0", 2, 32, (("d", _F16), ("qs", _U8, 16))),
        Layout("Q4_1", 3, 32, (("d", _F16), ("m", _F16), ("qs", _U8, 16))),
        Layout("Q5_0", 6, 32, (("d", _F16), ("qh", "<u4"), ("qs", _U8, 16))),
        Layout("Q5_1", 7, 32, (("d", _F16), ("m", _F16), ("qh", "<u4"), ("qs", _U8, 16))),
        Layout("Q8_0", 8, 32, (("d", _F16), ("qs", _I8, 32))),
        Layout("Q2_K", 10, QK_K, (("scales", _U8, 16), ("qs", _U8, 64), ("d", _F16), ("dmin", _F16))),
        Layout("Q3_K", 11, QK_K, (("hmask", _U8, 32), ("qs", _U8, 64), ("scales", _U8, 12), ("d", _F16))),
        Layout("Q4_K", 12, QK_K, (("d", _F16), ("dmin", _F16), ("scales", _U8, 12), ("qs", _U8, 128))),
        Layout("Q5_K", 13, QK_K, (("d", _F16), ("dmin", _F16), ("scales", _U8, 12), ("qh", _U8, 32), ("qs", _U8, 128))),
        Layout("Q6_K", 14, QK_K, (("ql", _U8, 128), ("qh", _U8, 64), ("scales", _I8, 16), ("d", _F16))),
        Layout("IQ2_XXS", 16, QK_K, (("d", _F16), ("qs", "<u2", 32))),
        Layout("IQ2_XS", 17, QK_K, (("d", _F16), ("qs", "<u2", 32), ("scales", _U8, 8))),
        Layout("IQ3_XXS", 18, QK_K, (("d", _F16), ("qs", _U8, 64), ("sas", "<u4", 8))),
        Layout("IQ1_S", 19, QK_K, (("d", _F16), ("qs", _U8, 32), ("qh", "<u2", 8))),
        Layout("IQ4_NL", 20, 32, (("d", _F16), ("qs", _U8, 16))),
        Layout(
            "IQ3_S", 21, QK_K, (("d", _F16), ("qs", _U8, 64), ("qh", _U8, 8), ("signs", _U8, 32), ("scales", _U8, 4))
        ),
        Layout(
            "IQ2_S", 22, QK_K, (("d", _F16), ("qs", _U8, 32), ("signs", _U8, 32), ("qh", _U8, 8), ("scales", _U8, 8))
        ),
        Layout("IQ4_XS", 23, QK_K, (("d", _F16), ("scales_h", "<u2"), ("scales_l", _U8, 4), ("qs", _U8, 128))),
        Layout("IQ1_M", 29, QK_K, (("qs", _U8, 32), ("qh", _U8, 16), ("scales", "<u2", 4))),
        Layout("TQ1_0", 34, QK_K, (("qs", _U8, 48), ("qh", _U8, 4), ("d", _F16))),
        Layout("TQ2_0", 35, QK_K, (("qs", _U8, 64), ("d", _F16))),
        Layout("MXFP4", 39, 32, (("e", _U8), ("qs", _U8, 16))),
        Layout("NVFP4", 40, 64, (("d", _U8, 4), ("qs", _U8, 32))),
        Layout("Q1_0", 41, 128, (("d", _F16), ("qs", _U8, 16))),
        Layout("Q2_0", 42, 64, (("d", _F16), ("qs", _U8, 16))),
    )
}
BY_NAME: dict[str, Layout] = {layout.name: layout for layout in LAYOUTS.values()}
