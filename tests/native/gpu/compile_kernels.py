"""Compiles the kernels, as Kimi K2.5's sizes launch them, for GPUs that this machine need not have. Prints a line for
each.

    python -m tests.native.gpu.compile_kernels            # every kernel, some types, in seconds
    python -m tests.native.gpu.compile_kernels --all      # every kernel of every type for both GPUs, in minutes

A kernel that the compiler refuses, that spills registers, or that wants more shared memory than the GPU has, ends it
with an error. Run in a process of its own, because Triton must not be interpreting (tests/native/gpu/test_compile.py).
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
from triton import knobs

from kimi_lite.native.gpu.dequant import dequantize
from kimi_lite.native.gpu.elementwise import rms_norm, rope, swiglu, weighted_sum
from kimi_lite.native.gpu.experts import GROUPED_CHOICES, ExpertMatrix, expert_choices
from kimi_lite.native.gpu.latent import write_latent
from kimi_lite.native.gpu.linear import heads_linear, linear
from kimi_lite.native.gpu.mla import mla_decode
from kimi_lite.native.gpu.router import route
from kimi_lite.native.latent_rows import row_bytes
from kimi_lite.native.layouts import BY_NAME
from tests.native.gpu.ahead_of_time import Launch, launches

SHARED_BYTES = {89: 101376, 90: 232448}  # what one program may have: RTX 4090, H100
HIDDEN, WIDTH, HEADS, RANK, ROPE = 7168, 2048, 64, 512, 64
MORE_TYPES = ("IQ1_M", "Q4_K")
STACK_BYTES = {
    "grouped_kernel": 128,
    "decode_kernel": 64,
    "matvec_kernel": 16,
}  # most that a kernel may spill; others nothing


class _Form:
    """Three matrices of one type in a slot."""

    def __init__(self, name: str) -> None:
        wide, long = BY_NAME[name].row_bytes(HIDDEN), BY_NAME[name].row_bytes(WIDTH)
        self.gate = ExpertMatrix(name, 0, WIDTH, HIDDEN, wide)
        self.up = ExpertMatrix(name, WIDTH * wide, WIDTH, HIDDEN, wide)
        self.down = ExpertMatrix(name, 2 * WIDTH * wide, HIDDEN, WIDTH, long)
        self.num_bytes = 2 * WIDTH * wide + HIDDEN * long


def _products(name: str) -> Iterator[Launch]:
    """A few tokens times a matrix."""
    data = torch.empty((64, BY_NAME[name].row_bytes(HIDDEN)), dtype=torch.uint8)
    yield from launches(lambda: linear(torch.empty((5, HIDDEN), dtype=torch.bfloat16), data, name, HIDDEN))


def _of_type(name: str) -> Iterator[Launch]:
    """All kernels that decode."""
    yield from _products(name)
    data = torch.empty((64, BY_NAME[name].row_bytes(HIDDEN)), dtype=torch.uint8)
    if BY_NAME[name].block_size > 1:
        yield from launches(lambda: dequantize(data, name, torch.bfloat16))
    form, x = _Form(name), torch.empty(4, HIDDEN)
    slots = torch.empty((2, form.num_bytes), dtype=torch.uint8)
    for num_choices in (8, GROUPED_CHOICES):
        choice = torch.zeros(num_choices, dtype=torch.int32)
        found = launches(lambda choice=choice: expert_choices(x, slots, form, choice, choice))
        yield from {each.kernel.__name__: each for each in found}.values()


def _of_all() -> Iterator[Launch]:
    """The others."""
    x, weight, angle = torch.empty(3, HIDDEN), torch.empty(HIDDEN), torch.empty(3, ROPE // 2)
    yield from launches(lambda: rms_norm(x, weight, 1e-5, delta=x, dtype=torch.bfloat16))
    yield from launches(lambda: rope(torch.empty(3, HEADS, 192)[:, :, 128:], angle, angle))
    yield from launches(lambda: swiglu(x, x))
    yield from launches(lambda: weighted_sum(torch.empty(3, 8, HIDDEN), torch.empty(3, 8), x))
    yield from launches(lambda: route(torch.empty(3, 384), torch.empty(384), 8))
    matrices = torch.empty((HEADS, RANK, BY_NAME["Q8_0"].row_bytes(128)), dtype=torch.uint8)
    yield from launches(lambda: heads_linear(torch.empty(1, HEADS, 192)[:, :, :128], matrices, "Q8_0"))
    data = torch.empty((64, BY_NAME["Q8_0"].row_bytes(HIDDEN)), dtype=torch.uint8)
    yield from launches(lambda: linear(torch.empty(512, HIDDEN), data, "Q8_0", HIDDEN))
    for dtype in (torch.bfloat16, torch.uint8):
        row = row_bytes("q8", RANK + ROPE) if dtype == torch.uint8 else RANK + ROPE
        storage = torch.empty((2, 64, row), dtype=dtype)
        slots, table, kv = (
            torch.zeros(3, dtype=torch.int64),
            torch.zeros((3, 9), dtype=torch.int32),
            torch.empty(3, RANK + ROPE),
        )
        q = (torch.empty(3, HEADS, RANK), torch.empty(3, HEADS, ROPE))
        yield from launches(
            lambda kv=kv, s=storage, i=slots: write_latent(kv, torch.empty(RANK), 1e-5, angle, angle, s, i)
        )
        yield from launches(lambda q=q, s=storage, t=table: mla_decode(*q, s, t, t[:, 0].contiguous(), 0.1))


def _stack_bytes(machine_code: bytes) -> int:
    """What a thread keeps in memory because it has no more registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return int(re.search(r"STACK:(\d+)", usage.stdout).group(1))


def _problem_of(launch: Launch, capability: int) -> str | None:
    """Compiles and prints; says why the GPU could not run the result, or only badly."""
    compiled, name = launch.compiled(capability), launch.kernel.__name__
    decode = launch.argument("DECODE") or launch.argument("G_DECODE")
    what = f"sm_{capability} {name}{f' of {decode.__name__}' if decode else ''}"
    shared, stack = compiled.metadata.shared, _stack_bytes(compiled.asm["cubin"])
    assert f".target sm_{capability}" in compiled.asm["ptx"], what
    size = len(compiled.asm["cubin"])
    print(f"{what}: {size} bytes of code, {shared} of shared memory, {stack} of stack", flush=True)
    if shared > SHARED_BYTES[capability]:
        return f"{what} wants {shared} bytes of shared memory; the GPU has {SHARED_BYTES[capability]}."
    if stack > STACK_BYTES.get(name, 0):
        return f"{what} spills registers: {stack} bytes of stack."
    return None


def main() -> None:
    is_all = "--all" in sys.argv
    found = [*_of_all(), *(launch for name in (BY_NAME if is_all else ["TQ1_0"]) for launch in _of_type(name))]
    jobs = [(launch, capability) for launch in found for capability in SHARED_BYTES]
    if not is_all:
        jobs += [(launch, 89) for name in MORE_TYPES for launch in _products(name)]
    problems = [problem for job in jobs if (problem := _problem_of(*job))]
    print(f"{len(found)} launches compiled for both GPUs")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
