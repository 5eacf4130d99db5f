"""A prompt's experts over the bus: the same bits as where they are, whatever is divided, asked ahead, lent, given up or
cannot be read."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.reader import _File
from kimi_lite.model.batch import Batch, Cancelled, SequenceSlice
from kimi_lite.model.hybrid.streamed import Division, slots_worth_lending
from tests.model.hybrid.runner import DEVICE, HybridRunner, LazyRunner
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's products of many tokens are bfloat16")
MODEL = {"types": {"_exps": "Q4_K", "ffn_down_exps": "Q8_0"}, "expert_feed_forward_size": 256, "num_layers": 4}
NUM_TOKENS, NUM_SLOTS, NUM_EXPERTS = 90, 7, 8
RAM_BYTES = 1_900_000  # for half of the experts
OFTEN = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("streamed") / "tiny.gguf", np.random.default_rng(0), **MODEL)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, 290, NUM_TOKENS)


@dataclass(frozen=True)
class Wanted:
    prompt: np.ndarray
    decoded: np.ndarray


def only_rows(runner: HybridRunner) -> HybridRunner:
    runner.transformer.experts.costs.stream_s = 1e9
    return runner


@pytest.fixture(scope="module")
def wanted(path, ids):
    """Of a runner that streams nothing and has no slots."""
    torch.set_num_threads(1)
    with only_rows(HybridRunner(path)) as runner:
        return Wanted(runner.prefill(ids), runner.decode(ids[:6]))


@pytest.fixture(scope="module")
def runner(path, ids):
    with HybridRunner(path, num_gpu_experts=NUM_SLOTS, group_size=3) as runner:
        runner.decode(ids[:12])
        yield runner


@pytest.fixture
def always_lending(monkeypatch):
    """As soon as attention has been measured."""
    monkeypatch.setattr("kimi_lite.model.hybrid.streamed.slots_worth_lending", lambda most, **_: max(0, most))


def test_where_a_prompt_s_experts_were_computed_is_told_when_it_changes(path, ids, caplog):
    """All by the CPU, twice, then all by the bus, twice: two lines."""
    with caplog.at_level("INFO", "kimi_lite.model.hybrid.streamed"), HybridRunner(path) as runner:
        costs = runner.transformer.experts.costs
        for costs.stream_s, costs.cpu_s in ((1e9, 1e-9), (1e9, 1e-9), (1e-9, 1e9), (1e-9, 1e9)):
            costs._ages.update(dict.fromkeys(costs._ages, 0))  # no trials
            runner.prefill(ids)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"experts of {NUM_TOKENS} tokens of a prompt: 0 % were in VRAM, {shares} % computed by the CPU"
        for shares in ("0 % streamed to it, 100", "100 % streamed to it, 0")
    ]


@OFTEN
@given(seed=st.integers(0, 2**32 - 1), capacity=st.integers(7, 40), rows_at_once=st.integers(1, 200))
def test_any_division_gives_the_same_bits(runner, ids, wanted, monkeypatch, seed, capacity, rows_at_once):
    """Experts on the CPU or over the bus by dice, others requested ahead, slots lent between layers; the CPU goes over
    its share in windows. And decoding goes on as if nothing had been lent."""
    dice, experts = np.random.default_rng(seed), runner.transformer.experts
    streamed, slots = experts.streamed, experts.slots
    divide = type(streamed).divide

    def by_dice(layer: int, chosen: np.ndarray, num_windows: int) -> Division:
        division = divide(streamed, layer, chosen, num_windows)
        absent = division.streamed + division.on_cpu
        on_bus = dice.random(len(absent)) < dice.random()
        split = [sorted(e for e, bus in zip(absent, on_bus, strict=True) if bus == side) for side in (True, False)]
        return replace(division, streamed=split[0], on_cpu=split[1])

    def expect(layer: int, num_tokens: int) -> np.ndarray:
        absent = np.flatnonzero(~slots.residents(layer))
        return dice.permutation(absent)[: dice.integers(0, len(absent) + 1)]

    def borrow(num_tokens: int) -> None:
        if dice.random() < 0.4:
            lent, freed = slots.lend(int(dice.integers(1, 3)))
            streamed._stream.lend(lent, freed)

    with monkeypatch.context() as patch:
        patch.setattr(streamed, "divide", by_dice)
        patch.setattr(streamed, "_expect", expect)
        patch.setattr(streamed, "_borrow", borrow)
        patch.setattr(experts.cpu, "capacity", capacity)
        patch.setattr("kimi_lite.model.hybrid.streamed.SENT_ROWS", min(rows_at_once, 512))
        patch.setattr("kimi_lite.model.hybrid.routed.MIN_STREAM_TOKENS", 20)
        have = runner.prefill(ids)
    assert np.array_equal(have, wanted.prompt)
    assert np.array_equal(runner.decode(ids[:6]), wanted.decoded)
    assert streamed._stream.num_lent == 0 and slots.policy.num_resident + slots.policy.num_free <= NUM_SLOTS


def test_twice_is_bit_for_bit_and_counted(path, ids, wanted):
    """Bytes over the bus are those of the experts that were streamed, and were read once each."""
    with HybridRunner(path, group_size=2) as runner:
        runner.transformer.experts.costs.cpu_s = 1e9
        layers = runner.transformer.experts.store.index.layers
        expert_bytes = next(iter(layers.values())).expert_bytes
        for _ in range(2):
            assert np.array_equal(runner.prefill(ids), wanted.prompt)
        counters = runner.transformer.counters()
        num_experts = counters["streamed_experts"]
        assert len(layers) * NUM_EXPERTS <= num_experts <= 2 * len(layers) * NUM_EXPERTS
        assert counters["stream_bus_bytes"] == counters["expert_bytes_from_file"] == num_experts * expert_bytes
        assert counters["expert_reads_from_file"] == num_experts and counters["expert_bytes_from_ram"] == 0


@pytest.mark.parametrize("num_layers", range(6))
def test_given_up_at_every_layer(path, ids, wanted, num_layers, always_lending):
    """Nothing of the pass is left: not on its way, not lent, not in a result."""
    with HybridRunner(path, num_gpu_experts=NUM_SLOTS, group_size=2) as runner:
        experts = runner.transformer.experts
        experts.costs.cpu_s = 1e9
        experts.streamed._pace._token_s = 1.0
        batch = Batch(
            ids.astype(np.int32),
            np.arange(NUM_TOKENS, dtype=np.int32),
            np.ones(NUM_TOKENS, bool),
            (SequenceSlice(0, NUM_TOKENS, runner.pages),),
        )
        answers = iter([False] * num_layers + [True] * 9)
        if num_layers < MODEL["num_layers"]:
            with pytest.raises(Cancelled):
                runner.transformer.forward(batch, lambda: next(answers))
        assert not any(experts.streamed._stream.requested(layer) for layer in range(9))
        assert np.array_equal(runner.transformer.forward(batch), wanted.prompt)
        assert experts.streamed._stream.num_lent > 0
        assert np.array_equal(runner.decode(ids[:6]), wanted.decoded)
        assert runner.transformer.counters()["stream_slots_lent"] == 0


@pytest.fixture(scope="module")
def from_disk(path):
    """Runners of which none has slots in VRAM: with all experts mapped, and with slots in RAM for some."""
    tier = {"ram_expert_bytes": RAM_BYTES, "is_reading_direct": False}
    with HybridRunner(path, group_size=2) as mapped, HybridRunner(path, group_size=2, **tier) as tiered:
        yield {False: mapped, True: tiered}


@OFTEN
@given(number=st.integers(0, 80), code=st.sampled_from([5, 61, 116]), is_tier=st.booleans(), is_divided=st.booleans())
def test_a_disk_that_fails_at_any_read(from_disk, ids, wanted, monkeypatch, number, code, is_tier, is_divided):
    """The n-th read of the pass fails, or none does: a sentence that names the file, and the next pass is right."""
    read_into, left, said, runner = _File.read_into, [number], "", from_disk[is_tier]

    def failing(file: _File, place: np.ndarray, offset: int) -> int:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(code, "the disk said no")
        return read_into(file, place, offset)

    costs = runner.transformer.experts.costs
    costs.stream_s, costs.cpu_s, costs.choice_s = 1e-3, 1e-3 if is_divided else 1e9, 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(_File, "read_into", failing)
        try:
            assert np.array_equal(runner.prefill(ids), wanted.prompt)
        except KimiLiteError as error:
            said = str(error)
    assert not said or ("tiny.gguf: expert " in said and "could not be read: the disk said no" in said)
    assert said or left[0] >= 0 or is_tier, "an error that nobody was told"  # guesses may fail unseen
    assert np.array_equal(runner.prefill(ids), wanted.prompt)
    assert np.array_equal(runner.decode(ids[:6]), wanted.decoded)


@pytest.mark.parametrize("policy", ["late", "random"])
def test_lent_slots_on_a_late_gpu(path, ids, wanted, policy, always_lending):
    """Prompts that borrow slots while promotions fill them, each copy as late as it may be."""
    with LazyRunner(path, policy, 1, num_gpu_experts=NUM_SLOTS, group_size=2) as runner:
        experts = runner.transformer.experts
        for divided in (1e9, 1e-3):
            runner.decode(ids[:8])
            experts.costs.stream_s, experts.costs.cpu_s, experts.costs.choice_s = 1e-3, divided, 1e-5
            experts.streamed._pace._token_s = 1.0
            assert np.array_equal(runner.prefill(ids), wanted.prompt)
            assert experts.streamed._stream.num_lent > 0
            assert np.array_equal(runner.decode(ids[:6]), wanted.decoded)
            assert experts.streamed._stream.num_lent == 0


def test_prompts_from_the_disk_push_nothing_out_of_ram(path, ids, wanted, monkeypatch):
    """A pass longer than a window streams what RAM lacks, past it: what was there before is there afterwards."""
    monkeypatch.setattr("kimi_lite.model.hybrid.experts.ROW_TOKENS", 30)
    monkeypatch.setattr("kimi_lite.model.hybrid.routed.ROW_TOKENS", 30)
    with HybridRunner(path, group_size=2, ram_expert_bytes=RAM_BYTES, is_reading_direct=False) as runner:
        costs, ram = runner.transformer.experts.costs, runner.transformer.experts.store.ram
        costs.stream_s, costs.cpu_s = 1e-9, 1e-4
        runner.decode(ids[:4])
        layers = list(runner.transformer.experts.store.index.layers)
        before = [ram.residents(layer).copy() for layer in layers]
        counters = runner.transformer.counters()
        assert np.array_equal(runner.prefill(ids), wanted.prompt)
        after = runner.transformer.counters()
        assert np.array_equal([ram.residents(layer) for layer in layers], before) and np.any(before)
        assert after["expert_reads_from_ram"] > counters["expert_reads_from_ram"]
        assert after["disk_bytes"] - counters["disk_bytes"] >= after["expert_bytes_from_file"] > 0


@settings(max_examples=300, deadline=None)
@given(
    num_layers=st.integers(1, 60),
    num_streamed=st.floats(0, 384),
    attention_s=st.floats(0, 0.5),
    stream_s=st.floats(1e-5, 1e-2),
    miss_s=st.floats(0, 1e-2),
    num_own=st.integers(2, 300),
    most=st.integers(-5, 500),
)
def test_slots_are_lent_where_that_saves_time(num_layers, num_streamed, attention_s, stream_s, miss_s, num_own, most):
    """Against every number of slots in turn: none saves much more, and what is lent saves something."""

    def saved(count: int) -> float:
        during = [min(attention_s, n * stream_s, num_streamed * stream_s) for n in (num_own, num_own + count)]
        return num_layers * (during[1] - during[0]) - count * (2 * stream_s + miss_s)

    count = slots_worth_lending(
        num_layers=num_layers,
        num_streamed=num_streamed,
        attention_s=attention_s,
        stream_s=stream_s,
        miss_s=miss_s,
        num_own=num_own,
        most=most,
    )
    assert 0 <= count <= max(0, most)
    assert count == 0 or saved(count) > 0
    best = max([0.0, *(saved(n) for n in range(1, max(0, most) + 1))])
    assert saved(count) >= best - (2 + num_layers) * stream_s - miss_s  # slots are whole
