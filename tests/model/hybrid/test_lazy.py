"""The hybrid path on a GPU that is as late as it may be (`lazy_device`): the same results whatever the order."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts import gpu_streams, stream, vram
from kimi_lite.experts.gpu_failure import GpuBroken
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from kimi_lite.model.hybrid import decode, streamed
from tests.model.hybrid import test_hybrid
from tests.model.hybrid.lazy_device import POLICIES, Stuck
from tests.model.hybrid.runner import DEVICE, HybridRunner, LazyRunner
from tests.model.hybrid.synchronizations import find_sites, without
from tests.model.hybrid.test_hybrid import (  # noqa: F401  these run here again, on the lazy device
    _one_thread,
    test_batch_equals_one_by_one,
    test_cancel_between_layers,
    test_experts_from_the_disk,
    test_heat_outlives_the_process,
    test_many_sequences_that_decode_wait_for_no_upload,
    test_whatever_happens_to_slots_changes_no_result,
)
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the lazy device stands in for a GPU")
REDUNDANT = {  # by function and what the call is
    "streamed.StreamedExperts._multiply: self._streams.finish": "it measures how long the products took",
}
TOO_LATE = ("did not get to", "in vain", "have not moved", "has not answered")  # what a host says that gave up
DRIVES = {  # the lazy device works only when it is asked, and this is what asks it: without, the host gives up
    "decode.DecodeStep.forward: self._streams.finish"
}
IN_A_HANG = {"transformer.HybridTransformer._to_host"}  # where it is needed: asked first, as that is quick
ON_FILLING = {"vram.VramSlots._wait_for_first"}
ORDERS = [(policy, 0) for policy in POLICIES]
MORE = [pytest.param("random", seed, marks=pytest.mark.slow) for seed in range(1, 9)]


@pytest.fixture(autouse=True)
def _lazily(request, monkeypatch):
    """The hybrid tests' runner is a lazy one, with a policy and a seed from the test's name."""
    number = sum(request.node.name.encode()) % len(ORDERS)
    monkeypatch.setattr(test_hybrid, "HybridRunner", partial(lazily, *ORDERS[number]))
    monkeypatch.setattr(vram, "_SHARE_ON_WAY", 1)  # more promotions on their way than pinned buffers
    monkeypatch.setattr(streamed, "SENT_ROWS", 8)  # more pieces of the CPU's rows than pinned buffers


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """As the hybrid tests have it."""
    return write_tiny_gguf(tmp_path_factory.mktemp("hybrid") / "tiny.gguf", np.random.default_rng(0))


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 290, 160)


def lazily(policy: str, seed: int, path: Path, **options: object) -> HybridRunner:
    """`LazyRunner`, whose options other tests give by their names."""
    return LazyRunner(path, policy, seed, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy") / "tiny.gguf"
    return write_tiny_gguf(path, np.random.default_rng(4), expert_feed_forward_size=256)


@pytest.mark.slow
def test_a_disk_that_fails(path, ids, tmp_path, monkeypatch):
    test_hybrid.test_a_disk_that_fails_leaves_nothing_behind(path, ids, tmp_path, monkeypatch)


def silent(runner: HybridRunner, ids: np.ndarray, start: int, should_stop: Callable[[], bool] | None = None) -> None:
    """A pass without logits: it ends with no wait for the GPU."""
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    pieces = (SequenceSlice(0, len(ids), runner.pages),)
    batch = Batch(ids.astype(np.int32), positions, np.zeros(len(ids), bool), pieces)
    runner.transformer.forward(batch, should_stop)


SHARES = {  # seconds of a streamed expert and of one that the CPU computes
    "rows": (1e9, 1e-4),  # all that has no slot on the CPU
    "streamed": (1e-9, 1e9),
    "shared": (3e-4, 1e-4),
}


def story(runner: HybridRunner, ids: np.ndarray, share: str) -> list[np.ndarray]:
    """Prompts with logits and without, given up half-way, a step that is interrupted, and steps of 1, 3 and 12
    tokens."""
    costs = runner.transformer.experts.costs
    costs.stream_s, costs.cpu_s = SHARES[share]
    out = [runner.prefill(ids[:40]), runner.decode(ids[40:44], 40), runner.prefill(ids[44:47], 44)]
    silent(runner, ids[47:83], 47)
    could_read = swap_all(runner)  # nothing has waited for the GPU since
    out += [runner.decode(ids[83:86], 83), could_read()]
    interrupted(runner, ids[86:87], 86)
    out.append(runner.decode(ids[87:89], 87))
    calls = iter([False, False, True])
    with pytest.raises(Cancelled):
        silent(runner, ids[:80], 0, lambda: next(calls))
    out.append(runner.prefill(ids[:70]))
    pages = [np.array([i], np.int32) for i in range(12)]
    out.append(runner.forward(*[(ids[i : i + 1], 0, pages[i]) for i in range(12)]))
    return out


def swap_all(runner: HybridRunner) -> Callable[[], np.ndarray]:
    """As many promotions as may be begin now, into slots that the pass before has used, and are on their stream. What
    is returned says whether a kernel that was asked for before them still read what the slots held then."""
    slots, store = runner.transformer.experts.slots, runner.transformer.experts.store
    heat, held = np.zeros_like(slots.policy.export_heat()), {}
    for layer in store.index.layers:
        residents = np.flatnonzero(slots.residents(layer))
        heat[:, layer] = 100
        heat[:, layer, residents] = 0
        for slot, expert in zip(slots.slots_of(layer, residents), residents, strict=True):
            held[int(slot)] = store.read(layer, int(expert))
    seen = slots.slots.clone()
    slots.policy.import_heat(heat)
    assert slots.begin_step(slots.capacity, 1) > 0
    for upload in slots._uploads:
        upload.is_handled.wait()
    return lambda: np.array([np.array_equal(seen[slot, : len(data)].cpu(), data) for slot, data in held.items()]).all()


def interrupted(runner: HybridRunner, ids: np.ndarray, start: int) -> None:
    """A step that Ctrl-C ends when all of it is on its stream; then the whole step."""
    if isinstance(runner, LazyRunner):
        names: list[str] = []
        thread = threading.get_ident()

        def interrupt(number: int, name: str) -> None:
            if threading.get_ident() != thread:  # Python interrupts the main one
                return
            names.append(name)
            if name == "event" and "replay" in names:
                runner.device.on_operation = None
                raise KeyboardInterrupt

        runner.device.on_operation = interrupt
        with pytest.raises(KeyboardInterrupt):
            runner.decode(ids, start)
    runner.decode(ids, start)


@pytest.fixture(scope="module")
def wanted(model):
    """The story's results on the immediate stand-in, by who computes; "filled": of two tokens."""
    torch.set_num_threads(1)
    ids = np.random.default_rng(1).integers(0, 290, 160)
    with HybridRunner(model, num_gpu_experts=5, group_size=2) as runner:
        return {share: story(runner, ids, share) for share in SHARES} | {"filled": runner.decode(ids[:2])}


