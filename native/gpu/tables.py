"""Code books as tensors, made once for each GPU: what the decoders of `native.types` look up."""

from functools import cache

import numpy as np
import torch

from kimi_lite.native.types.code_books import code_book
from kimi_lite.native.types.sixteen_values.layout import IQ4_VALUES
from kimi_lite.native.types.two_tables.layout import VALUES


@cache
def table(name: str, device: torch.device) -> torch.Tensor:
    """The table of a code book on a device: IQ4 and IQ2_K to IQ6_K int8 (4 .. 64,), IQ1_S int16 (2048,), IQ2
    int64 (N,), IQ3 int32 (N,)."""
    return torch.from_numpy(_packed(name)).to(device)


def _packed(name: str) -> np.ndarray:
    if name == "IQ4":
        return np.array(IQ4_VALUES, np.int8)
    if name in VALUES:
        return np.array(VALUES[name], np.int8)
    points = code_book(name)  # (N, 8 or 4)
    if name == "IQ1_S":
        return ((points + 1) << (2 * np.arange(8))).sum(axis=1).astype(np.uint16).view(np.int16)
    return points.astype(np.uint8).view(np.int64 if points.shape[1] == 8 else np.int32).ravel()
