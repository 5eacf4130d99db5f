"""Interleaved rows against ik_llama.cpp's own decoders, as recorded and where its library is here; and the way back."""

import numpy as np
import pytest

from kimi_lite.native.cpu.row_order import rows_in_order
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.interleaved import interleaved
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native.types.ik_oracle import (
    RECORDED_KINDS,
    UNITS,
    Oracle,
    digest_of,
    installed_library,
    interleave,
)

KINDS = list(interleaved().values())


@pytest.mark.parametrize("kind", RECORDED_KINDS, ids=lambda kind: kind.name)
def test_weights_are_what_was_recorded(kind):
    with np.load(UNITS) as recorded:
        units, digest = recorded[kind.name], str(recorded[f"{kind.name} digest"])
    weights = dequantize(rows_in_order(kind, units, kind.base.block_size), kind.base.name)
    assert digest_of(weights) == digest


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_there_and_back(kind):
    """Several units of several blocks: every bit of every row returns, and no row is where it was."""
    k = 3 * kind.base.block_size
    rows = hostile_rows(kind.base.name, 2 * kind.num_rows, k, np.random.default_rng(3))
    units = interleave(kind, rows)
    assert not np.array_equal(units, rows)
    assert np.array_equal(rows_in_order(kind, units, k), rows)


@pytest.mark.parametrize("kind", RECORDED_KINDS, ids=lambda kind: kind.name)
def test_weights_are_the_librarys(kind):
    path = installed_library()
    if path is None:
        pytest.skip("ik-llama-cpp-python is not installed: what it decoded is recorded")
    k = 4 * kind.base.block_size
    units = interleave(kind, hostile_rows(kind.base.name, 3 * kind.num_rows, k, np.random.default_rng(4), "negative"))
    theirs = Oracle(path).decode_units(kind, units, k)
    assert np.array_equal(dequantize(rows_in_order(kind, units, k), kind.base.name), theirs)
