"""Compiles kernels for GPUs that this machine does not have: what a call would launch becomes PTX and machine code.

`launches(call)` runs a public function of `native.gpu` on CPU tensors and records its launches instead of doing them. A
record is compiled on the very path that a launch takes (binding, specialization by type, value and alignment, compiler,
ptxas, which comes with triton); only loading the code onto a GPU is left out, and the driver that would say which GPU
is there is a stand-in. Works only where triton was imported without TRITON_INTERPRET.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class _StandIn:
    """What a launch asks of a driver before it has code. Each capability is a device, as code is kept by device."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Launch(NamedTuple):
    """A kernel, and the arguments and options it was called with."""

    kernel: JITFunction
    positional: tuple
    named: dict
    grid: tuple

    def argument(self, name: str):
        """None where the kernel has no such argument."""
        return {**dict(zip(self.kernel.arg_names, self.positional, strict=False)), **self.named}.get(name)

    def compiled(self, capability: int):
        """Machine code for compute capability 89 (RTX 4090) or 90 (H100); `.asm` has its stages."""
        driver.set_active(_StandIn(capability))
        return self.kernel.run(*self.positional, grid=self.grid, warmup=True, **self.named)


def launches(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch, in order."""
    found, run = [], JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        assert all(size > 0 for size in grid), (kernel.__name__, grid)
        found.append(Launch(kernel, args, kwargs, grid))

    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = run
    return found
