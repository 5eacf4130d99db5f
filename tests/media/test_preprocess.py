"""The published rule: sizes against the reference's table and transformers' own function, pixels against torch."""

import ast
import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.media.image import resize
from kimi_lite.media.preprocess import (
    MAX_FRAME_PATCHES,
    MAX_IMAGE_PATCHES,
    Size,
    digest_of,
    grid_of,
    padded,
    resized,
    sampled_frames,
    time_stamp,
    to_patches,
)
from tests.media.pictures import Image, pixels

TABLE = [  # (width, height), resized, padded, tokens of an image, of a video's chunk: the reference's examples
    ((28, 28), (28, 28), (28, 28), 1, 1),
    ((224, 224), (224, 224), (224, 224), 64, 64),
    ((100, 50), (100, 50), (112, 56), 8, 8),
    ((640, 480), (640, 480), (644, 504), 414, 414),
    ((1024, 768), (1024, 768), (1036, 784), 1036, None),
    ((1920, 1080), (1920, 1080), (1932, 1092), 2691, 1032),
    ((3000, 3000), (1794, 1794), (1820, 1820), 4225, 1089),
    ((4000, 3000), (2073, 1554), (2100, 1568), 4200, 1036),
    ((4096, 2160), (2472, 1303), (2492, 1316), 4183, 1080),
    ((8000, 100), (7168, 89), (7168, 112), 1024, None),
    ((1, 1), (1, 1), (28, 28), 1, 1),
]


@pytest.mark.parametrize(("size", "small", "whole", "num_tokens", "num_chunk_tokens"), TABLE)
def test_the_reference_s_sizes(size, small, whole, num_tokens: int, num_chunk_tokens: int | None) -> None:
    assert resized(Size(*size)) == small
    assert padded(resized(Size(*size))) == whole
    assert grid_of(resized(Size(*size))).num_tokens() == num_tokens
    if num_chunk_tokens is not None:
        frame = resized(Size(*size), MAX_FRAME_PATCHES)
        assert grid_of(frame, num_frames=3).num_tokens() == num_chunk_tokens


def vendor_function():
    """`navit_resize` out of transformers' file, which as a whole needs torchvision."""
    spec = importlib.util.find_spec("transformers")
    path = Path(spec.origin).parent / "models/kimi_k25/image_processing_kimi_k25.py" if spec else Path("none")
    if not path.is_file():
        pytest.skip("transformers has no kimi_k25 here")
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "navit_resize"]
    names: dict = {"math": math}
    exec(compile(ast.Module(found, []), str(path), "exec"), names)
    return names["navit_resize"]


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 20_000), height=st.integers(1, 20_000), limit=st.sampled_from([MAX_IMAGE_PATCHES, 4096, 16])
)
def test_sizes_are_those_of_transformers(width: int, height: int, limit: int) -> None:
    (h, w), (whole_h, whole_w) = vendor_function()(height, width, 14, 2, limit, 512)
    size = resized(Size(width, height), limit)
    assert size == (w, h)
    assert padded(size) == (whole_w, whole_h)
    assert size.width <= width and size.height <= height  # never enlarged


@pytest.mark.parametrize("size", [(640, 480), (300, 301), (90, 1400), (57, 33)])
def test_pixels_are_those_of_an_antialiased_bicubic_filter_on_uint8(size: tuple[int, int]) -> None:
    """torch's filter is another program of the same rule; both round to uint8."""
    image = pixels(*size)
    frame = resize(Image.fromarray(image), max_patches=200)
    assert frame.size == resized(Size(*size), 200)
    channels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
    height_width = (frame.size.height, frame.size.width)
    expected = torch.nn.functional.interpolate(channels, height_width, mode="bicubic", antialias=True)[0]
    found = np.frombuffer(frame.rows, np.uint8).reshape(*height_width, 3).transpose(2, 0, 1)
    assert np.abs(found.astype(int) - expected.numpy().astype(int)).max() <= (1 if frame.size != size else 0)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 100), height=st.integers(1, 100), num_frames=st.integers(1, 4))
def test_patches_are_row_major_over_frames_rows_columns_and_padded_with_black(
    width: int, height: int, num_frames: int
) -> None:
    frames = [pixels(width, height, seed) for seed in range(num_frames)]
    patches = to_patches([frame.tobytes() for frame in frames], Size(width, height))
    whole = padded(Size(width, height))
    canvas = torch.zeros(num_frames, 3, whole.height, whole.width, dtype=torch.uint8)
    for one, frame in zip(canvas, frames, strict=True):
        one[:, :height, :width] = torch.from_numpy(frame).permute(2, 0, 1)
    tiles = canvas.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 14, 14)
    assert np.array_equal(patches.pixels, tiles.numpy())
    assert patches.grid == (num_frames, whole.height // 14, whole.width // 14)


def test_only_equal_patches_have_equal_digests() -> None:
    black, wide = bytes(28 * 28 * 3), bytes(56 * 28 * 3)
    same = [to_patches([black], Size(28, 28)), to_patches([bytes(3)], Size(1, 1))]  # padded to the same
    others = [
        to_patches([wide], Size(56, 28)),
        to_patches([wide], Size(28, 56)),
        to_patches([black] * 2, Size(28, 28)),
        to_patches([b"\1" + black[1:]], Size(28, 28)),
    ]
    assert digest_of(same[0]) == digest_of(same[1])
    assert len({digest_of(each) for each in (same[0], *others)}) == 5


@settings(max_examples=300, deadline=None)
@given(
    num_frames=st.integers(1, 3000),
    rate=st.floats(0.1, 240, allow_nan=False),
    wanted=st.floats(0.1, 60),
    most=st.integers(1, 500),
)
def test_frames_are_sampled_as_numpy_s_linspace_does(num_frames: int, rate: float, wanted: float, most: int) -> None:
    number = min(max(round(num_frames * min(wanted, rate) / rate), 1), most, num_frames)
    expected = np.linspace(0, num_frames - 1, number).round().astype(int).tolist()
    assert sampled_frames(num_frames, rate, wanted, most) == expected


@given(st.floats(0, 86_399.999))
def test_time_stamps_are_transformers(seconds: float) -> None:
    expected = time.strftime("%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}"
    assert time_stamp(seconds) == expected
