"""int8 activations: codes, scales and sums against the numpy oracle, at hostile values."""

import numpy as np
import pytest

from kimi_lite.native.cpu.activations import SMALLEST_PEAK, Activations
from kimi_lite.native.reference import SMALLEST_PEAK as REFERENCE_SMALLEST_PEAK
from kimi_lite.native.reference import quantize_activations, seen_activations
from tests.native.harness import activations


def check(x, kind):
    prepared = activations(x, kind)
    codes, scales, sums16, sums32, minus16 = prepared.quantized[kind]
    expected = quantize_activations(x, kind)
    assert np.array_equal(codes, expected.codes)
    repeated = np.repeat(expected.scales, kind // 32, axis=1)
    assert np.array_equal(scales, repeated, equal_nan=True)
    is_finite = np.isfinite(repeated)
    for sums, width in ((sums16, 16), (sums32, 32)):
        wanted = expected.codes.reshape(len(x), -1, width).sum(axis=2, dtype=np.int64).astype(np.float32)
        wanted[~np.repeat(is_finite, 32 // width, axis=1)] = np.nan
        assert np.array_equal(sums, wanted, equal_nan=True)
    assert np.array_equal(minus16[is_finite.repeat(2, axis=1)], -sums16[is_finite.repeat(2, axis=1)])
    return codes, scales


@pytest.mark.parametrize("kind", [32, 256])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30, 3e-36])
def test_codes_scales_and_sums(kind, magnitude):
    rng = np.random.default_rng(1)
    for k in (kind, 3 * kind):
        check((rng.standard_normal((5, k)) * magnitude).astype(np.float32), kind)


@pytest.mark.parametrize("kind", [32, 256])
def test_halves_round_to_even(kind):
    x = np.zeros((1, kind), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -3.5]
    codes, scales = check(x, kind)
    assert codes[0, :6].tolist() == [127, 0, 2, 2, 0, -4]
    assert (scales == 1).all()


@pytest.mark.parametrize("kind", [32, 256])
def test_zeros_and_what_is_too_small(kind):
    assert np.float32(SMALLEST_PEAK) == REFERENCE_SMALLEST_PEAK
    x = np.zeros((5, kind), np.float32)
    x[1], x[2], x[3] = -0.0, 1e-45, np.nextafter(np.float32(SMALLEST_PEAK), np.float32(0))
    x[4, 7] = SMALLEST_PEAK
    codes, scales = check(x, kind)
    assert not codes[:4].any() and not scales[:4].any()
    assert codes[4, 7] == 127


@pytest.mark.parametrize("kind", [32, 256])
def test_largest_float(kind):
    x = np.full((2, kind), np.finfo(np.float32).max)
    x[1] *= -1
    codes, _ = check(x, kind)
    assert (codes[0] == 127).all() and (codes[1] == -127).all()


@pytest.mark.parametrize("kind", [32, 256])
@pytest.mark.parametrize("hostile", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_makes_its_group_nan(kind, hostile):
    rng = np.random.default_rng(2)
    for place in (0, 15, 16, kind - 1):
        x = rng.standard_normal((2, 3 * kind)).astype(np.float32)
        x[1, kind + place] = hostile
        codes, scales = check(x, kind)
        assert np.isnan(scales[1, kind // 32 : 2 * kind // 32]).all() and np.isfinite(scales[0]).all()
        assert not codes[1, kind : 2 * kind].any()


def test_all_ones_is_a_nan():
    """The bits of a float32 that was never written, 0xFFFFFFFF, are a NaN like any other."""
    x = np.zeros((1, 32), np.float32)
    x.view(np.uint32)[0, 4] = 0xFFFFFFFF
    check(x, 32)


def test_both_forms_at_once():
    x = np.random.default_rng(3).standard_normal((3, 512)).astype(np.float32)
    prepared = activations(x, 32, 256)
    for kind in (32, 256):
        codes, scales, *_ = prepared.quantized[kind]
        values = codes * np.repeat(scales.astype(np.float64), 32, axis=1)
        assert np.array_equal(values, seen_activations(x, kind))
        assert np.abs(values - x).max() <= 0.51 * np.abs(x).max() / 127


def test_sizes_are_checked():
    with pytest.raises(AssertionError, match="576"):
        Activations(1, 576, {256})
