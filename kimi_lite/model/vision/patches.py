"""What preprocessing hands to the tower: the patches of one item.

An item is an image (t = 1) or a chunk of up to 4 frames of a video. Every patch of an item attends to every other, and
to none of another item.
"""

from typing import NamedTuple

import numpy as np

PATCH = 14  # pixels along one side: MoonViT has no other


class EncodingStopped(Exception):
    """`VisionTower.encode` stopped between layers because `should_stop()` said so."""


class Grid(NamedTuple):
    """Patches of an item: frames, rows, columns."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w

    def num_tokens(self, merge: int = 2) -> int:
        """What the model reads: merge x merge patches become one token, and all frames of a chunk are averaged."""
        return (self.h // merge) * (self.w // merge)


class Patches(NamedTuple):
    """One item, resized and padded as the published rule says; the tower normalizes, by the numbers of its file."""

    pixels: np.ndarray  # uint8 (t * h * w, 3, 14, 14): RGB, row-major over (t, h, w)
    grid: Grid
