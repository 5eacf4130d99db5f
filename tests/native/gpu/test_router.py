"""Expert choice in Triton: the oracle's ids exactly, its weights within rounding, hostile logits included."""

import numpy as np
import pytest

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
    ids, weights = route(on(device, logits), on(device, bias), 2, is_normalized=False)
    assert ids[0, 0] == 3 and np.isnan(back(weights)[0, 0]) and back(weights)[0, 1] == 0.5


def test_writes_where_it_is_told(device):
    logits = on(device, np.random.default_rng(16).standard_normal((2, 12)).astype(np.float32))
    ids, weights = route(logits, None, 3)
    out = (ids.clone().zero_(), weights.clone().zero_())
    route(logits, None, 3, out=out)
    assert (out[0] == ids).all() and (out[1] == weights).all()
