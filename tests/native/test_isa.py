"""Which path is chosen for which CPU, and the exactness of the dot products of bytes on the path that runs here."""

import numpy as np
import pytest
from numba.core import config

from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.isa import AVX2, AVX512_VNNI, AVX_VNNI, PORTABLE, isa, target_features
from kimi_lite.native.simd import load_i8x64, load_i32x16, store_i32x16
from kimi_lite.native.simd_dot import HAS_FULL_UNSIGNED_DOT, dot_i8x64, dot_u8x64

PATHS = [
    ("+avx512vnni,+avx512bw,+avx512vl,+avx2", AVX512_VNNI),
    ("+avx512vnni,+avx512bw,+avx2", AVX2),
    ("+avxvnni,+avx2", AVX_VNNI),
    ("+avx2,+fma", AVX2),
    ("+sse2,-avx2", PORTABLE),
]


@pytest.mark.parametrize(("features", "path"), PATHS)
def test_path_by_features(features, path, monkeypatch):
    monkeypatch.setattr(config, "CPU_FEATURES", features)
    monkeypatch.setattr(config, "CPU_NAME", "somebody")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    target_features.cache_clear()
    try:
        chosen = isa.__wrapped__()
    finally:
        target_features.cache_clear()
    assert chosen.name == path and chosen.cpu == "somebody"


def test_other_machines_are_portable(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert isa.__wrapped__().name == PORTABLE


def test_this_process_has_a_path():
    assert isa().name in (AVX512_VNNI, AVX_VNNI, AVX2, PORTABLE)
    assert isa().instruction and isa().cpu
    assert (isa().name in (AVX512_VNNI, AVX_VNNI)) == HAS_FULL_UNSIGNED_DOT


@function("void(int64, int64, int64)")
def _unsigned(a, b, out):
    store_i32x16(out, dot_u8x64(load_i32x16(out), load_i8x64(a), load_i8x64(b)))


@function("void(int64, int64, int64)")
def _signed(a, b, out):
    store_i32x16(out, dot_i8x64(load_i32x16(out), load_i8x64(a), load_i8x64(b)))


def dot(kernel, a, b, start):
    out = start.copy()
    kernel(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    return out


def expected_dot(a, b, start):
    return start + (a.astype(np.int32) * b.astype(np.int32)).reshape(16, 4).sum(axis=1, dtype=np.int32)


@pytest.mark.parametrize("largest", [3, 15, 127, 128, 255])
def test_unsigned_dot_is_exact(largest):
    """Codes above 128 only where the instruction takes all 8 bits; activations are -127..127."""
    if largest > 128 and not HAS_FULL_UNSIGNED_DOT:
        pytest.skip(f"{isa().name} saturates beyond 128, and no kernel there goes beyond")
    rng = np.random.default_rng(1)
    start = rng.integers(-1000, 1000, 16, np.int32)
    for a in (np.full(64, largest, np.uint8), rng.integers(0, largest + 1, 64, np.uint8)):
        for b in (np.full(64, 127, np.int8), np.full(64, -127, np.int8), rng.integers(-127, 128, 64, np.int8)):
            assert np.array_equal(dot(_unsigned, a, b, start), expected_dot(a, b, start))


def test_signed_dot_is_exact():
    """Weights may be -128."""
    rng = np.random.default_rng(2)
    start = rng.integers(-1000, 1000, 16, np.int32)
    weights = (
        np.full(64, -128, np.int8),
        np.full(64, 127, np.int8),
        np.zeros(64, np.int8),
        rng.integers(-128, 128, 64, np.int8),
    )
    for a in weights:
        for b in (np.full(64, 127, np.int8), np.full(64, -127, np.int8), rng.integers(-127, 128, 64, np.int8)):
            assert np.array_equal(dot(_signed, a, b, start), expected_dot(a, b, start))
