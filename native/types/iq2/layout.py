"""IQ2_XXS: 8 x (4 indices, 4 x 7 sign bits and a 4-bit scale). IQ2_XS: 32 x (9-bit index, 7 sign bits), 16 nibbles of
scales. IQ2_S: low index bytes, signs, 32 x 2 high index bits, 16 nibbles of scales. Magnitudes 8, 25, 43 of d / 8.
"""

from kimi_lite.native.types.layout import F16, QK_K, U8, Layout

IQ2_XXS = Layout(
    "IQ2_XXS", 16, QK_K, (("d", F16), ("qs", "<u2", 32)), "block256", 32, encoder="ggml", is_signed=True, max_code=43
)
IQ2_XS = Layout(
    *("IQ2_XS", 17, QK_K, (("d", F16), ("qs", "<u2", 32), ("scales", U8, 8))),
    *("block256", 16),
    encoder="ggml",
    is_signed=True,
    max_code=43,
)
IQ2_S = Layout(
    *("IQ2_S", 22, QK_K, (("d", F16), ("qs", U8, 32), ("signs", U8, 32), ("qh", U8, 8), ("scales", U8, 8))),
    *("block256", 16),
    encoder="ggml",
    is_signed=True,
    max_code=43,
)

LAYOUTS = (
    IQ2_XXS,
    IQ2_XS,
    IQ2_S,
)
