"""Launches without Triton's driver: the same bytes as Triton's own passes, and errors that say what is wrong."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kimi_lite.native.gpu import support
from kimi_lite.native.gpu.cuda_driver import Cuda, Launcher, Utilities
from kimi_lite.native.gpu.trial import try_a_kernel

_ROOT = Path(__file__).parents[3]


def test_the_same_bytes_as_tritons_own_launcher(tmp_path):
    """Every launch of every kernel and every type of argument, on a libcuda that writes down what it is told."""
    if problem := support.compiler_problem():
        pytest.skip(f"Triton's own launcher cannot be made: {problem.problem}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = {name: str(tmp_path) for name in ("TRITON_CACHE_DIR", "LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH")}
    command = [sys.executable, "-W", "ignore", "-m", "tests.native.gpu.compare_launchers", str(tmp_path)]
    result = subprocess.run(
        command, cwd=_ROOT, env=environment | folders, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    for kernel in ("matvec", "dequantize", "gate_up", "down", "grouped", "decode", "merge", "write_latent", "route"):
        assert f"'{kernel}_kernel'" in result.stdout, kernel


class FakeCuda:
    """libcuda without a GPU. `fails`: name of a function -> the error that it returns."""

    def __init__(self, fails=None, parameter_sizes=(8, 4, 8, 8)):
        self.fails, self.parameter_sizes, self.launches, self.contexts = fails or {}, parameter_sizes, [], []
        self.cuLaunchKernel = lambda *arguments: self._launch(*arguments)
        self.local = threading.local()

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(first=None, *others):
            if self.fails.get(name):
                return self.fails[name]
            if hasattr(first, "_obj"):  # an output
                first._obj.value = 77
            return 0

        return call

    def cuGetErrorString(self, code, text):
        text._obj.value = {1: b"invalid argument", 2: b"out of memory", 700: b"an illegal memory access"}[code.value]

    def cuCtxGetCurrent(self, context):
        context._obj.value = getattr(self.local, "context", None)
        return 0

    def cuCtxSetCurrent(self, context):
        self.local.context = context.value
        self.contexts.append((threading.current_thread(), context.value))
        return 0

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index.value >= len(self.parameter_sizes):
            return 1
        size._obj.value = self.parameter_sizes[index.value]
        return 0

    def cuPointerGetAttribute(self, value, which, address):
        return 1  # no host memory is known

    def _launch(self, function, *place_and_parameters):
        if self.fails.get("cuLaunchKernel"):
            return self.fails["cuLaunchKernel"]
        *place, _stream, parameters, _extra = place_and_parameters
        first, second = (ctypes.string_at(parameters[i], self.parameter_sizes[i]) for i in (0, 1))
        self.launches.append((place, first, second))
        return 0


METADATA = SimpleNamespace(
    name="a_kernel",
    num_warps=8,
    num_ctas=1,
    shared=640,
    launch_cooperative_grid=False,
    launch_pdl=False,
    global_scratch_size=0,
    profile_scratch_size=0,
)


def launch(library, *arguments, grid=(5, 6, 1)):
    source = SimpleNamespace(signature={"x": "*fp32", "n": "i32", "TILE": "constexpr"})
    launcher = Launcher(Cuda(library), lambda: 3, source, METADATA)
    launcher(*grid, 99, 1234, None, None, None, None, *arguments, 16)


def test_a_launch():
    library = FakeCuda()
    launch(library, 0x123456789A, -2)
    assert library.launches == [([5, 6, 1, 256, 1, 1, 640], (0x123456789A).to_bytes(8, "little"), b"\xfe\xff\xff\xff")]
    launch(library, 0, 0, grid=(0, 6, 1))
    assert len(library.launches) == 1, "an empty grid is nothing"


def test_each_thread_has_the_device_context():
    library = FakeCuda()
    threads = [threading.Thread(target=launch, args=(library, 0, 1)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert library.contexts == [(thread, 77) for thread in threads] and len(library.launches) == 2


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [(2, torch.OutOfMemoryError, "out of memory"), (700, RuntimeError, "CUDA error: an illegal memory access")],
)
def test_errors_are_torchs(code, error, says):
    with pytest.raises(error, match=says):
        launch(FakeCuda({"cuLaunchKernel": code}), 0, 0)
    with pytest.raises(error, match=says):
        Utilities(Cuda(FakeCuda({"cuModuleLoadData": code}))).load_binary("a_kernel", b"code", 0, 0)


def test_a_tensor_in_pageable_memory_is_refused():
    with pytest.raises(ValueError, match="not pinned"):
        launch(FakeCuda(), torch.zeros(3), 0)


def test_a_kernel_that_expects_other_parameters_is_not_launched():
    library = FakeCuda(parameter_sizes=(8, 8, 8, 8))
    with pytest.raises(AssertionError, match="a_kernel"):
        launch(library, 0, 0)
    assert not library.launches


def test_the_trial_kernel():
    """Its sum is right in the interpreter; what stops it is one line."""
    assert try_a_kernel(torch.device("cpu")) is None
    assert "\n" not in try_a_kernel(torch.device("cuda", 99))