def differs(have: list[np.ndarray], want: list[np.ndarray]) -> bool:
    """Rows add up in one order, wherever they come from and whenever they came."""
    return not all(np.array_equal(*pair) for pair in zip(have, want, strict=True))


@pytest.mark.parametrize(("policy", "seed"), ORDERS + MORE)
def test_the_same_whatever_the_order(policy, seed, model, ids, wanted):
    with LazyRunner(model, policy, seed, num_gpu_experts=5, group_size=2) as runner:
        shares = list(SHARES)[seed % 3 :][: 3 if policy != "random" else 1]
        assert not any(differs(story(runner, ids, share), wanted[share]) for share in shares)
        counters = runner.transformer.counters()
        assert runner.device.num_graphs > 0 and counters["gpu_expert_hits"] and counters["expert_promotions"] > 5
        assert len(shares) == 1 or (counters["streamed_experts"] and counters["stream_cpu_s"])


def test_with_all_of_them_nothing_is_wrong(model, ids, wanted):
    """What the next test asks of the product without one synchronization, asked of it as it is."""
    assert not goes_wrong("late", model, ids, wanted, "shared")
    assert not fills_wrongly(model, ids, wanted)
    assert not is_lost_in_a_hang(model, ids)


@pytest.mark.parametrize("site", find_sites(), ids=str)
def test_every_synchronization_is_needed(site, model, ids, wanted):
    """Left out, it is seen in a result or by the device under one of the policies; or it is the one that notices that
    the GPU hangs before the host is lost in a copy."""
    if reason := REDUNDANT.get(str(site).partition("(")[0]):
        pytest.skip(reason)
    shares = ("shared", "streamed") if site.file.stem in ("stream", "streamed") else ("rows",)
    tries = [(policy, share) for share in shares for policy in POLICIES[:3]]
    is_driven = str(site).partition("(")[0] in DRIVES
    function = str(site).partition(":")[0]
    with without(site):
        assert (
            (function in IN_A_HANG and is_lost_in_a_hang(model, ids))
            or (function in ON_FILLING and fills_wrongly(model, ids, wanted))
            or any(goes_wrong(policy, model, ids, wanted, share, is_driven) for policy, share in tries)
            or (site.file.stem == "vram" and fills_wrongly(model, ids, wanted))
            or is_lost_in_a_hang(model, ids)
        )


