"""Q1_0: weight = d or -d, by the bit. Q2_0: byte j of `qs` holds elements 4 j .. 4 j + 3, code - 1."""

from kimi_lite.native.types.layout import F16, U8, Layout

Q1_0 = Layout("Q1_0", 41, 128, (("d", F16), ("qs", U8, 16)), "block32", 32, encoder="ggml")
Q2_0 = Layout("Q2_0", 42, 64, (("d", F16), ("qs", U8, 16)), "block32", 32, encoder="two_bits")

LAYOUTS = (
    Q1_0,
    Q2_0,
)
