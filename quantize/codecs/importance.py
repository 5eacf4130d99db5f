"""What an importance of zero, or one that is no number, means: unknown, and not worthless.

A text that reaches no token of an expert says nothing about its weights, and encoders that weigh squared errors with
zeros write zeros. So unknown columns count as much as the mean of the known ones of their matrix, and where none is
known all count alike.
"""

import numpy as np


def is_known(values: np.ndarray) -> np.ndarray:
    """Where mean squares say something: finite and above zero. bool, the shape of `values`."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(values) & (values > 0)


def fill_unknown(values: np.ndarray) -> np.ndarray:
    """float32 (matrices, columns) or (columns,), all finite and above zero."""
    known = is_known(values)
    if known.all():
        return values
    count = known.sum(axis=-1, keepdims=True)
    total = np.where(known, values, 0).sum(axis=-1, keepdims=True, dtype=np.float64)
    mean = np.where(count > 0, total / np.maximum(count, 1), 1.0)
    return np.where(known, values, np.maximum(mean, np.finfo(np.float32).tiny)).astype(np.float32)