def goes_wrong(
    policy: str, model: Path, ids: np.ndarray, wanted: dict[str, list[np.ndarray]], share: str, is_driven: bool = False
) -> bool:
    """Where the host gave up after a while nothing is known, since the machine may be slow; unless `is_driven`."""
    try:
        with impatient(), LazyRunner(model, policy, num_gpu_experts=5, group_size=2) as runner:
            return differs(story(runner, ids, share), wanted[share])
    except KimiLiteError as error:
        return is_driven or not any(words in error.message for words in TOO_LATE)
    except Exception:
        return True


def fills_wrongly(model: Path, ids: np.ndarray, wanted: dict[str, list[np.ndarray]]) -> bool:
    """Where every expert gets a slot before the first token."""
    with LazyRunner(model, num_gpu_experts=16, group_size=2) as runner:
        assert runner.transformer.experts.slots.capacity == 16
        return differs([runner.decode(ids[:2])], [wanted["filled"]])


@contextmanager
def impatient(limit_s: float = 3.0) -> Iterator[None]:
    """Who waits for what never comes gives up soon."""
    limits = {gpu_streams: ["HANG_S"], decode: ["_TURN_LIMIT_S", "_FIRST_LIMIT_S"], stream: ["_PATIENCE_S"]}
    with ExitStack() as stack:
        for module, names in limits.items():
            for name in names:
                stack.enter_context(patch.object(module, name, limit_s))
        stack.enter_context(patch.object(gpu_streams, "_HANG_TOKEN_S", 0))
        yield


def is_lost_in_a_hang(model: Path, ids: np.ndarray) -> bool:
    """Whether a GPU that stops at the end of a prompt makes the host wait for ever."""
    return any(hang(model, ids, 1e-4, -number) == "lost" for number in (3, 6))


def hang(model: Path, ids: np.ndarray, cpu_s: float, number: int) -> str:
    """What comes of a kernel that never ends, at the operation with this number of a prompt (below 0: from the
    end): told, lost, or nothing."""
    with ExitStack() as stack:
        runner = stack.enter_context(LazyRunner(model, num_gpu_experts=5, group_size=2))
        device, costs = runner.device, runner.transformer.experts.costs
        costs.stream_s, costs.cpu_s = 1e9 if number < 0 else 1e-4, cpu_s
        first = device.num_operations
        for _ in range(2 if number < 0 else 0):  # the first makes buffers
            first = device.num_operations
            runner.prefill(ids[:70])
        number += device.num_operations - first if number < 0 else 0
        first = device.num_operations
        device.on_operation = lambda count, name: device.hang() if count == first + number else None
        stack.enter_context(impatient(0.2))
        try:
            runner.prefill(ids[:70])
        except GpuBroken:
            return "told"
        except Stuck:
            return "lost"
        return "nothing"


@pytest.mark.parametrize("number", [20, 60, 100, 140, -40, -10, -5])
def test_a_gpu_that_hangs_is_told(number, model, ids):
    assert hang(model, ids, 1e9 if number == 100 else 1e-4, number) == "told"
