"""Which kernels a model needs on the CPU, and compiling them at a first start: in as many processes as there are cores.

Numba compiles one function at a time in a process, and a model of two types needs some twenty, which nothing shares.
This process takes one after the other, and so do others, which keep what they compiled on disk (`native.cache`); those
are this package's own (`isolated`), read indices in the list of kernels from stdin and say which are done. What one of
them leaves undone, for whatever reason, is compiled here.
"""

import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import usable_cores
from kimi_lite.isolated import isolated_python
from kimi_lite.native.cpu.attention import compiled_attention, heads_per_group
from kimi_lite.native.cpu.attention_prefill import compiled_prefill
from kimi_lite.native.cpu.compiler import Kernel
from kimi_lite.native.cpu.latent import compiled_write
from kimi_lite.native.cpu.matrix import matrix_kernels, values_kernel

_FEW = 4  # missing kernels: a process that helps takes about as long to begin as one takes to compile
_PATIENCE_S = 60  # with the others, once this process is done
_MOST_PROCESSES = 8  # 200 MB each; there are four kernels that take most of the time


@dataclass(frozen=True, slots=True)
class Needs:
    """What decides which kernels a model needs. `types`: of its matrices; `vectors`: of those, which are only decoded.
    `cache`: the form of its KV cache; None: a GPU has all but the experts."""

    types: tuple[str, ...]
    vectors: tuple[str, ...] = ()
    cache: str | None = None
    num_heads: int = 0

    @classmethod
    def of(cls, store: GGUFStore, config: ModelConfig, cache: str | None) -> "Needs":
        tensors = store.tensors.values()
        types = {tensor.layout.name for tensor in tensors if len(tensor.shape) > 1}
        vectors = {tensor.layout.name for tensor in tensors} - types
        return cls(tuple(sorted(types)), tuple(sorted(vectors)), cache, config.num_heads)

    def kernels(self) -> list[Kernel]:
        """Those that take longest to compile first."""
        from kimi_lite.native.cpu import experts, linear, router

        always = _kernels_of(experts)
        if self.cache is not None:
            attention = compiled_attention(heads_per_group(self.num_heads), self.cache)
            always += [*_kernels_of(linear), compiled_prefill(self.cache), attention]
            always += [*_kernels_of(router), compiled_write(self.cache)]
        of_types = [kernel for name in self.types for kernel in matrix_kernels(name)]
        return list(dict.fromkeys([*always, *of_types, *map(values_kernel, self.vectors)]))  # types share some


def _kernels_of(module: object) -> list[Kernel]:
    return [each for each in vars(module).values() if isinstance(each, Kernel)]


def compile_kernels(needs: Needs, report: Callable[[int, int], None]) -> None:
    """Compiles what is not there yet; report(kernels that are there or under way, kernels in all)."""
    kernels = needs.kernels()
    missing = [index for index, kernel in enumerate(kernels) if not kernel.is_at_hand]
    num_processes = min(usable_cores().num_usable, _MOST_PROCESSES) if len(missing) > _FEW else 1
    with _Helpers(needs, missing, num_processes - 1) as helpers:
        while (index := helpers.take()) is not None:
            report(len(kernels) - helpers.num_waiting - 1, len(kernels))
            _ = kernels[index].address
    for kernel in kernels:  # from the disk, or compiled where a process has failed
        _ = kernel.address
    report(len(kernels), len(kernels))


class _Helpers:
    """Processes that compile kernels by index, while this one takes from the same list."""

    def __init__(self, needs: Needs, missing: Sequence[int], count: int) -> None:
        self._needs, self._count, self._waiting = needs, count, deque(missing)
        self._led: list[tuple[threading.Thread, subprocess.Popen]] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def take(self) -> int | None:
        """The next kernel that no process compiles yet."""
        with suppress(IndexError):
            return self._waiting.popleft()
        return None

    def __enter__(self) -> "_Helpers":
        command = isolated_python(__name__)
        with suppress(OSError, RuntimeError):  # no more processes or threads: it is compiled here then
            for _ in range(self._count):
                child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                thread = threading.Thread(target=self._lead, args=(child,), daemon=True, name="kimi-lite-compile")
                self._led.append((thread, child))
                thread.start()
        return self

    def _lead(self, child: subprocess.Popen) -> None:
        """Gives a process one kernel after the other, until there is none or it has ended."""
        with suppress(OSError, ValueError):  # it has ended, or was ended
            child.stdin.write(json.dumps(asdict(self._needs)) + "\n")
            child.stdin.flush()
            while child.stdout.readline() and (index := self.take()) is not None:
                child.stdin.write(f"{index}\n")
                child.stdin.flush()

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Waits for what is being compiled, unless an exception came."""
        until = time.monotonic() + (_PATIENCE_S if kind is None else 0)
        for thread, child in self._led:
            if thread.ident is not None:
                thread.join(max(0, until - time.monotonic()))
            child.kill()
            child.wait()
            if thread.ident is not None:
                thread.join()
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):
                    pipe.close()


def serve() -> None:
    """A process that helps: reads what is needed, then says that it is ready for the first kernel and after each."""
    needs = json.loads(sys.stdin.readline())
    kernels = Needs(**needs).kernels()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        _ = kernels[int(line)].address
        print(json.dumps("done"), flush=True)
