"""Positions beside PyTorch's interpolation and complex numbers."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kimi_lite.arch.moonvit import MoonViT
from kimi_lite.model.vision.patches import Grid
from kimi_lite.model.vision.positions import frame_offsets, position_rows, rope_angles

SIZES = st.integers(1, 90)


@settings(max_examples=40, phases=(Phase.generate,), deadline=None, derandomize=True)
@given(SIZES, SIZES, st.integers(2, 64), st.integers(2, 64))
def test_table_is_resampled_as_pytorch_does(h, w, height, width):
    table = np.random.default_rng(h).standard_normal((height, width, 16)).astype(np.float32)
    channels = torch.from_numpy(table).permute(2, 0, 1)[None]
    want = torch.nn.functional.interpolate(channels, (h, w), mode="bicubic")[0].permute(1, 2, 0).reshape(h * w, 16)
    assert (
        np.abs(position_rows(table, Grid(1, h, w)) - want.numpy()).max() < 2e-5
    )  # the places of taps are rounded to float32


def test_frames_have_offsets_where_there_are_several():
    """The published vector: the second frame's first sines."""
    assert frame_offsets(4, 1152)[1, :3] == pytest.approx([0.84147098, 0.83279465, 0.82405135], abs=1e-6)
    table = np.zeros((4, 4, 32), np.float32)
    rows = position_rows(table, Grid(3, 4, 4)).reshape(3, 16, 32)
    assert (rows == frame_offsets(3, 32)[:, None]).all() and not position_rows(table, Grid(1, 4, 4)).any()


@pytest.mark.parametrize("order", ["columns first", "in turns"])
def test_pairs_turn_by_column_and_row(order):
    tower = MoonViT("kimik25", 144, 1, 1, 2, 14, 64, 64, 4, 2, 1e-5, 1)
    angles = rope_angles(tower, Grid(2, 3, 5), order)
    assert angles.shape == (30, 36)
    frequencies = 10_000 ** (-4 * np.arange(18) / 72)
    assert frequencies[[1, 2, 17]] == pytest.approx([0.59948425, 0.35938137, 0.000166810], rel=1e-5)  # published
    for frame, row, column in ((0, 0, 0), (0, 2, 4), (1, 1, 3)):
        have = angles[frame * 15 + row * 5 + column]
        by_column, by_row = (have[:18], have[18:]) if order == "columns first" else (have[::2], have[1::2])
        assert by_column == pytest.approx(column * frequencies) and by_row == pytest.approx(row * frequencies)
