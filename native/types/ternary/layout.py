"""TQ1_0: five digits of base 3 a byte (`qs`: 32 bytes of 5 x 32, then 16 of 5 x 16), four in `qh` (4 x 4). A byte b
holds its digits as those of the fraction b / 256, most significant first: digit n is floor(3 * ((b * 3^n) mod 256) /
256). TQ2_0: two groups of 32 bytes, 4 x 32 codes of two bits each. Both: code - 1.
"""

from kimi_lite.native.types.layout import F16, QK_K, U8, Layout

TQ1_0 = Layout(
    "TQ1_0", 34, QK_K, (("qs", U8, 48), ("qh", U8, 4), ("d", F16)), "block256", 32, encoder="ternary", max_code=2
)
TQ2_0 = Layout("TQ2_0", 35, QK_K, (("qs", U8, 64), ("d", F16)), "block256", 32, encoder="two_bits", max_code=3)

LAYOUTS = (
    TQ1_0,
    TQ2_0,
)
