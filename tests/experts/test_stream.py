"""Groups of experts on their way through two buffers: the right bytes in the right order, whatever is requested or
given up."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.stream import PromptStream
from tests.experts.slots_case import NumberedExperts, SlowDevice


@pytest.fixture
def source():
    return NumberedExperts(num_layers=4, num_experts=10)


def arrived(stream: PromptStream, source: NumberedExperts, layer: int, num_groups: int | None = None) -> list[int]:
    """Experts of the layer's groups (of the first few), each with its bytes checked while the group is there."""
    experts = []
    for number, group in enumerate(stream.groups(layer)):
        assert group.layer == layer
        for expert, row in zip(group.experts, group.data.numpy(), strict=True):
            assert np.array_equal(row, source.bytes_of(layer, expert)), (layer, expert)
            experts.append(expert)
        if number + 1 == num_groups:
            break
    return experts


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(0, 9), max_size=10, unique=True)), max_size=4),
    group_size=st.integers(1, 4),
)
def test_everything_arrives_in_order(requests, group_size):
    """Layers requested ahead come after those before them."""
    source = NumberedExperts(num_layers=4, num_experts=10)
    requests = sorted(requests, key=lambda request: request[0])
    stream = PromptStream(GpuStreams("cpu"), source, group_size, num_threads=2)
    for layer, experts in requests:
        stream.request(layer, experts)
    for layer in range(1, 4):
        wanted = [expert for of, experts in requests if of == layer for expert in experts]
        assert stream.has_requested(layer) == bool(wanted)
        assert arrived(stream, source, layer) == wanted
    assert stream.num_streamed == sum(len(experts) for _, experts in requests)
    stream.close()


def test_a_late_copy_is_waited_for(source):
    """The device's copies end late: a pinned buffer is not written again before, and no group is seen half."""
    device = SlowDevice()
    stream = PromptStream(device, source, 2, num_threads=1)
    stream.request(1, range(10))
    device.wait = device.complete  # the compute stream waits for the upload's event, as CUDA's would
    assert arrived(stream, source, 1) == list(range(10))
    stream.close()


def test_given_up_half_way(source):
    stream = PromptStream(GpuStreams("cpu"), source, 2)
    stream.request(1, range(10))
    stream.request(2, range(10))
    assert arrived(stream, source, 1, num_groups=2) == [0, 1, 2, 3]
    stream.cancel()
    assert not stream.has_requested(1) and not stream.has_requested(2)
    stream.request(3, [7, 5, 1])
    assert arrived(stream, source, 3) == [7, 5, 1]
    stream.close()


def test_a_failed_read_is_raised_where_the_group_is_wanted(source):
    source.fail_on = (1, 4)
    stream = PromptStream(GpuStreams("cpu"), source, 2)
    stream.request(1, range(8))
    with pytest.raises(KimiLiteError, match="broken disk"):
        arrived(stream, source, 1)
    stream.cancel()
    source.fail_on = None
    stream.request(2, range(8))
    assert arrived(stream, source, 2) == list(range(8))
    stream.close()


def test_a_failed_group_leaves_no_late_copies_in_the_next(source):
    """The slow copies of the failed group have ended before the next is copied into the same memory."""
    stream = PromptStream(GpuStreams("cpu"), source, 3, num_threads=3)
    read_into, is_late = source.read_into, threading.Event()

    def slow(layer, expert, slot):
        if (layer, expert) == (1, 2):
            is_late.wait(0.3)
        read_into(layer, expert, slot)

    source.read_into, source.fail_on = slow, (1, 0)
    stream.request(1, [0, 1, 2])
    stream.request(2, [3, 4, 5])
    with pytest.raises(KimiLiteError, match="broken disk"):
        arrived(stream, source, 1)
    groups = stream.groups(2)
    data = next(groups).data.numpy()
    is_late.set()
    time.sleep(0.05)
    assert all(np.array_equal(row, source.bytes_of(2, e)) for row, e in zip(data, (3, 4, 5), strict=True))
    assert all(
        np.array_equal(row, source.bytes_of(2, e)) for row, e in zip(stream._pinned[0].numpy(), (3, 4, 5), strict=True)
    ), "nothing was written into the pinned memory behind it"
    groups.close()
    stream.close()


def test_close_with_groups_on_their_way(source):
    stream = PromptStream(GpuStreams("cpu"), source, 1)
    stream.request(1, range(10))
    stream.close()
    assert not stream._feeder.is_alive()
