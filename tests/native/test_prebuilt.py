"""Kernels that came with the program: the same bits as those that Numba compiles, and taken only where they belong."""

import json
import platform
import zipfile

import numpy as np
import pytest
from numba import types

from kimi_lite.native import amx
from kimi_lite.native.cpu import prebuilt
from kimi_lite.native.cpu.compiler import Function, Kernel
from kimi_lite.native.cpu.matrix import values_kernel
from kimi_lite.native.isa import isa, target_features
from kimi_lite.native.simd import load_f32, load_i64, store_f32
from kimi_lite.native.types.random_blocks import hostile_rows
from kimi_lite.tools.make.kernels import TARGETS, environment_of, kernels_of, object_of, write_archive

SIGNATURE = types.void(types.int64, types.int64)


def _roots(args, count):
    """x = e^x, then the root of it: calls the C library."""
    for i in range(count):
        store_f32(args + 4 * i, np.sqrt(np.exp(load_f32(args + 4 * i))))


def _sum(address, count):
    total = 0
    for i in range(count):
        total += load_i64(address + 8 * i)
    return total


def _scaler(factor: float, name: str):
    def scale(args, count):
        for i in range(count):
            store_f32(args + 4 * i, types.float32(factor) * load_f32(args + 4 * i))

    return scale


@pytest.fixture(scope="module")
def kernels() -> list:
    return [
        Kernel(_roots, SIGNATURE),
        Kernel(_scaler(3.0, "three"), SIGNATURE),
        Kernel(_scaler(5.0, "five"), SIGNATURE),
        values_kernel("Q4_0"),
        Function(_sum, "int64(int64, int64)", {}),
        Function(_sum, "float64(int64, int64)", {}),  # not of integers alone: Numba keeps it
    ]


@pytest.fixture(scope="module")
def archive(kernels, tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("prebuilt") / f"{isa().name}.zip", sorted(target_features()), kernels)


@pytest.fixture
def carried(archive, monkeypatch):
    monkeypatch.setattr(prebuilt, "FOLDER", archive.parent)


def fresh(kernel):
    """Which has compiled nothing yet."""
    return Kernel(kernel.function, kernel.signature)


def test_the_same_bits_and_nothing_compiled(kernels, carried):
    assert prebuilt.num_kernels() == len(kernels) - 1
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for kernel in kernels[:3]:
        here, there, from_archive = values.copy(), values.copy(), fresh(kernel)
        kernel.compiled.ctypes(here.ctypes.data, 100)
        from_archive(there.ctypes.data, 100)
        assert np.array_equal(here.view(np.int32), there.view(np.int32)) and not np.array_equal(here, values)
        assert "compiled" not in vars(from_archive)
    data = hostile_rows("Q4_0", 2, 64, np.random.default_rng(1))
    out = np.zeros((2, 128 + 16), np.float32)
    kernels[3].compiled.ctypes(data.ctypes.data, 128, out[0].ctypes.data)
    called = fresh(kernels[3])
    called(data.ctypes.data, 128, out[1].ctypes.data)  # as `dequantize` does, in every start
    assert "compiled" not in vars(called)
    assert np.array_equal(out[0].view(np.int32), out[1].view(np.int32))


def test_kernels_with_tiles_come_from_their_own_archive(kernels, archive, tmp_path, monkeypatch):
    """Where the process has them, and the others still from their path's; elsewhere it is not looked at."""
    write_archive(tmp_path / archive.name, sorted(target_features()), kernels[1:])
    tiles = write_archive(tmp_path / f"{prebuilt.AMX}.zip", sorted(target_features()), kernels[:1])
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    for has_tiles in (True, False):
        monkeypatch.setattr(prebuilt, "has_amx", lambda has_tiles=has_tiles: has_tiles)
        found = [prebuilt.find(kernel.function, kernel.signature) is not None for kernel in kernels[:3]]
        assert found == [has_tiles, True, True]
        assert prebuilt.num_kernels() == len(kernels) - 2 + has_tiles
    tiles.unlink()


def test_what_python_calls(kernels, carried):
    numbers = np.array([3, -(1 << 40), 5], np.int64)
    for function, is_carried in ((kernels[4], True), (kernels[5], False)):
        again = Function(function.function, function.signature, {})
        assert again(numbers.ctypes.data, 3) == 8 - (1 << 40)
        assert ("compiled" not in vars(again)) == is_carried


def _change(archive, folder, **changes):
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(folder / archive.name, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, json.dumps(json.loads(data) | changes) if name == prebuilt.INDEX else data)


@pytest.mark.parametrize(
    "changes", [{"sources": "other"}, {"features": ["avx1024"]}, {"triple": "sparc-sun-solaris"}, {"kernels": {}}]
)
def test_other_sources_and_other_cpus_compile(kernels, archive, tmp_path, monkeypatch, changes):
    _change(archive, tmp_path, **changes)
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    assert prebuilt.find(kernels[0].function, kernels[0].signature) is None
    kernel = fresh(kernels[0])
    assert kernel.address == kernel.compiled.address


def test_a_damaged_archive_is_said_once(kernels, archive, tmp_path, monkeypatch):
    (tmp_path / archive.name).write_bytes(archive.read_bytes()[:-100])
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    with pytest.warns(UserWarning, match="cannot be read") as said:
        assert [prebuilt.find(kernel.function, kernel.signature) for kernel in kernels[:2]] == [None, None]
    assert len(said) == 1


def test_functions_are_told_apart(kernels):
    def captures(kernel):
        return lambda args, count: kernel

    assert len({prebuilt.identity(kernel.function, kernel.signature) for kernel in kernels}) == len(kernels)
    assert prebuilt.identity(captures(kernels[0]), SIGNATURE) is None  # holds more than plain values


def test_all_that_a_model_needs_is_named(monkeypatch):
    """Without compiling: every kernel can be told apart, of every type and row form, for the demo and for K2."""
    names = [prebuilt.identity(k.function, k.signature) for k in kernels_of(["Q8_0", "TQ1_0", "F32"], ["f16", "q8"])]
    assert None not in names
    for part in (
        "threads._work",
        "threads._take_part",
        "router.",
        "experts.",
        "attention._attention_kernel",
        "prefill",
    ):
        assert any(part in name for name in names), part
    assert sum("('name', 'TQ1_0')" in name for name in names) == 3  # rows, panel, values; its product is shared


def test_targets_are_what_isa_takes_them_for(monkeypatch):
    from numba.core import config

    for name, target in TARGETS.items():
        environment = environment_of(name)
        monkeypatch.setattr(config, "CPU_FEATURES", environment["NUMBA_CPU_FEATURES"])
        monkeypatch.setattr(config, "CPU_NAME", environment["NUMBA_CPU_NAME"])
        monkeypatch.setenv("KIMI_LITE_AMX", environment["KIMI_LITE_AMX"])
        target_features.cache_clear()
        assert isa.__wrapped__().name == target.isa
        with monkeypatch.context() as patch:
            patch.setattr(amx, "isa", isa.__wrapped__)
            assert amx.has_amx.__wrapped__() == (name == prebuilt.AMX and platform.machine() == "x86_64")
    target_features.cache_clear()


def test_objects_need_nothing_of_python(kernels):
    for kernel in (kernels[0], kernels[4]):
        code = object_of(kernel)
        assert code[:4] == b"\x7fELF"
        assert not [word for word in (b"PyErr", b"numba_", b"NRT_", b"Py_DecRef") if word in code]
