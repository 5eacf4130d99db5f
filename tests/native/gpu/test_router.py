"""Expert choice in Triton: the oracle's ids exactly, its weights within rounding, hostile logits included."""

import numpy as np
import pytest
import torch

from kimi_lite.native.gpu.arguments import Routes
from kimi_lite.native.gpu.router import route
from kimi_lite.native.reference import route as oracle
from tests.native.gpu.tensors import back, on

CASES = [
    (384, 8, (1, 1), True, True),  # Kimi K2
    (64, 6, (8, 3), True, True),  # DeepSeek-V3: groups, by their two best
    (40, 6, (1, 1), False, False),  # DeepSeek-V2 lite
    (48, 4, (4, 2), False, False),
]


@pytest.mark.parametrize(("num_experts", "top_k", "groups", "is_sigmoid", "has_bias"), CASES)
def test_equals_the_oracle(num_experts, top_k, groups, is_sigmoid, has_bias, device):
    rng = np.random.default_rng(15)
    logits = rng.standard_normal((6, num_experts)).astype(np.float32)
    logits[1, 3], logits[2, 5], logits[3] = np.nan, np.inf, 1  # bad values are seen; equals go by number
    logits[4] = np.round(logits[4])
    bias = (rng.standard_normal(num_experts) * 0.1).astype(np.float32) if has_bias else None
    if has_bias:
        bias[7] = -np.inf  # such an expert is never chosen
    arguments = (top_k, groups, is_sigmoid, True, 2.827)
    with np.errstate(invalid="ignore"):
        ids, weights = oracle(logits, bias, *arguments)
    actual = route(on(device, logits), None if bias is None else on(device, bias), *arguments)
    np.testing.assert_array_equal(actual[0].cpu().numpy(), ids)
    np.testing.assert_allclose(back(actual[1]), weights, rtol=5e-6)


def test_a_bias_that_is_no_number_is_seen(device):
    logits, bias = np.zeros((1, 8), np.float32), np.zeros(8, np.float32)
    bias[3] = np.nan
    ids, weights, _ = route(on(device, logits), on(device, bias), 2, is_normalized=False)
    assert ids[0, 0] == 3 and np.isnan(back(weights)[0, 0]) and back(weights)[0, 1] == 0.5


def test_writes_where_it_is_told(device):
    """Slots of the choices too."""
    logits = on(device, np.random.default_rng(16).standard_normal((2, 12)).astype(np.float32))
    slot_of = on(device, np.arange(5, 17, dtype=np.int32))
    ids, weights, slots = route(logits, None, 3, slot_of=slot_of)
    assert (slots == slot_of[ids.long()]).all() and route(logits, None, 3).slots is None
    out = Routes(*(torch.zeros_like(part) for part in (ids, weights, slots)))
    assert route(logits, None, 3, slot_of=slot_of, out=out) is out
    assert (out.ids == ids).all() and (out.weights == weights).all() and (out.slots == slots).all()


@pytest.mark.parametrize(("num_experts", "top_k", "groups", "is_sigmoid", "has_bias"), CASES)
def test_experts_with_a_slot_gain(num_experts, top_k, groups, is_sigmoid, has_bias, device):
    """In the choice, never in the weights: as a bias that only they have."""
    rng = np.random.default_rng(17)
    logits = rng.standard_normal((5, num_experts)).astype(np.float32)
    slot_of = np.where(rng.random(num_experts) < 0.3, rng.integers(0, 9, num_experts), -1).astype(np.int32)
    bias = (rng.standard_normal(num_experts) * 0.1).astype(np.float32) if has_bias else None
    added = np.where(slot_of >= 0, np.float32(0.05), np.float32(0)) + (0 if bias is None else bias)
    groups = groups if has_bias else (1, 1)  # groups count by their two best where the model has a bias
    options = (top_k, groups, is_sigmoid, True, 2.827)
    ids, weights = oracle(logits, added, *options)
    actual = route(
        on(device, logits), None if bias is None else on(device, bias), *options, on(device, slot_of), cache_bias=0.05
    )
    np.testing.assert_array_equal(actual.ids.cpu().numpy(), ids)
    np.testing.assert_allclose(back(actual.weights), weights, rtol=5e-6)
    assert (ids != oracle(logits, bias, *options)[0]).any()
