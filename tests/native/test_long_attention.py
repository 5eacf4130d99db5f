"""Attention at the end of 256K positions, without computing them: the latents are random, the oracle reads them all."""

import numpy as np
import pytest

from tests.native.attention_case import Sequences
from tests.native.closeness import assert_close

CONTEXT = 262_144
SHAPE = (9, 16, 16, 32, 16)  # two groups of heads, the second overlapping the first


def check(actual: np.ndarray, expected: np.ndarray) -> None:
    assert_close(actual, expected, np.abs(expected).max(), 2e-5)


@pytest.mark.parametrize("dtype", ["f16", "q8"])
def test_decoding_the_last_token(dtype: str) -> None:
    sequences = Sequences([(CONTEXT - 1, 1)], np.random.default_rng(1), SHAPE, dtype=dtype)
    expected = sequences.expected(is_absorbed=True)
    check(sequences.run(), expected)
    check(sequences.run(num_threads=2), expected)


def test_a_chunk_at_the_end() -> None:
    """Expanded: every page's keys and values are made for 20 queries, of which each sees another end."""
    sequences = Sequences([(CONTEXT - 20, 20)], np.random.default_rng(2), (1, *SHAPE[1:]), dtype="f16")
    check(sequences.run(expanded=[0]), sequences.expected(is_absorbed=False))


def test_pages_far_inside_a_large_storage() -> None:
    """Behind 2 GiB, where 32 bits of address would not reach. Memory that is not touched is not taken."""
    sequences = Sequences([(300, 2), (80, 30)], np.random.default_rng(3), SHAPE, dtype="f16")
    near = sequences.run(expanded=[1])
    first = 2**31 // sequences.storage[0].nbytes + 5
    far = np.zeros((first + len(sequences.storage), *sequences.storage.shape[1:]), np.float16)
    far[first:] = sequences.storage
    sequences.storage = far
    for pages in sequences.pages:
        pages += first
    assert np.array_equal(sequences.run(expanded=[1]), near)
