"""Q1_0: weight = d or -d, by the bit. Q2_0: byte j of `qs` holds elements 4 j .. 4 j + 3, code - 1.

LITE2_128 is kimi-lite's own, and no other program reads it: Q2_0's codes with one scale for 128 weights, 2.125 bits, as
GSQ's checkpoints have them. Its number is far from those that llama.cpp and its forks give out.
"""

from kimi_lite.native.types.layout import F16, U8, Layout

Q1_0 = Layout("Q1_0", 41, 128, (("d", F16), ("qs", U8, 16)), "block32", 32, encoder="ggml", max_code=2)
Q2_0 = Layout("Q2_0", 42, 64, (("d", F16), ("qs", U8, 16)), "block32", 32, encoder="two_bits", max_code=3)

LITE2_128 = Layout(
    "LITE2_128", 20_128, 128, (("d", F16), ("qs", U8, 32)), "block32", 32, encoder="two_bits", max_code=3
)

LAYOUTS = (
    Q1_0,
    Q2_0,
    LITE2_128,
)
