"""What the CPU's kernels give is the rule of `native.cpu.dot`, bit for bit, on the path of this machine.

`path_check` asks the same of the other paths, `tests.native.gpu.test_exact` of the GPU's kernels.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.native.isa import sum_order
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows
from tests.native import exact
from tests.native.closeness import sizes
from tests.native.harness import activations_for, rows_product

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def same_bits(have: np.ndarray, want: np.ndarray) -> bool:
    """Equal, and NaN where NaN is wanted."""
    return bool((have == want).all()) if not np.isnan(want).any() else np.array_equal(have, want, equal_nan=True)


@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a, b, c):
    want = Fraction(a) * Fraction(b) + Fraction(c)
    have = exact.fma(np.float32(a), np.float32(b), np.float32(c))
    if not np.isfinite(have):
        assert abs(want) >= Fraction(float(np.finfo(np.float32).max))
        return
    error = abs(Fraction(float(have)) - want)
    neighbours = [np.nextafter(np.float32(have), np.float32(to)) for to in (-np.inf, np.inf)]
    assert all(error <= abs(Fraction(float(n)) - want) for n in neighbours if np.isfinite(n))


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_add_up_in_order(name):
    rng = np.random.default_rng(31)
    for k in sizes(name):
        x = rng.standard_normal((2, k)).astype(np.float32)
        x[1] *= 1e-3
        for regime in REGIMES:
            data = hostile_rows(name, 9, k, rng, regime)
            have = rows_product(name, data, activations_for(name, x))
            assert same_bits(have, exact.product(name, data, x, *sum_order())), (k, regime)
