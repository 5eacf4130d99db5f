"""The points of the IQ types, from the `gguf` package, which is imported when they are first asked for."""

from functools import cache

import numpy as np


@cache
def code_book(name: str) -> np.ndarray:
    """int64 (N, 8 or 4), as ggml has them: -1, 0, 1 for IQ1_S, magnitudes for IQ2 and IQ3."""
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    points = source.grid.reshape(source.grid_shape).astype(np.int64)
    points.flags.writeable = False
    return points
