"""What a first start compiles: all that a model then takes, divided among processes, some of which may fail."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from kimi_lite.model.cpu import kernels as kernels_module
from kimi_lite.model.cpu import layers as layers_module
from kimi_lite.model.cpu.kernels import Needs, compile_kernels
from kimi_lite.native.cpu.compiler import Kernel
from tests.model.runner import Runner
from tests.tiny import write_tiny_gguf

ROOT = Path(__file__).parents[3]


class FakeKernel:
    """One that remembers who asked for its address."""

    def __init__(self, is_at_hand: bool) -> None:
        self.is_at_hand, self.num_asked = is_at_hand, 0

    @property
    def address(self) -> int:
        self.num_asked += 1
        return 1


SERVES = """
import sys
needs = sys.stdin.readline()
print("ready", flush=True)
for line in sys.stdin:
    open(sys.argv[1], "a").write(line)
    {then}
    print("done", flush=True)
"""


@pytest.mark.parametrize("then", ["pass", "break", "sys.exit(3)", "import os, signal; os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("num_cores", [1, 2, 4])
def test_every_kernel_is_there_whatever_becomes_of_the_others(monkeypatch, tmp_path, num_cores, then):
    """Of 12 that are missing each is given to one process at most, and in the end asked for here."""
    kernels, log, reports = [FakeKernel(i % 4 == 0) for i in range(16)], tmp_path / "log", []
    log.touch()
    monkeypatch.setattr(Needs, "kernels", lambda self: kernels)
    monkeypatch.setattr(
        kernels_module, "isolated_python", lambda _: [sys.executable, "-c", SERVES.format(then=then), log]
    )
    cores = kernels_module.usable_cores()
    monkeypatch.setattr(kernels_module, "usable_cores", lambda: replace(cores, num_usable=num_cores))
    compile_kernels(Needs(("F32",)), lambda done, total: reports.append((done, total)))
    given = [int(line) for line in log.read_text().split()]
    assert len(given) == len(set(given)) and not any(kernels[index].is_at_hand for index in given)
    assert num_cores > 1 or not given
    assert all(kernel.num_asked for kernel in kernels)
    assert reports == sorted(reports) and reports[-1] == (16, 16)


def test_no_process_is_started_for_few(monkeypatch):
    kernels = [FakeKernel(i > 3) for i in range(20)]
    monkeypatch.setattr(Needs, "kernels", lambda self: kernels)
    monkeypatch.setattr(kernels_module.subprocess, "Popen", None)
    compile_kernels(Needs(("F32",)), lambda done, total: None)
    assert all(kernel.num_asked for kernel in kernels)


def test_a_failure_here_ends_the_others(monkeypatch, tmp_path):
    class Broken(FakeKernel):
        @property
        def address(self) -> int:
            raise MemoryError

    started, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(Needs, "kernels", lambda self: [Broken(False)] * 8)
    monkeypatch.setattr(
        kernels_module, "isolated_python", lambda _: [sys.executable, "-c", "import time; time.sleep(99)"]
    )
    monkeypatch.setattr(kernels_module.subprocess, "Popen", start)
    with pytest.raises(MemoryError):
        compile_kernels(Needs(("F32",)), lambda done, total: None)
    assert all(child.poll() is not None for child in started)


def test_what_is_named_is_what_a_model_takes(tmp_path):
    """No more, no less: what is not named would be compiled by one process alone, what is too many for nothing. In a
    process of its own, which has no addresses yet."""
    write_tiny_gguf(
        tmp_path / "tiny.gguf", np.random.default_rng(0), types={".weight": "Q8_0"}, expert_feed_forward_size=64
    )
    code = f"from tests.model.cpu.test_kernels import compare; compare({str(tmp_path / 'tiny.gguf')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def compare(path: str) -> None:
    """What is named with what a model asks for at its loading."""
    asked, find_address = set(), Kernel.address.func

    def address(kernel: Kernel) -> int:
        asked.add(kernel)
        return find_address(kernel)

    with (
        patch.object(Kernel, "address", property(address)),
        patch.object(layers_module, "compile_kernels", lambda needs, report: None),
        Runner(Path(path), kv_dtype="f16") as runner,
    ):
        named = Needs.of(runner.store, runner.config, "f16").kernels()
    assert len(set(named)) == len(named) and asked == set(named)
    assert all(kernel.is_at_hand for kernel in named)
