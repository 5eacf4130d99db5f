"""Blocks of 32: the scale `d`, some have a minimum `m` (weight = d * code + m), else codes have an offset.

Element j is in the low nibble of byte j of `qs`, element j + 16 in the high one. Bit j of `qh` is bit 4 of code j.
"""

from kimi_lite.native.types.layout import F16, I8, U8, Layout

Q8_0 = Layout("Q8_0", 8, 32, (("d", F16), ("qs", I8, 32)), "block32", 32, encoder="q8_0", is_signed=True)
Q4_0 = Layout("Q4_0", 2, 32, (("d", F16), ("qs", U8, 16)), "block32", 32, encoder="ggml", max_code=15)  # code - 8
Q4_1 = Layout("Q4_1", 3, 32, (("d", F16), ("m", F16), ("qs", U8, 16)), "block32", 32, encoder="ggml", max_code=15)
Q5_0 = Layout(
    "Q5_0", 6, 32, (("d", F16), ("qh", "<u4"), ("qs", U8, 16)), "block32", 32, encoder="ggml", max_code=31
)  # code - 16
Q5_1 = Layout(
    "Q5_1", 7, 32, (("d", F16), ("m", F16), ("qh", "<u4"), ("qs", U8, 16)), "block32", 32, encoder="ggml", max_code=31
)

LAYOUTS = (
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
)
