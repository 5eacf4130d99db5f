"""Compiles kernels for GPUs that this machine does not have: what a call would launch becomes PTX and machine code.

`launches(call)` runs a public function of `native.gpu` on CPU tensors and records its launches instead of doing them. Each record
is compiled by the compiler that a launch would use, with the same types, constants and alignments, for any compute capability
(ptxas comes with triton). Works only where triton was imported without TRITON_INTERPRET.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel, its arguments by name, and its options."""

    kernel: JITFunction
    arguments: dict
    options: dict

    def compiled(self, capability: int):
        """Machine code for compute capability 89 (RTX 4090) or 90 (H100); `.asm` has its stages."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[index,] = "constexpr", value
                continue
            signature[parameter.name] = _type_of(value)
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(number, int) and number % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
            if isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[index,] = "constexpr", 1
        source = ASTSource(self.kernel, signature, constants, attributes)
        return compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def _type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def launches(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch, in order."""
    found, run = [], JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        assert all(size > 0 for size in grid), (kernel.__name__, grid)
        found.append(Launch(kernel, arguments, options))

    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = run
    return found
