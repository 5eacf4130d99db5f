"""The hybrid tests as a GPU would have them: with its roundings they pass, with a fault in it they fail.

What runs on CUDA (`test_cuda.py`) cannot be tried here; that its limits are neither too tight nor too wide can.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.hybrid import test_hybrid
from tests.model.hybrid.closeness import near, same, watch
from tests.model.hybrid.cuda_roundings import RoundingKernels, RoundingRunner
from tests.model.hybrid.runner import DEVICE, HybridRunner
from tests.model.hybrid.test_hybrid import (  # noqa: F401  these run here again, with a GPU's roundings
    _one_thread,
    ids,
    only_rows,
    only_stream,
    path,
    test_a_disk_that_fails_leaves_nothing_behind,
    test_batch_equals_one_by_one,
    test_cache_dtypes,
    test_cancel_between_layers,
    test_equals_the_cpu_path,
    test_every_expert_resident,
    test_experts_from_the_disk,
    test_heat_outlives_the_process,
    test_many_sequences_that_decode_wait_for_no_upload,
    test_prompt_longer_than_the_rows,
    test_rounded_weights,
    test_routing_is_recorded,
    test_streamed_equals_cpu,
    test_warm_up_leaves_nothing_behind,
    test_whatever_happens_to_slots_changes_no_result,
    test_with_cache_equals_without_exactly,
)

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU rounds by itself")


@pytest.fixture(autouse=True, scope="module")
def _as_a_gpu_rounds():
    """In the place of the hybrid tests' own."""
    with watch(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_hybrid, "HybridRunner", RoundingRunner)
        yield


class Faulty(RoundingKernels):
    """Wrong by one thing; each is what a kernel or a missing wait would do."""


class WrongRow(Faulty):
    """A product writes its last row where the one before it belongs."""

    def linear(self, *arguments, **named):
        y = super().linear(*arguments, **named)
        y[-1] = y[len(y) - 2]
        return y


class WrongBlock(Faulty):
    """One block of 32 weights of each expert is read from the block next to it."""

    def expert_choices(self, x, *arguments, **named):
        x = x.clone()
        x[:, 32:64] = x[:, 0:32]
        return super().expert_choices(x, *arguments, **named)


class StaleRows(Faulty):
    """Rows of the experts before: nobody waited for the copy."""

    before = None

    def weighted_sum(self, rows, *arguments):
        stale = self.before if self.before is not None and self.before.shape == rows.shape else rows
        self.before = rows.clone()
        return super().weighted_sum(stale, *arguments)


class NotANumber(Faulty):
    """A row that is read before it was written."""

    def rms_norm(self, *arguments, **named):
        y = super().rms_norm(*arguments, **named)
        y[0, 0] = float("nan")
        return y


class WrongPosition(Faulty):
    """A token sees one position too few."""

    def mla_decode(self, q_latent, q_rope, storage, page_table, lengths, *others, **named):
        fewer = torch.where(lengths > 1, lengths - 1, lengths)
        return super().mla_decode(q_latent, q_rope, storage, page_table, fewer, *others, **named)


class WrongWeights(Faulty):
    """The router's weights of the two choices are exchanged: the same experts, another sum."""

    def route(self, *arguments, **named):
        routes = super().route(*arguments, **named)
        routes.weights.copy_(routes.weights.flip(1))
        return routes


@pytest.fixture(scope="module")
def wanted(path):  # noqa: F811
    """Without slots: tokens that are decoded one by one, and the same and more as a prompt."""
    torch.set_num_threads(1)  # as in the tests: sums in the same order
    tokens = np.random.default_rng(7).integers(0, 290, 80)
    with only_rows(HybridRunner(path)) as without:
        return tokens, without.decode(tokens[:16]), without.prefill(tokens)


def passing(path: Path, kernels: RoundingKernels, wanted: tuple[np.ndarray, ...]) -> set[str]:  # noqa: F811
    """Of decoding, prompts by rows and prompts whose experts stream: where the comparison that a GPU gets passes."""
    tokens, decoded, prompt = wanted
    passed = set()
    with only_rows(RoundingRunner(path, kernels, num_gpu_experts=6, group_size=3)) as runner:
        if same(runner.decode(tokens[:16]), decoded, torch.float32):
            passed.add("decode")
        if near(runner.prefill(tokens), prompt):
            passed.add("rows")
        runner.transformer.experts.costs.stream_s = 1e-9
        if near(only_stream(runner).prefill(tokens), prompt):
            passed.add("stream")
        assert runner.transformer.counters()["streamed_experts"] > 0 or isinstance(kernels, NotANumber)
    return passed


HIDDEN = {WrongRow: {"decode"}, WrongPosition: {"rows", "stream"}}  # where it changes nothing


@pytest.mark.parametrize(
    "kernels", [RoundingKernels, WrongRow, WrongBlock, StaleRows, NotANumber, WrongPosition, WrongWeights]
)
def test_faults_are_seen(kernels, path, wanted):  # noqa: F811
    unharmed = {"decode", "rows", "stream"} if kernels is RoundingKernels else HIDDEN.get(kernels, set())
    assert passing(path, kernels(), wanted) == unharmed
