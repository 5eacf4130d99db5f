"""Code books as tensors, made once for each device: what `native.gpu.types.code_books` looks up.

The points come from the `gguf` package, as those of the CPU kernels do (`native.codebooks`).
"""

from functools import cache

import numpy as np
import torch

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


@cache
def table(name: str, device: torch.device) -> torch.Tensor:
    """The table of a code book on a device: IQ4 int8 (16,), IQ1_S int16 (2048,), IQ2 int64 (N,), IQ3 int32 (N,)."""
    return torch.from_numpy(_packed(name)).to(device)


def _packed(name: str) -> np.ndarray:
    if name == "IQ4":
        return _IQ4
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    points = source.grid.reshape(source.grid_shape).astype(np.int64)  # (N, 8 or 4)
    if name == "IQ1_S":
        return ((points + 1) << (2 * np.arange(8))).sum(axis=1).astype(np.uint16).view(np.int16)
    return points.astype(np.uint8).view(np.int64 if points.shape[1] == 8 else np.int32).ravel()
