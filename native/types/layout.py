"""How a block of a GGUF type is drawn, and how kernels treat the type: the columns of the rows in `*/layout.py`."""

from dataclasses import dataclass

import numpy as np

F16, F32, U8, I8 = "<f2", "<f4", "u1", "i1"
_OWN_NUMBERS = 20_000  # far beyond what llama.cpp and its forks give out
QK_K = 256  # weights in a super-block of the K, IQ and TQ types


@dataclass(frozen=True, slots=True)
class Layout:
    """One quantization type: `block_size` weights are stored in the bytes that `fields` draw.

    `fields`: a packed little-endian numpy dtype, named as in ggml's `ggml-common.h`. `ggml_id`: the number stored in
    the file (ggml.h `enum ggml_type`). `product`: the activations it multiplies (`native.cpu.blocks`). `group`: weights
    that share a scale, 1 for floats. `encoder`: the module of `quantize.codecs` that writes it; `ggml` stands for
    ggml's own encoders, "none" for a type that can only be read. `row_scale`: the dtype of a float in front of each row
    that multiplies its weights (F16 or F32), "" for most types.
    """

    name: str
    ggml_id: int
    block_size: int
    fields: tuple[tuple, ...]
    product: str  # "float", "block32", "block256"
    group: int
    encoder: str
    is_signed: bool = False  # codes, in the CPU kernels' common form
    row_scale: str = ""
    max_code: int = 128  # the largest, without its sign, in that form

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

    def offsets(self, *fields: str) -> list[int]:
        """Where these fields begin, in bytes."""
        return [self.dtype.fields[field][1] for field in fields]

    def row_bytes(self, num_weights: int) -> int:
        """Bytes of a row; the caller has checked that `num_weights` is a multiple of `block_size`."""
        assert num_weights % self.block_size == 0, (self.name, num_weights)
        return self.header_bytes + num_weights // self.block_size * self.block_bytes

    def row_weights(self, row_bytes: int) -> int:
        """The weights of a row of so many bytes."""
        assert (row_bytes - self.header_bytes) % self.block_bytes == 0, (self.name, row_bytes)
        return (row_bytes - self.header_bytes) // self.block_bytes * self.block_size

    @property
    def is_ik(self) -> bool:
        """Whether ik_llama.cpp alone has the type; llama.cpp's own libraries read past their tables for its numbers."""
        return 97 <= self.ggml_id < _OWN_NUMBERS

    @property
    def is_own(self) -> bool:
        """Whether kimi-lite alone has the type."""
        return self.ggml_id >= _OWN_NUMBERS

    @property
    def header_bytes(self) -> int:
        """Bytes in front of a row's blocks: its scale."""
        return np.dtype(self.row_scale).itemsize if self.row_scale else 0

    def blocks(self, data: np.ndarray) -> np.ndarray:
        """uint8 (..., row_bytes) as blocks (..., B) of `dtype`, in place."""
        return data[..., self.header_bytes :].view(self.dtype)

    def row_scales(self, data: np.ndarray) -> np.ndarray:
        """The floats (...,) in front of rows uint8 (..., row_bytes), in place; only of a type that has them."""
        return data[..., : self.header_bytes].view(self.row_scale)[..., 0]
