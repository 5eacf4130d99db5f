"""Experts on their way through two rings: the right bytes in the right order, whatever is requested, dropped, lent,
given up, or fails."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.stream import MIN_PIECES, RING_BYTES, PromptStream, num_pieces
from tests.experts.slots_case import SLOT_BYTES, NumberedExperts, SlowDevice

NUM_EXPERTS = 10
EXPERTS = st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=NUM_EXPERTS, unique=True)


@pytest.fixture
def source():
    return NumberedExperts(num_layers=4, num_experts=NUM_EXPERTS)


@contextmanager
def opened(
    source: NumberedExperts, group_size: int = 2, streams: GpuStreams | None = None, num_rows: int = 0, threads: int = 2
) -> Iterator[PromptStream]:
    """On the last rows of a memory that has others as well."""
    streams = streams or GpuStreams("cpu")
    num_rows = num_rows or 2 * group_size
    memory = streams.zeros((20 + num_rows, SLOT_BYTES), torch.uint8)
    stream = PromptStream(streams, source, memory, range(20, 20 + num_rows), group_size, threads)
    try:
        yield stream
    finally:
        stream.close()
        assert not stream._feeder.is_alive()


def arrived(stream: PromptStream, source: NumberedExperts, layer: int, num_groups: int | None = None) -> list[int]:
    """Experts of the layer's groups (of the first few), each with its bytes checked while the group is there."""
    experts = []
    for number, group in enumerate(stream.groups(layer)):
        assert group.layer == layer and len(group.experts) <= stream.group_size
        for expert, slot in zip(group.experts, group.slots, strict=True):
            assert np.array_equal(stream.memory[slot].numpy(), source.bytes_of(layer, expert)), (layer, expert)
            experts.append(expert)
        if number + 1 == num_groups:
            break
    return experts


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 3), EXPERTS), max_size=4),
    group_size=st.integers(1, 4),
    more_rows=st.integers(0, 12),
    threads=st.integers(1, 3),
)
def test_everything_arrives_in_order(requests, group_size, more_rows, threads):
    """Layers requested ahead come after those before them, in a ring of any length that takes a group."""
    source = NumberedExperts(num_layers=4, num_experts=NUM_EXPERTS)
    requests = sorted(requests, key=lambda request: request[0])
    with opened(source, group_size, num_rows=group_size + more_rows, threads=threads) as stream:
        for layer, experts in requests:
            stream.request(layer, experts)
        for layer in range(1, 4):
            wanted = [expert for of, experts in requests if of == layer for expert in experts]
            assert [expert for expert, _ in stream.requested(layer)] == wanted
            assert arrived(stream, source, layer) == wanted
        counters = stream.counters()
        num_experts = sum(len(experts) for _, experts in requests)
        assert counters["streamed_experts"] == num_experts
        assert counters["stream_bus_bytes"] == num_experts * SLOT_BYTES


class LateDevice(SlowDevice):
    """Whose compute stream waits for the event of a copy, as CUDA's would."""

    def wait(self, event) -> None:
        self.complete(event)


@st.composite
def stories(draw):
    """What a prompt may do to the stream, layer after layer."""
    kinds = ["ahead", "keep", "more", "take", "some", "cancel", "lend", "take back", "fail"]
    return draw(st.lists(st.tuples(st.sampled_from(kinds), EXPERTS), min_size=1, max_size=12))


@settings(max_examples=120, deadline=None)
@given(story=stories(), group_size=st.integers(1, 3), is_late=st.booleans())
def test_any_story(story, group_size, is_late):
    """What is wanted comes, in order, with its own bytes; what is dropped may come; nothing waits for ever."""
    source = NumberedExperts(num_layers=60, num_experts=NUM_EXPERTS)
    streams = LateDevice() if is_late else GpuStreams("cpu")
    layer, wanted, lent = 1, [], []
    with opened(source, group_size, streams) as stream:
        for kind, experts in story:
            asked = [expert for expert, _ in stream.requested(layer)]
            if kind in ("ahead", "more"):
                new = [expert for expert in experts if expert not in asked]
                stream.request(layer, new)
                wanted += new
            elif kind == "keep":
                stream.keep(layer, set(experts))
                wanted = [expert for expert in wanted if expert in experts]
            elif kind in ("take", "some"):
                found = arrived(stream, source, layer, 1 if kind == "some" else None)
                if kind == "some":
                    stream.cancel()
                else:
                    assert [expert for expert in found if expert in wanted] == wanted
                layer, wanted = layer + 1, []
            elif kind == "lend":
                new = [expert for expert in experts if expert not in lent]
                stream.lend(new, streams.event())
                lent += new
            elif kind == "take back":
                assert sorted(stream.take_back()) == sorted(lent)
                lent, wanted = [], []
            elif kind == "fail":
                source.fail_on = (layer, experts[0]) if experts else None
                stream.request(layer, experts)
                if experts:
                    with pytest.raises(KimiLiteError, match="a broken disk"):
                        arrived(stream, source, layer)
                stream.cancel()
                source.fail_on, layer, wanted = None, layer + 1, []
            else:
                stream.cancel()
                wanted = []
            assert stream.num_lent == len(lent)
        stream.cancel()
        stream.request(59, range(NUM_EXPERTS))
        assert arrived(stream, source, 59) == list(range(NUM_EXPERTS))


