"""Which type the weights that every token uses get on a GPU: the one rule, for counting sizes and for loading.

    q8_0, q6_k, q4_k   at most so many bits: what the file holds in fewer stays as it is, the rest is encoded again
    bf16               all of it in bfloat16
    file               exactly as in the file

A type of fewer bits is never widened, because decoding reads bytes: an RTX 4090 has the time for about 30 instructions
while it reads a byte of VRAM, and no type takes more than 30 a weight (`tools/LOG.md` has the table). Rows that are no
whole blocks of a type (MLA's keys have 128 weights) take the next that they are.
"""

from collections.abc import Sequence

from kimi_lite.native.layouts import BY_NAME, Layout

Q8_0, BF16, F32 = BY_NAME["Q8_0"], BY_NAME["BF16"], BY_NAME["F32"]


def dense_layout(dense_type: str, layouts: Sequence[Layout], row: int) -> Layout:
    """The one type that matrices of these types get on the GPU where they lie one behind the other, rows of `row`
    weights; none: values that no file holds."""
    own = layouts[0] if len(set(layouts)) == 1 else None
    if dense_type == "file":
        return own or F32
    if dense_type == "bf16":
        return BF16
    wanted = BY_NAME[dense_type.upper()]
    fitting = next(layout for layout in (wanted, Q8_0, BF16) if row % layout.block_size == 0)
    return own if own and own.bits_per_weight <= fitting.bits_per_weight else fitting
