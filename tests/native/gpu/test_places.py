"""Sums of rows that lie anywhere, against the same rows in their order: bit for bit."""

import numpy as np
import pytest
import torch

from kimi_lite.native.gpu.elementwise import weighted_sum
from kimi_lite.native.gpu.places import sum_at_places
from tests.native.gpu.tensors import back, on


@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(1, 8, 7), (3, 2, 1030), (5, 1, 64)])
@pytest.mark.parametrize("has_base", [True, False])
def test_equals_the_sum_in_order(num_tokens, top_k, width, has_base, device):
    """Some rows belong to nobody and are no numbers; rows lie in a wider memory."""
    rng = np.random.default_rng(width)
    count = num_tokens * top_k
    places = rng.permutation(count + 3)[:count].reshape(num_tokens, top_k).astype(np.int32)
    ordered, base = rng.standard_normal((count, width)).astype(np.float32), rng.standard_normal((num_tokens, width))
    rows = np.full((count + 3, width + 2), np.nan, np.float32)
    rows[places.reshape(-1), :width] = ordered
    weights, base = rng.random((num_tokens, top_k)).astype(np.float32), base.astype(np.float32)
    others = on(device, weights), on(device, base) if has_base else None
    have = sum_at_places(on(device, rows)[:, :width], on(device, places), *others)
    want = weighted_sum(on(device, ordered).view(num_tokens, top_k, width), *others)
    assert torch.equal(have, want)
    exact = np.einsum("tkd,tk->td", ordered.reshape(num_tokens, top_k, width).astype(np.float64), weights)
    np.testing.assert_allclose(back(have), exact + (base if has_base else 0), rtol=1e-5, atol=1e-5)


def test_writes_where_it_is_told(device):
    rows, out = torch.ones((4, 8), device=device), torch.full((2, 12), 7.0, device=device)
    places = on(device, np.array([[3, 0], [1, 2]], np.int32))
    weights = torch.full((2, 2), 0.5, device=device)
    sum_at_places(rows, places, weights, out=out[:, 2:10])
    assert (out[:, 2:10] == 1).all() and (out[:, :2] == 7).all() and (out[:, 10:] == 7).all()