def test_a_late_copy_is_waited_for(source):
    """The device's copies end late: a piece is not written again before, and no group is seen half."""
    with opened(source, 2, LateDevice(), threads=1) as stream:
        stream.request(1, range(10))
        assert arrived(stream, source, 1) == list(range(10))


def test_given_up_half_way(source):
    with opened(source) as stream:
        stream.request(1, range(10))
        stream.request(2, range(10))
        assert arrived(stream, source, 1, num_groups=2) == [0, 1, 2, 3]
        stream.cancel()
        assert not stream.requested(1) and not stream.requested(2)
        stream.request(3, [7, 5, 1])
        assert arrived(stream, source, 3) == [7, 5, 1]


def test_a_failed_read_is_raised_where_the_group_is_wanted(source):
    source.fail_on = (1, 4)
    with opened(source) as stream:
        stream.request(1, range(8))
        with pytest.raises(KimiLiteError, match="broken disk"):
            arrived(stream, source, 1)
        stream.cancel()
        source.fail_on = None
        stream.request(2, range(8))
        assert arrived(stream, source, 2) == list(range(8))


def test_what_has_not_begun_is_dropped(source):
    """With a ring that is full nothing more begins, so that what is dropped costs nothing."""
    with opened(source, 2, num_rows=2) as stream:
        stream.request(1, [0, 1])
        stream.request(2, [2, 3, 4, 5])
        stream.keep(2, {4})
        assert stream.begun(2) == [] and stream.requested(2) == [(4, 20)]
        assert arrived(stream, source, 1) == [0, 1]
        assert arrived(stream, source, 2) == [4]
        assert stream.num_bytes == 3 * SLOT_BYTES


def test_lent_slots_are_read_ahead_into(source):
    """Slots of the ring decide how far ahead it reads; those that were lent come back, and the ring is as before."""
    with opened(source, 2) as stream:
        stream.lend([3, 7, 5], stream._streams.event())
        stream.request(1, range(10))
        while len(stream.begun(1)) < 7:
            time.sleep(1e-3)
        assert stream.begun(1) == list(range(7)) and stream.num_lent == 3
        assert {slot for _, slot in stream.requested(1)} == {3, 7, 5, 20, 21, 22, 23}
        assert arrived(stream, source, 1) == list(range(10))
        assert sorted(stream.take_back()) == [3, 5, 7]
        stream.request(2, range(4))
        assert {slot for _, slot in stream.requested(2)} == {20, 21, 22, 23}
        assert arrived(stream, source, 2) == list(range(4))


class BrokenDevice(GpuStreams):
    """Whose n-th operation of one kind is an error, and every later one, as CUDA's are."""

    def __init__(self, kind: str, number: int) -> None:
        super().__init__("cpu")
        self._kind, self._left = kind, number

    def _count(self, kind: str) -> None:
        if kind == self._kind:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def copy(self, target, source) -> None:
        self._count("copy")
        super().copy(target, source)

    def event(self):
        self._count("event")
        return super().event()

    def wait(self, event) -> None:
        self._count("wait")
        super().wait(event)


def _run_three_layers(stream: PromptStream, source: NumberedExperts) -> None:
    for layer in (1, 2, 3):
        stream.request(layer, range(10))
        arrived(stream, source, layer)


@pytest.mark.parametrize("kind", ["copy", "event", "wait"])
@pytest.mark.parametrize("number", [0, 1, 5, 14])
def test_a_gpu_that_fails_ends_the_stream(source, kind, number):
    """Whoever waits is told, every later request is told the same, and giving up and closing do not wait."""
    with opened(source, 2, BrokenDevice(kind, number)) as stream:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            _run_three_layers(stream, source)
        stream.cancel()
        if stream._dead is not None:  # else the one that takes was told, and gave up
            with pytest.raises(RuntimeError, match="illegal memory access"):
                stream.request(3, range(4))
        stream.cancel()


def test_a_stream_that_does_not_move_is_given_up(source, monkeypatch):
    monkeypatch.setattr("kimi_lite.experts.stream._PATIENCE_S", 0.05)
    goes_on = threading.Event()
    source.read_part = lambda *_: goes_on.wait(20)
    with opened(source) as stream:
        stream.request(1, [1])
        with pytest.raises(KimiLiteError, match="have not moved"):
            arrived(stream, source, 1)
        stream.cancel()
        with pytest.raises(KimiLiteError, match="have not moved"):
            stream.request(1, [1])
        goes_on.set()
        stream._feeder.join(20)


def test_close_with_groups_on_their_way(source):
    stream_of_one = opened(source, 1)
    with stream_of_one as stream:
        stream.request(1, range(10))
    stream.close()


def test_the_ring_of_pieces_fits_into_a_cache():
    assert num_pieces(3 << 20, 4) * (3 << 20) <= RING_BYTES
    assert num_pieces(20 << 20, 8) == MIN_PIECES and num_pieces(8192, 4) == 8
