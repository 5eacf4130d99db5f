"""Super-blocks of 256. Scales and minima: nibbles for every 16 weights (Q2_K), 16 of six bits minus 32 (Q3_K), 8 of six
bits each (Q4_K, Q5_K), int8 for every 16 (Q6_K).

Codes of Q2_K and Q3_K: bits 0..1 of 32 bytes, then bits 2..3, ..., then of the next 32; bit 2 of Q3_K's is in `hmask`,
one bit a group of 32, and they count from -4. Q4_K, Q5_K: 32 low nibbles, 32 high ones; bit k of byte l of `qh` belongs
to code l of group k. Q6_K: low nibbles in `ql`, two bits in `qh`, counted from -32.
"""

from kimi_lite.native.types.layout import F16, I8, QK_K, U8, Layout

Q2_K = Layout(
    *("Q2_K", 10, QK_K, (("scales", U8, 16), ("qs", U8, 64), ("d", F16), ("dmin", F16))),
    "block256",
    16,
    encoder="ggml",
    max_code=3,
)
Q3_K = Layout(
    *("Q3_K", 11, QK_K, (("hmask", U8, 32), ("qs", U8, 64), ("scales", U8, 12), ("d", F16))),
    *("block256", 16),
    encoder="ggml",
    max_code=7,
)
Q4_K = Layout(
    *("Q4_K", 12, QK_K, (("d", F16), ("dmin", F16), ("scales", U8, 12), ("qs", U8, 128))),
    *("block256", 32),
    encoder="ggml",
    max_code=15,
)
Q5_K = Layout(
    *("Q5_K", 13, QK_K, (("d", F16), ("dmin", F16), ("scales", U8, 12), ("qh", U8, 32), ("qs", U8, 128))),
    *("block256", 32),
    encoder="ggml",
    max_code=31,
)
Q6_K = Layout(
    *("Q6_K", 14, QK_K, (("ql", U8, 128), ("qh", U8, 64), ("scales", I8, 16), ("d", F16))),
    *("block256", 16),
    encoder="ggml",
    max_code=63,
)

LAYOUTS = (
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
)
