"""Blocks; all rows have a float32 scale in front. IQ1_KT: scales with the top bits of the indices, low index bytes, the
nibbles between. IQ2_KT, IQ3_KT: 4-bit scales, indices; in IQ3_KT signs of the weights, a bit plane for each 32. IQ4_KT:
words of a 7-bit scale, the bit that moves all states of its group and the top three bits of 8 indices; low index bytes;
the nibbles between.

ik_llama.cpp's products multiply IQ2_KT by 1.05 and IQ3_KT by 1.01 on top of what its decoder gives; here weights are
what the decoder gives. On the demo model with the experts of one layer in each of the four types that is nearer to the
unquantized model (tools/LOG.md).

Sources: ik_llama.cpp's ggml-common.h for the fields, iqk_quantize.cpp for the formulas.
"""

from kimi_lite.native.types.layout import F32, QK_K, U8, Layout

MULTIPLIER = 0xCBAC1FED  # of the 32-bit state, before each weight
FIRST_STATE = 4096  # that of index 0
CENTRE = 126  # of the sum of four times six bits
SIX_BITS = 0x3F3F3F3F
POWERS = tuple(pow(MULTIPLIER, n, 1 << 32) for n in range(1, 9))  # of the multiplier: what weight n multiplies by

_COMMON = {"group": 32, "encoder": "none", "is_signed": True, "row_scale": F32}
IQ1_KT = Layout("IQ1_KT", 158, QK_K, (("sh", U8, 8), ("ql", U8, 32), ("qh", U8, 16)), "block256", **_COMMON)
IQ2_KT = Layout("IQ2_KT", 153, QK_K, (("scales", U8, 4), ("qs", "<u2", 32)), "block256", **_COMMON)
IQ3_KT = Layout("IQ3_KT", 154, QK_K, (("scales", U8, 4), ("qs", "<u2", 32), ("qh", U8, 32)), "block256", **_COMMON)
IQ4_KT = Layout("IQ4_KT", 155, QK_K, (("qs", "<u4", 8), ("ql", U8, 64), ("qh", U8, 32)), "block256", **_COMMON)

LAYOUTS = (
    IQ1_KT,
    IQ2_KT,
    IQ3_KT,
    IQ4_KT,
)
