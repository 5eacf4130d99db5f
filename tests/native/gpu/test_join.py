"""The join of a layer's experts with the norm behind it, against float64."""

import numpy as np
import pytest
import torch

from kimi_lite.native import reference
from kimi_lite.native.gpu.arguments import ChoiceRows
from kimi_lite.native.gpu.join import join
from tests.native.gpu.tensors import back, on


class Case:
    """Choices of T tokens, of which some have a slot; rows that must not be read are NaN."""

    def __init__(self, num_tokens: int, top_k: int, width: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((num_tokens * top_k, width)).astype(np.float32)
        self.slot_of_choice = rng.integers(-1, 2, num_tokens * top_k).astype(np.int32)
        is_hit = self.slot_of_choice[:, None] >= 0
        self.hits, self.misses = np.where(is_hit, rows, np.nan), np.where(is_hit, np.nan, rows)
        self.x, self.shared = rng.standard_normal((2, num_tokens, width)).astype(np.float32)
        self.weights = rng.random((num_tokens, top_k)).astype(np.float32)
        self.norm = rng.standard_normal(width).astype(np.float32)
        self.sum = np.einsum("tkd,tk->td", rows.reshape(num_tokens, top_k, width).astype(np.float64), self.weights)

    def rows(self, device: torch.device) -> ChoiceRows:
        misses = on(device, np.pad(self.misses, ((0, 3), (0, 0))))  # buffers may be longer
        return ChoiceRows(on(device, self.slot_of_choice), on(device, self.hits), misses)


@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(1, 8, 7), (3, 2, 1030), (2, 6, 2500), (5, 1, 64)])
@pytest.mark.parametrize("has_shared", [True, False])
def test_join_and_norm(num_tokens, top_k, width, has_shared, device):
    case = Case(num_tokens, top_k, width, seed=num_tokens)
    x, shared = on(device, case.x.copy()), on(device, case.shared) if has_shared else None
    arrivals = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    arguments = (case.rows(device), on(device, case.weights), shared)
    out = join(x, *arguments, on(device, case.norm), 1e-5, arrivals=arrivals)
    expected = case.x + case.sum + (case.shared if has_shared else 0)
    np.testing.assert_allclose(back(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(out), reference.rms_norm(expected, case.norm, 1e-5), rtol=1e-5, atol=1e-5)
    assert not arrivals.any(), "a second call would wait for nobody"
    again = on(device, case.x.copy())
    assert join(again, *arguments) is None and torch.equal(again, x)


def test_writes_where_it_is_told(device):
    case = Case(2, 3, 40, seed=9)
    wide = torch.full((2, 50), 7.0, dtype=torch.bfloat16, device=device)
    x = on(device, np.pad(case.x, ((0, 0), (0, 6))))[:, :40]
    join(x, case.rows(device), on(device, case.weights), None, on(device, case.norm), 1e-5, out=wide[:, 5:45])
    expected = reference.rms_norm(case.x + case.sum, case.norm, 1e-5)
    np.testing.assert_allclose(back(wide[:, 5:45]), expected, rtol=2**-7, atol=1e-5)
    assert (wide[:, :5] == 7).all() and (wide[:, 45:] == 7).all()


def test_a_bad_row_stays_with_its_token(device):
    case = Case(2, 3, 40, seed=10)
    case.hits[1] = case.misses[1] = np.nan
    out = join(on(device, case.x), case.rows(device), on(device, case.weights), None, on(device, case.norm), 1e-5)
    assert np.isnan(back(out)[0]).all() and np.isfinite(back(out)[1]).all()
