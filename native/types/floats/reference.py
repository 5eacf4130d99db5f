"""The decode formulas, as ggml has them (ggml-quants.c, dequantize_row_*)."""

import numpy as np


def _bf16(b):
    return (b["x"].astype(np.uint32) << 16).view(np.float32)[:, None]


DECODERS = {
    "F32": lambda b: b["x"][:, None],
    "F16": lambda b: b["x"].astype(np.float32)[:, None],
    "BF16": _bf16,
}
