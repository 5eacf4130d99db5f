"""The vendor's rule for sizes, and what is made of resized pixels.

An image is never enlarged; it shrinks until it has at most so many patches of 14 x 14 in all and along one side, by
Pillow's bicubic filter on uint8, and is padded with black at the right and at the bottom to whole tokens of 28 x 28.
Source: the code for media in the checkpoint of Kimi K2.5.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from kimi_lite.model.vision.patches import PATCH, Grid, Patches

VERSION = 1  # part of every digest: a change of the rule makes other ones
TOKEN_PATCHES = 2  # along one side of what becomes one token
TOKEN = TOKEN_PATCHES * PATCH  # pixels along one side of what becomes one token
MAX_IMAGE_PATCHES = 16384
MAX_FRAME_PATCHES = 4096  # of a video's frame
MAX_SIDE_PATCHES = 512
CHUNK_FRAMES = 4  # consecutive frames that become one run of tokens


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int


def resized(size: Size, max_patches: int = MAX_IMAGE_PATCHES) -> Size:
    """What an image of this size is resized to. The limit is checked before padding, as the vendor does, so that the
    padded image may exceed it a little."""
    width, height = size
    num_patches = max(1, width // PATCH) * max(1, height // PATCH)
    longest = MAX_SIDE_PATCHES * PATCH
    scale = min(1.0, math.sqrt(max_patches / num_patches), longest / width, longest / height)
    return Size(*(min(max(1, int(side * scale)), longest) for side in size))


def padded(size: Size) -> Size:
    """Up to whole tokens."""
    return Size(*(-(-side // TOKEN) * TOKEN for side in size))


def grid_of(size: Size, num_frames: int = 1) -> Grid:
    """Patches of frames that were resized to this size."""
    width, height = padded(size)
    return Grid(num_frames, height // PATCH, width // PATCH)


def to_patches(frames: Sequence[bytes], size: Size) -> Patches:
    """RGB rows of 1 to 4 resized frames of one size -> patches, row-major over (frame, row, column)."""
    assert 1 <= len(frames) <= CHUNK_FRAMES, len(frames)
    grid = grid_of(size, len(frames))
    pixels = np.zeros((grid.t, grid.h * PATCH, grid.w * PATCH, 3), np.uint8)
    for frame, rows in zip(pixels, frames, strict=True):
        frame[: size.height, : size.width] = np.frombuffer(rows, np.uint8).reshape(size.height, size.width, 3)
    tiles = pixels.reshape(grid.t, grid.h, PATCH, grid.w, PATCH, 3)
    tiles = tiles.transpose(0, 1, 3, 5, 2, 4)  # (t, h, w, 3, 14, 14)
    return Patches(np.ascontiguousarray(tiles.reshape(-1, 3, PATCH, PATCH)), grid)


def digest_of(patches: Patches) -> bytes:
    """16 bytes that only equal patches share: what an image is called in caches."""
    digest = blake2b(f"patches {VERSION} {tuple(patches.grid)}".encode(), digest_size=16)
    digest.update(patches.pixels)
    return digest.digest()


def time_stamp(seconds: float) -> str:
    """`00:00:01.500`, as the prompt of a video has it before every chunk."""
    whole = int(seconds)
    return f"{whole // 3600 % 24:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{int(seconds % 1 * 1000):03d}"


def sampled_frames(num_frames: int, frame_rate: float, wanted_rate: float, max_frames: int) -> list[int]:
    """Indices of the frames that are shown: `wanted_rate` a second, evenly over the whole video, at most so many."""
    number = max(round(num_frames * min(wanted_rate, frame_rate) / frame_rate), 1)
    number = min(number, max_frames, num_frames)
    if number == 1:
        return [0]
    step = (num_frames - 1) / (number - 1)  # as numpy's linspace computes it
    return [*(round(i * step) for i in range(number - 1)), num_frames - 1]
