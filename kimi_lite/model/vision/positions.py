"""Where patches are: the learned table resampled to an image's grid, offsets of frames, turns of queries and keys."""

import numpy as np

from kimi_lite.arch.moonvit import ROPE_BASE, MoonViT, RowOrder
from kimi_lite.model.vision.patches import Grid

_CUBIC = np.float32(-0.75)  # PyTorch's bicubic; Pillow's is -0.5


def position_rows(table: np.ndarray, grid: Grid) -> np.ndarray:
    """table: float32 (H, W, D) -> float32 (t * h * w, D), what is added to the patches of an item.

    The table is resampled as torch.nn.functional.interpolate(mode="bicubic", align_corners=False) does, every frame has
    the same; where there are several, each has its `frame_offsets`.
    """
    spatial = table
    if (grid.h, grid.w) != table.shape[:2]:
        spatial = _resample(_resample(table, grid.w, axis=1), grid.h, axis=0)
    spatial = spatial.reshape(1, grid.h * grid.w, -1)
    if grid.t == 1:
        return spatial[0]
    return (spatial + frame_offsets(grid.t, table.shape[2])[:, None]).reshape(grid.num_patches, -1)


def frame_offsets(num_frames: int, hidden: int) -> np.ndarray:
    """float32 (t, D): sines, then cosines, of the frame's number times 10000^(-2 i / D)."""
    angles = np.arange(num_frames)[:, None] * ROPE_BASE ** (-2 * np.arange(hidden // 2) / hidden)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _resample(table: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Four taps an output, in float32 as PyTorch computes them; beyond the edge the edge is repeated."""
    have = table.shape[axis]
    scale = np.float32(have) / np.float32(size)
    place = (float(scale) * (np.arange(size) + 0.5) - 0.5).astype(np.float32)  # rounded once, as a fused multiply-add
    first = np.floor(place)
    t = place - first
    a, one = _CUBIC, np.float32(1)
    taps = (_outer(t + one, a), _inner(t, a), _inner(one - t, a), _outer(np.float32(2) - t, a))
    shape = [1] * table.ndim
    shape[axis] = size
    result = None
    for offset, weight in zip(range(-1, 3), taps, strict=True):
        index = np.clip(first.astype(np.int64) + offset, 0, have - 1)
        part = np.take(table, index, axis) * weight.reshape(shape)
        result = part if result is None else result + part
    return result


def _inner(x: np.ndarray, a: np.float32) -> np.ndarray:
    """The cubic kernel of a tap at most one step away (Keys 1981)."""
    return ((a + np.float32(2)) * x - (a + np.float32(3))) * x * x + np.float32(1)


def _outer(x: np.ndarray, a: np.float32) -> np.ndarray:
    """Of a tap one to two steps away."""
    return ((a * x - np.float32(5) * a) * x + np.float32(8) * a) * x - np.float32(4) * a


def rope_angles(tower: MoonViT, grid: Grid, order: RowOrder) -> np.ndarray:
    """float64 (t * h * w, head_dim / 2): by how much each pair of neighbours in a head turns.

    Half of the pairs turn by the patch's column, half by its row, with the same frequencies, 10000^(-4 i / head_dim).
    Frames do not turn.
    """
    rows, columns = np.divmod(np.arange(grid.h * grid.w), grid.w)
    frequencies = ROPE_BASE ** (-4 * np.arange(tower.head_dim // 4) / tower.head_dim)
    by_column, by_row = columns[:, None] * frequencies, rows[:, None] * frequencies
    axis = 1 if order == "columns first" else 2
    joined = np.stack([by_column, by_row], axis=axis).reshape(len(rows), -1)
    return np.tile(joined, (grid.t, 1))
