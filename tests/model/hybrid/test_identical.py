"""The same answer cold and warm: experts in VRAM by the rule in numpy (`tests.native.exact`), the others by the CPU's
kernels; tokens and logits do not tell which was where."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import RoutedLayer
from kimi_lite.native.isa import sum_order
from kimi_lite.options import Options
from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.model.hybrid.stand_in import StandInKernels
from tests.model.hybrid.test_hybrid import only_rows, only_stream
from tests.native import exact
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's own kernels are in test_cuda.py")

TYPES = [  # gate and up, down: as K2.5's files have them, and others of every family
    *[("IQ1_S", "IQ1_S"), ("IQ1_M", "IQ2_XXS"), ("IQ2_XXS", "IQ3_XXS"), ("TQ1_0", "TQ2_0"), ("Q2_K", "Q3_K")],
    *[("Q4_K", "Q6_K"), ("IQ4_XS", "IQ4_NL"), ("IQ2_S", "IQ3_S"), ("Q4_0", "Q4_0"), ("Q5_0", "Q8_0"), ("BF16", "F16")],
]


class ExactKernels(StandInKernels):
    """Exact experts by the rule, written independently of both kernels; others rounded as tensor cores do.

    `num_exact`, `num_rounded`: choices.
    """

    def __init__(self) -> None:
        self.num_exact = self.num_rounded = 0

    def expert_choices(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        form: RoutedLayer,
        slot_of_choice: torch.Tensor,
        token_of_choice: torch.Tensor,
        out: torch.Tensor | None = None,
        is_exact: bool | None = None,
    ) -> torch.Tensor:
        rows = torch.zeros((len(slot_of_choice), x.shape[1])) if out is None else out
        for slot in sorted(set(slot_of_choice.tolist()) - {-1}):
            at = (slot_of_choice == slot).nonzero()[:, 0]
            weights = [exact.Weights(part.layout_name, _rows_of(slots[slot], part)) for part in form.matrices]
            inputs = x[token_of_choice[at].long()].float().numpy()
            products = exact.expert(inputs, *weights, *sum_order())
            if is_exact:
                self.num_exact += len(at)
            else:
                self.num_rounded += len(at)
                products = products * np.float32(1 + 2**-9)
            rows[at] = torch.from_numpy(products)
        return rows


def _rows_of(slot: torch.Tensor, part: object) -> np.ndarray:
    return slot[part.offset : part.offset + part.num_bytes].numpy().reshape(part.num_rows, part.row_bytes)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 290, 60)


def model(folder: Path, types: tuple[str, str], **sizes: int) -> Path:
    wide = {"expert_feed_forward_size": 256} | sizes
    named = {"_exps": types[0], "ffn_down_exps": types[1]}
    return write_tiny_gguf(folder / "tiny.gguf", np.random.default_rng(7), types=named, **wide)


def warm(runner: HybridRunner) -> None:
    """Every slot gets an expert, now."""
    slots = runner.transformer.experts.slots
    for layer in runner.transformer.experts.store.index.layers:
        slots.count(layer, np.arange(4, dtype=np.int32).reshape(2, 2))
    slots.fill()


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_cold_is_warm_is_none(types, tmp_path, ids):
    """No slots; five, with promotions while it answers; one for every expert: all logits, bit for bit."""
    path = model(tmp_path, types)
    with HybridRunner(path) as none:
        want = none.decode(ids[:4])
    for num_slots in (5, 16):
        kernels = ExactKernels()
        with HybridRunner(path, num_gpu_experts=num_slots, kernels=kernels) as runner:
            warm(runner)
            assert np.array_equal(runner.decode(ids[:4]), want)
            counters = runner.transformer.counters()
            assert kernels.num_exact > 0 and not kernels.num_rounded
            assert (counters["gpu_expert_misses"] == 0) == (num_slots == 16)


def test_promotions_in_the_middle_of_an_answer(tmp_path, ids):
    """Greedy, with budgets that chance decides and promotions that are cancelled: the same tokens and logits."""
    path = model(tmp_path, ("Q4_0", "Q4_0"))

    def answer(runner: HybridRunner, rng: np.random.Generator | None) -> list[np.ndarray]:
        token, rows = int(ids[0]), []
        for position in range(24):
            rows.append(runner.decode(np.array([token]), start=position)[0])
            token = int(rows[-1].argmax())
            if rng is not None:
                runner.transformer._adaptive._budget.budget = int(rng.integers(0, 5))
                if rng.random() < 0.2:
                    runner.transformer.experts.slots.cancel()
                elif rng.random() < 0.5:  # those on their way are there at the next step, however slow the machine is
                    for upload in runner.transformer.experts.slots._uploads:
                        assert upload.is_handled.wait(60)
        return rows

    with HybridRunner(path) as runner:
        want = answer(runner, None)
    for seed in range(2):
        with HybridRunner(path, num_gpu_experts=6, kernels=ExactKernels()) as runner:
            assert np.array_equal(answer(runner, np.random.default_rng(seed)), want)
            assert runner.transformer.counters()["expert_promotions"] > 6


def test_sequences_that_decode_together(tmp_path, ids):
    """Twelve at once are more than GROUPED_CHOICES choices, and exact all the same."""
    path, pages = model(tmp_path, ("Q4_0", "Q5_0")), [np.array([i], np.int32) for i in range(12)]
    parts = [(ids[i : i + 1], 0, pages[i]) for i in range(12)]
    with HybridRunner(path) as none:
        want = none.forward(*parts, num_generated=12)
    with HybridRunner(path, num_gpu_experts=9, kernels=ExactKernels()) as runner:
        warm(runner)
        assert np.array_equal(runner.forward(*parts, num_generated=12), want)


@pytest.mark.parametrize("types", [("Q4_0", "Q4_0"), ("Q2_K", "Q3_K")], ids="-".join)
def test_from_the_disk(types, tmp_path, ids):
    """Half of the experts in RAM, a few in VRAM."""
    path = model(tmp_path, types)
    with HybridRunner(path) as none:
        want = none.decode(ids[:4])
        slot_bytes = none.transformer.experts.store.index.vram_slot_bytes
    tier = {"ram_expert_bytes": 10 * slot_bytes, "num_readers": 2, "is_reading_direct": False}
    with HybridRunner(path, num_gpu_experts=3, kernels=ExactKernels(), **tier) as runner:
        assert np.array_equal(runner.decode(ids[:4]), want)
        assert runner.transformer.counters()["disk_bytes"] > 0


def test_reproducible_prompts(tmp_path, ids):
    """Whatever of a prompt streams, is resident or is left to the CPU: the same bits. Without the option, others."""
    path = model(tmp_path, ("Q4_0", "Q5_0"), expert_feed_forward_size=64)
    with only_rows(HybridRunner(path, is_reproducible=True)) as none:
        want = none.prefill(ids)
    for force in (only_rows, only_stream, lambda runner: runner):
        for num_slots in (0, 5):
            kernels = ExactKernels()
            options = {"num_gpu_experts": num_slots, "group_size": 3, "kernels": kernels}
            with force(HybridRunner(path, is_reproducible=True, **options)) as runner:
                warm(runner)
                for _ in range(2):  # costs are learned, experts come
                    assert np.array_equal(runner.prefill(ids), want)
                assert not kernels.num_rounded
            assert kernels.num_exact > 0 or (force is not only_stream and num_slots == 0)
    with only_stream(HybridRunner(path, group_size=3, kernels=ExactKernels())) as usual:
        assert not np.array_equal(usual.prefill(ids), want)


def test_a_bias_towards_residents_is_refused():
    with pytest.raises(KimiLiteError, match="--cache-bias"):
        Options(is_reproducible=True, cache_bias=0.1)
