"""Pages on memory nodes: whose they are, who touches them, and what the kernel says of them."""

import ctypes
import errno
import mmap
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.hardware import host
from kimi_lite.native.cpu import pages
from kimi_lite.native.cpu.nodes import ThreadGroup, read_nodes
from kimi_lite.native.cpu.pages import (
    HUGE_PAGE_BYTES,
    LOCAL_POLICIES,
    PAGE_BYTES,
    Spans,
    inherited_policy,
    locate,
    page_runs,
    strange_share,
    touch,
)

GROUPS = (ThreadGroup(0, 0, frozenset({0}), 0, 2), ThreadGroup(1, 1, frozenset({1}), 2, 4))


@st.composite
def patterns(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, int]], int]:
    """Base, period, parts of it without gap, count."""
    sizes = draw(st.lists(st.integers(1, 40_000), min_size=1, max_size=6))
    ends = np.cumsum(sizes).tolist()
    parts = [(end - size, end, draw(st.integers(0, 2))) for size, end in zip(sizes, ends, strict=True)]
    return draw(st.integers(0, 10**9)), ends[-1] + draw(st.integers(0, 5000)), parts, draw(st.integers(1, 20))


@settings(deadline=None)
@given(patterns(), st.sampled_from([PAGE_BYTES, 1 << 16]), st.data())
def test_spans_are_whose_the_pattern_says(pattern: tuple, page_bytes: int, data: st.DataObject) -> None:
    """Against a loop over the parts; runs of pages cover every byte once, and a page is its middle byte's owner's."""
    base, period, parts, count = pattern
    spans = Spans.repeated(base, period, count, parts)

    def owner(address: int) -> int:
        at = (address - base) % period if address >= base else 0
        return next((own for _, end, own in parts if at < end), parts[-1][2])

    at = base + data.draw(st.integers(0, period * count - 1))
    assert spans.owners_at(np.array([at]))[0] == owner(at)
    runs = page_runs(spans, page_bytes)
    assert runs[0][0] == base and runs[-1][1] == base + period * count
    assert all(before[1] == after[0] and before[2] != after[2] for before, after in pairwise(runs))
    for start, stop, own in runs:
        page = start // page_bytes * page_bytes
        middle = min(page + page_bytes // 2, spans.stop - 1)
        assert own == owner(middle) and (stop % page_bytes == 0 or stop == spans.stop)


def test_long_spans_are_cut_into_the_same_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = Spans.repeated(1000, 100_000, 50, [(0, 60_000, 0), (60_000, 100_000, 1)])
    whole = page_runs(spans, PAGE_BYTES)
    monkeypatch.setattr(pages, "_PAGES_AT_ONCE", 7)
    cut = page_runs(spans, PAGE_BYTES)
    owners = [own for start, stop, own in cut for _ in range(start // 8, stop // 8)]
    assert owners == [own for start, stop, own in whole for _ in range(start // 8, stop // 8)]


def test_huge_pages_are_strange_where_parts_are_small() -> None:
    """Halves of 64 KiB: half of the bytes; of 64 MiB: hardly any."""
    small = Spans.repeated(0, 1 << 17, 64, [(0, 1 << 16, 0), (1 << 16, 1 << 17, 1)])
    large = Spans.repeated(1 << 20, 1 << 27, 2, [(0, 1 << 26, 0), (1 << 26, 1 << 27, 1)])
    assert strange_share(small, HUGE_PAGE_BYTES) == pytest.approx(0.5) and strange_share(small, PAGE_BYTES) == 0
    assert strange_share(large, HUGE_PAGE_BYTES) < 0.05


def test_each_page_is_touched_once_by_a_thread_of_its_group() -> None:
    spans = Spans.repeated(0, 40_000, 9, [(0, 16_384, 0), (16_384, 40_000, 1)])
    kept, cleared, lock, cpus = {}, [], threading.Lock(), threading.local()

    def keep(own: frozenset[int]) -> None:
        cpus.own = own

    def clear(start: int, num_bytes: int) -> None:
        with lock:
            cleared.append((start, start + num_bytes))
            kept[start] = cpus.own

    touch(spans, GROUPS, clear=clear, keep=keep)
    assert sorted(cleared) == [(start, stop) for start, stop, _ in page_runs(spans, PAGE_BYTES)]
    assert {start: GROUPS[own].cpus for start, _, own in page_runs(spans, PAGE_BYTES)} == kept


def test_what_the_kernel_is_asked() -> None:
    asked = []

    def call(number: int, *arguments: int) -> int:
        asked.append((number, arguments))
        if number == pages._number(pages._MOVE_PAGES):
            count, addresses, status = arguments[1], arguments[2], arguments[4]
            seen = (ctypes.c_int64 * count).from_address(addresses)
            for i, found in zip(range(count), (1, -errno.ENOENT), strict=True):
                assert seen[i] == 8192 * (i + 1)
                ctypes.c_int32.from_address(status + 4 * i).value = found
        else:
            ctypes.c_int.from_address(arguments[0]).value = 3
        return 0

    try:
        assert locate(np.array([8192, 16384 + 77]), call).tolist() == [1, -errno.ENOENT]
    except OSError as error:
        pytest.skip(f"not Linux: {error}")
    assert asked[0][1][:2] == (0, 2) and asked[0][1][3] == 0 and asked[0][1][5] == 0  # this process; move none
    assert inherited_policy(call) == 3


def test_this_machine_tells() -> None:
    """Touched memory is on one of the nodes, untouched memory on none."""
    memory = np.frombuffer(mmap.mmap(-1, 64 << 20), np.uint8)  # malloc may be told to fill what it gives
    memory[:PAGE_BYTES] = 1
    try:
        found, policy = locate(memory.ctypes.data + np.array([0, 48 << 20])), inherited_policy()
    except OSError as error:
        pytest.skip(f"the system does not tell: {error}")
    assert found[0] in [node.number for node in read_nodes()] and found[1] < 0
    assert policy in LOCAL_POLICIES or policy in range(1, 8)


def test_memory_of_this_machine_is_cleared_on_its_node() -> None:
    memory = np.empty((8 << 20) + 123, np.uint8)
    node = next((node for node in read_nodes() if node.cpus and node.total_bytes), None)
    if node is None:
        pytest.skip("this system does not tell its nodes")
    groups = (ThreadGroup(node.number, node.number, node.cpus, 0, 1),) * 2
    spans = Spans.repeated(memory.ctypes.data, 1 << 20, 8, [(0, 700_000, 0), (700_000, 1 << 20, 1)])
    touch(spans, groups)
    assert not memory[: 8 << 20].any()
    try:
        found = locate(memory.ctypes.data + np.arange(0, 8 << 20, 1 << 18))
    except OSError as error:
        pytest.skip(f"the system does not tell: {error}")
    if len(read_nodes()) == 1:
        assert set(found.tolist()) == {node.number}


@pytest.mark.parametrize(("mode", "meaning"), [(3, "interleaved"), (2, "bound"), (0, "local")])
def test_a_policy_as_numactl_sets_it_is_seen(mode: int, meaning: str) -> None:
    """Really set, on one of this machine's nodes; a thread of its own, as policies are threads'."""
    number = {"x86_64": 238, "aarch64": 237, "riscv64": 237}.get(platform.machine())
    node = next((node.number for node in read_nodes() if node.total_bytes), None)
    if number is None or node is None:
        pytest.skip("this system has no such call, or does not tell its nodes")

    def policy() -> str:
        mask = ctypes.c_uint64(1 << node if mode else 0)
        pages.system_call(number, mode, ctypes.addressof(mask) if mode else 0, 65 if mode else 0)
        return host.memory_policy()

    with ThreadPoolExecutor(1) as pool:
        try:
            assert pool.submit(policy).result() == meaning
        except PermissionError as error:
            pytest.skip(f"the system forbids it: {error}")
