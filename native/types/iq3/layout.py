"""IQ3_XXS: 64 indices, 8 x (4 x 7 sign bits and a 4-bit scale); magnitudes 4, 12, .. 52, 62 of d / 4. IQ3_S: low index
bytes, 64 high index bits, signs, 8 nibbles of scales; odd magnitudes up to 15 of d.
"""

from kimi_lite.native.types.layout import F16, QK_K, U8, Layout

IQ3_XXS = Layout(
    *("IQ3_XXS", 18, QK_K, (("d", F16), ("qs", U8, 64), ("sas", "<u4", 8))),
    *("block256", 32),
    encoder="ggml",
    is_signed=True,
    max_code=62,
)
IQ3_S = Layout(
    *("IQ3_S", 21, QK_K, (("d", F16), ("qs", U8, 64), ("qh", U8, 8), ("signs", U8, 32), ("scales", U8, 4))),
    *("block256", 32),
    encoder="ggml",
    is_signed=True,
    max_code=15,
)

LAYOUTS = (
    IQ3_XXS,
    IQ3_S,
)
