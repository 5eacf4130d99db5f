"""Pages in RAM behind a GPU's cache: they come in blocks, and take what the plan counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.kv import host as host_module
from kimi_lite.kv.host import HostPages, fitting_pages, host_bytes

GIB = 1 << 30


@given(num_pages=st.integers(0, 3000), page_bytes=st.integers(1 << 12, 20 << 20))
def test_little_is_lost_to_powers_of_two(num_pages, page_bytes):
    """A block holds many pages of any real size; the last one is at most rounded up to twice its pages."""
    have, content = host_bytes(num_pages, page_bytes), num_pages * page_bytes
    assert content <= have <= content * 1.09 + 256 * 2**20
    assert host_bytes(num_pages + 1, page_bytes) >= have


@given(num_bytes=st.integers(0, 1 << 36), page_bytes=st.integers(1 << 12, 300 << 20))
def test_as_many_as_fit(num_bytes, page_bytes):
    count = fitting_pages(num_bytes, page_bytes)
    assert host_bytes(count, page_bytes) <= num_bytes < host_bytes(count + 1, page_bytes)


def test_k2_5_at_32k():
    """2.3 GiB of half floats that torch would pin as 4."""
    assert host_bytes(512, 64 * 70272) < 2.3 * GIB


@pytest.mark.parametrize("num_pages", [1, 3, 7])
def test_blocks_come_when_they_are_needed(num_pages, monkeypatch):
    storage = np.random.default_rng(0).random((2, 20, 64, 8)).astype(np.float32)  # (layers, pages, rows, length)
    monkeypatch.setattr(host_module, "_BLOCK_BYTES", 3 * 2 * 64 * 8 * 4)  # three pages
    pages = HostPages(num_pages, storage)
    content = storage.copy()
    for page in range(20):
        assert pages.put(b"%d" % page, storage, page)
        assert len(pages._blocks) == -(-min(page + 1, num_pages) // 3)
    assert sum(len(block) for block in pages._blocks.values()) == num_pages
    for page in range(20 - num_pages, 20):
        pages.bring_back(pages.withdraw(b"%d" % page), storage, 0)
        assert np.array_equal(storage[:, 0], content[:, page])
