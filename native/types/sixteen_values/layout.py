"""Blocks and the two tables of values. Nibbles lie as in Q4_0; in NVFP4 byte j of 8 holds elements j and j + 8."""

from kimi_lite.native.types.layout import F16, QK_K, U8, Layout

IQ4_NL = Layout("IQ4_NL", 20, 32, (("d", F16), ("qs", U8, 16)), "block32", 32, encoder="ggml", is_signed=True)
IQ4_XS = Layout(  # 8 six-bit scales minus 32, 8 x 16 bytes of codes
    *("IQ4_XS", 23, QK_K, (("d", F16), ("scales_h", "<u2"), ("scales_l", U8, 4), ("qs", U8, 128))),
    *("block256", 32),
    encoder="ggml",
    is_signed=True,
)
MXFP4 = Layout(
    "MXFP4", 39, 32, (("e", U8), ("qs", U8, 16)), "block32", 32, encoder="ggml", is_signed=True, max_code=12
)  # e: E8M0
NVFP4 = Layout(
    "NVFP4", 40, 64, (("d", U8, 4), ("qs", U8, 32)), "block32", 16, encoder="ggml", is_signed=True, max_code=12
)  # UE4M3

LAYOUTS = (
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    NVFP4,
)

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FLOAT4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # E2M1, doubled
