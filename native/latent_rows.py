"""The sizes of latent attention, and how one position of its cache lies in memory, for every dtype: drawn once for
kernels, cache, planner and GPU.

A row is the position's `latent` values: the normed latent and the rotated key. f32, f16 and bf16 store them as they
are; q8 stores an int8 code for each, then a float16 scale per 32 values (the last group may be shorter):

    | latent int8 codes | ceil(latent / 32) float16 scales |        value = code * scale of its 32

Kimi K2.5's 576 values take 612 bytes, 1.0625 a value.
"""

from typing import NamedTuple

import numpy as np

PAGE_TOKENS = 64  # positions in one page
GROUP_VALUES = 32  # values that share a scale


class MlaShape(NamedTuple):
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in values."""

    heads: int
    nope: int  # of a head's query and key, without rotation
    rope: int  # rotated
    kv_lora: int  # of a position's latent
    value: int  # of a head

    @property
    def latent(self) -> int:
        """Values of a cached row."""
        return self.kv_lora + self.rope


class RowForm(NamedTuple):
    """`storage`: the numpy type of the storage's last axis; sizes in bytes."""

    storage: np.dtype
    value_bytes: int
    scale_bytes: int  # of a group; 0: no scales


ROW_FORMS = {
    "f32": RowForm(np.dtype(np.float32), 4, 0),
    "f16": RowForm(np.dtype(np.float16), 2, 0),
    "bf16": RowForm(np.dtype(np.uint16), 2, 0),  # bit patterns
    "q8": RowForm(np.dtype(np.uint8), 1, 2),
}


def row_bytes(dtype: str, latent: int) -> int:
    """Bytes of one position in one layer."""
    form = ROW_FORMS[dtype]
    return latent * form.value_bytes + -(-latent // GROUP_VALUES) * form.scale_bytes


def row_length(dtype: str, latent: int) -> int:
    """Length of the storage's last axis, in elements of its type."""
    return row_bytes(dtype, latent) // ROW_FORMS[dtype].storage.itemsize
