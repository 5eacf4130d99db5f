"""The stand-in itself: what it must see, it sees."""

import threading

import numpy as np
import pytest
import torch

from kimi_lite.experts.gpu_failure import GpuBroken
from kimi_lite.experts.gpu_streams import GpuStreams
from tests.model.hybrid.lazy_device import LazyDevice, Stream, Stuck


@pytest.fixture
def device():
    with LazyDevice("late") as device:
        yield device


def values(device: LazyDevice, tensor: torch.Tensor) -> list[float]:
    return tensor.cpu().tolist()


def test_nothing_runs_before_it_must(device):
    x, target = device.zeros((3,), torch.float32), device.pinned((3,), torch.float32)
    x += 1
    device.copy(target, x)
    assert torch.isnan(target).all() and torch.isnan(x.plain).all()
    device.finish(device.event())
    assert target.tolist() == [1, 1, 1] and not device.pending


def test_pinned_memory_is_read_late_and_other_memory_at_once(device):
    pinned, pageable = device.pinned((1,), torch.float32), torch.zeros(1)
    late, early = pinned.to(device.device, non_blocking=True), pageable.to(device.device)
    pinned[0] = pageable[0] = 7
    assert values(device, late) == [7] and values(device, early) == [0]


@pytest.mark.parametrize("waits", [False, True])
def test_a_stream_waits_only_for_what_it_is_told_to(device, waits):
    pinned = device.pinned((1,), torch.float32)
    pinned[0] = 5
    x = device.zeros((1,), torch.float32)
    device.finish(device.event())
    with device.copying():
        device.copy(x, pinned)
        copied = device.event()
    if waits:
        device.wait(copied)
    assert values(device, x * 2) == [10 if waits else 0]


@pytest.mark.parametrize("is_kept", [False, True])
def test_memory_that_is_freed_while_another_stream_reads_it(device, is_kept):
    """What a missing `record_stream` does: the owner's stream uses it again."""
    x, target = device.zeros((2,), torch.float32) + 3, device.pinned((2,), torch.float32)
    made = device.event()
    with device.copying():
        device.wait(made)
        device.copy(target, x)
    kept = x if is_kept else None
    del x
    device.finish(device.event())
    with device.copying():
        device.finish(device.event())
    assert (target.tolist() == [3, 3]) == (kept is not None)


def test_graphs_share_memory_and_refuse_what_cuda_refuses(device):
    x, memory, outside = device.zeros((2,), torch.float32), device.graph_memory(), device.event()
    first = device.capture(lambda: x.add_(x * 0 + 1), memory)
    second = device.capture(lambda: x.mul_(x * 0 + 2), memory)
    for graph in (first, second, first):
        graph.replay()
    assert values(device, x) == [3, 3] and device.num_graphs == 2
    first.reset()
    assert device.num_graphs == 1
    with pytest.raises(AssertionError, match="was reset"):
        first.replay()
    with pytest.raises(RuntimeError, match="uncaptured work"):
        device.capture(lambda: device.wait(outside), memory)
    with pytest.raises(AssertionError, match="the host waits inside a capture"):
        device.capture(lambda: x.cpu(), memory)
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 / 0, memory)
    assert values(device, x) == [3, 3]


def test_a_stream_for_every_graph_comes_round_to_the_one_for_copies(device):
    """Of 32 that torch has; the product makes all of its streams once."""
    x, memory = device.zeros((1,), torch.float32), device.graph_memory()

    def copy() -> None:
        with device.copying():
            device.event()

    copier = threading.Thread(target=copy)
    copier.start()
    copier.join()

    def capture(stream: Stream) -> None:
        device.captures = stream
        device.capture(lambda: x.add_(1), memory)

    for _ in range(40):
        capture(device.captures)
    for _ in range(30):
        capture(device.new_stream())
    with pytest.raises(RuntimeError, match="another thread works in the stream"):
        capture(device.new_stream())


@pytest.mark.parametrize("has_own_time", [False, True])
def test_kernels_and_the_host_wait_for_each_other_by_memory(device, has_own_time):
    """A kernel writes a flag, the host answers, and a kernel that polls goes on."""
    flags, x = device.pinned((2,), torch.int64), device.zeros((1,), torch.float32)
    device.finish(device.event())
    flags.zero_()
    device.kernel("post", lambda: flags[0].fill_(1))
    device.wait_until(lambda: int(flags[1]) == 1)
    x += 1

    def answer() -> None:
        cells = flags.numpy()
        while cells[0] != 1:
            threading.Event().wait(0.0005)
        cells[1] = 1

    host = threading.Thread(target=answer)
    host.start()
    if has_own_time:
        with device.running():
            host.join()
    assert values(device, x) == [1]
    host.join()


def test_who_waits_for_ever_hears_of_it(device, monkeypatch):
    monkeypatch.setattr("kimi_lite.experts.gpu_streams.HANG_S", 0.05)
    device.hang()
    x = device.zeros((1,), torch.float32)
    with pytest.raises(GpuBroken, match="The GPU has not answered for 0 seconds"):
        device.finish(device.event())
    with pytest.raises(GpuBroken):  # at once
        device.require_sound()
    with pytest.raises(Stuck):
        x.copy_(torch.ones(1))


def test_operations_of_two_devices_do_not_mix():
    with LazyDevice() as first, LazyDevice() as second:
        a, b = torch.ones(2, device=first.device), torch.ones(2).to(second.device)
        assert a.device != b.device and (a.memory.owner, b.memory.owner) == (first, second)
        assert np.array_equal((a + 1).cpu().numpy(), (b + 1).cpu().numpy())


def test_the_product_makes_its_streams_once():
    """`GpuStreams` makes streams when it is made, and never again."""
    source = GpuStreams.__init__.__code__.co_names
    others = {
        n
        for f in vars(GpuStreams).values()
        if hasattr(f, "__code__") and f is not GpuStreams.__init__
        for n in f.__code__.co_names
    }
    assert "Stream" in source and "Stream" not in others
