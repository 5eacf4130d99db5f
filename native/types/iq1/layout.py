"""IQ1_S: low index bytes, then 8 x (4 x 3 high index bits, 3-bit scale, sign of the 1/8). IQ1_M: low index bytes, 32 x
(3 high index bits, sign of the 1/8), 4 x (4 x 3-bit scale, a nibble of the float16 d).
"""

from kimi_lite.native.types.layout import F16, QK_K, U8, Layout

IQ1_S = Layout(
    "IQ1_S", 19, QK_K, (("d", F16), ("qs", U8, 32), ("qh", "<u2", 8)), "block256", 32, encoder="ggml", max_code=16
)
IQ1_M = Layout(
    "IQ1_M",
    29,
    QK_K,
    (("qs", U8, 32), ("qh", U8, 16), ("scales", "<u2", 4)),
    "block256",
    16,
    encoder="ggml",
    max_code=18,
)

LAYOUTS = (
    IQ1_S,
    IQ1_M,
)
