"""Compiles every launch of the hybrid path, at Kimi K2.5's sizes, for GPUs that this machine need not have.

    python -m tools.kernels.compile --sample                    # one type for an RTX 4090 and an H100: what CI does
    python -m tools.kernels.compile --arch 80,86,89,90,120      # every type of experts
    python -m tools.kernels.compile --triton 3.5.1 --arch 90    # with another Triton, fetched into a folder of its own
    python -m tools.kernels.compile --choose                    # warps of grouped products, counted by type

A line for each kernel, type, tile and GPU: registers and bytes spilled of a thread, shared memory, instructions, those
of tensor cores. What the compiler refuses, what spills, and what wants more shared memory than the GPU has, ends it
with an error. With TRITON_CACHE_DIR the code is kept there, and a machine with such a GPU and the same Triton compiles
nothing more.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import cache_folder
from kimi_lite.native.layouts import BY_NAME

# What one program may have: A100, RTX 3090, RTX 4090, H100, RTX 5090 (CUDA's programming guide, technical
# specifications per compute capability)
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
SAMPLE_TYPES, SAMPLE_ARCHS, SAMPLE_TOKENS = ("TQ1_0",), (89,), (1, 16, 129, 8192)
# Bytes that a thread may spill, by kernel and types; all others nothing. The product: Triton 3.5 and 3.6 alone
SPILLS = {
    ("grouped_kernel", "IQ2_XXS"): 16,
    ("gate_up_kernel", "NVFP4"): 8,
    ("q8_0_product_kernel", ""): 8,
    ("grouped_kernel", "IQ3_KT"): 24,
}

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a launch for a GPU."""

    arch: int
    kernel: str
    types: tuple[str, ...]
    tile: str
    num_warps: int
    registers: int = 0  # of a thread
    spilled_bytes: int = 0  # of a thread
    shared_bytes: int = 0  # of a program
    instructions: int = 0
    tensor_instructions: int = 0
    conversions: int = 0  # between integers and floats
    error: str = ""

    @property
    def problem(self) -> str:
        """Why a GPU could not run it, or only badly; empty where it can."""
        what = f"sm_{self.arch} {self.kernel} {' '.join(self.types)} {self.tile}"
        if self.error:
            return f"{what} is not compiled: {self.error}"
        if self.shared_bytes > SHARED_BYTES[self.arch]:
            return f"{what} wants {self.shared_bytes:,} bytes of shared memory; the GPU has {SHARED_BYTES[self.arch]:,}"
        limit = SPILLS.get((self.kernel, " ".join(self.types)), 0)
        if self.spilled_bytes > limit:
            return f"{what} spills {self.spilled_bytes} bytes a thread; allowed are {limit}"
        return ""

    def line(self) -> str:
        if self.error:
            return self.problem
        return (
            f"sm_{self.arch:<3} {self.kernel:20} {' '.join(self.types):14} {self.tile:34} "
            f"{self.num_warps} warps {self.registers:3} registers {self.spilled_bytes:3} spilled "
            f"{self.shared_bytes:6} shared {self.instructions:5} instructions {self.tensor_instructions:3} tensor "
            f"{self.conversions:3} conversions"
        )


@app.command()
def main(
    types: Annotated[str, typer.Option(help="Of experts, comma-separated, e.g. tq1_0,q4_k. Default: all.")] = "",
    arch: Annotated[str, typer.Option(help="Compute capabilities, comma-separated: 89 is an RTX 4090.")] = "",
    triton: Annotated[str, typer.Option(help="Another version of Triton, from PyPI into a folder of its own.")] = "",
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = os.cpu_count() or 1,
    sample: Annotated[bool, typer.Option("--sample", help="One type of experts, two GPUs.")] = False,
    choose: Annotated[bool, typer.Option("--choose", help="Count grouped products with 4 and 8 warps.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write the table as JSON.")] = None,
) -> None:
    """Compile every launch of the hybrid path for GPUs, and count registers, spills and instructions."""
    try:
        if triton:
            sys.exit(_with_triton(triton))
        names = _known(types) or (SAMPLE_TYPES if sample else tuple(BY_NAME))
        archs = tuple(int(each) for each in arch.split(",") if each) or SAMPLE_ARCHS
        if not set(archs) <= set(SHARED_BYTES):
            raise KimiLiteError(f"--arch {arch}: unknown.", f"Choose from {', '.join(map(str, SHARED_BYTES))}.")
        launches = _choices(names) if choose else _launches(names, sample)
        tasks = [(index, arch) for arch in archs for index in range(len(launches))]
        if sample:  # what has no tensor cores differs little between GPUs
            tasks = [(i, arch) for i, arch in tasks if arch == archs[0] or launches[i].uses_tensor_cores]
        found = _compile(launches, tasks, jobs)
    except KimiLiteError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    if out:
        out.write_text(json.dumps([asdict(each) for each in found], indent=1), encoding="utf-8")
    problems = [each.problem for each in found if each.problem]
    import triton as installed

    print(f"triton {installed.__version__}: {len(found)} compilations, {len(problems)} problems")
    sys.exit("\n".join(problems) or 0)


def _known(types: str) -> tuple[str, ...]:
    names = tuple(name.strip().upper() for name in types.split(",") if name.strip())
    for name in names:
        if name not in BY_NAME:
            raise KimiLiteError(f"There is no type {name!r}.", f"Choose from {', '.join(BY_NAME).lower()}.")
    return names


def _with_triton(version: str) -> int:
    """This command again in a process that finds another Triton first. Raises KimiLiteError."""
    folder = cache_folder() / "triton" / version
    if not (folder / "triton").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        if subprocess.run([*command, f"triton=={version}"]).returncode:
            raise KimiLiteError(f"Triton {version} could not be fetched.", "pip index versions triton lists them.")
    arguments = [each for i, each in enumerate(sys.argv[1:], 1) if "--triton" not in (each, sys.argv[i - 1])]
    arguments = [each for each in arguments if not each.startswith("--triton=")]
    paths = [str(folder), os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, "-m", "kimi_lite.tools.kernels.compile", *arguments], env=environment
    ).returncode


def _launches(names: Sequence[str], is_sample: bool) -> list:
    from kimi_lite.tools.kernels.launches import CACHE_DTYPES, runtime_launches

    if is_sample:
        return runtime_launches(names, caches=("f16", "q8"), tokens=SAMPLE_TOKENS)
    return runtime_launches(names, ("Q8_0", "BF16", "Q6_K", "Q4_K"), ("f16", *(set(CACHE_DTYPES) - {"f16"})))


def _choices(names: Sequence[str]) -> list:
    """Grouped products of 64 choices a block, with four and with eight warps."""
    found = [each for each in _launches(names, False) if each.kernel.__name__ == "grouped_kernel"]
    largest = [each for each in found if each.named["CHOICES"] == 64 and each.named["IS_GATHERED"]]
    return [each._replace(named=each.named | {"num_warps": warps}) for each in largest for warps in (4, 8)]


def _compile(launches: list, tasks: Sequence[tuple[int, int]], jobs: int) -> list[Compiled]:
    """(number of a launch, capability) in so many processes; the lines are printed as they come."""
    found = []
    with ProcessPoolExecutor(jobs, get_context("fork"), _keep, (launches,)) as pool:
        for each in pool.map(_compiled, tasks, chunksize=1):
            print(each.line(), flush=True)
            found.append(each)
    return found


_kept: list = []  # of a worker process


def _keep(launches: list) -> None:
    _kept[:] = launches


def _compiled(task: tuple[int, int]) -> Compiled:
    index, arch = task
    launch = _kept[index]
    warps = launch.named.get("num_warps", 4)
    what = {"arch": arch, "kernel": launch.kernel.__name__, "types": launch.types, "tile": _tile(launch)}
    try:
        code = launch.compiled(arch)
    except Exception as error:  # whatever the compiler says is the result
        return Compiled(**what, num_warps=warps, error=f"{type(error).__name__}: {str(error).strip()[:200]}")
    assert f".target sm_{arch}" in code.asm["ptx"], what
    if launch.is_exact and (found := inexact(code.asm["ptx"])):
        return Compiled(**what, num_warps=warps, error=f"it promises the CPU's bits and has {', '.join(found)}")
    return Compiled(**what, num_warps=warps, shared_bytes=code.metadata.shared, **_counts(code.asm["cubin"]))


def inexact(ptx: str) -> list[str]:
    """The instructions on float32 that round otherwise than IEEE says, or that the assembler may fuse: those that name
    no rounding (PTX ISA, "add": only then may a product and a sum become one), flush denormals, or approximate."""
    names = sorted(set(re.findall(r"^\s*(?:@%p\d+ )?([a-z]\w*(?:\.\w+)*\.f32(?:x2)?)\b", ptx, re.MULTILINE)))
    is_rounded = re.compile(r"(add|sub|mul|fma|div)\.rn\.f32(x2)?$")
    rounds = re.compile(r"(add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2|lg2|tanh|sin|cos)\b")
    return [name for name in names if rounds.match(name) and not is_rounded.match(name)]


def _tile(launch) -> str:
    """The compile-time sizes that tell a kernel's variants apart."""
    wanted = ("CHOICES", "TOKENS", "BLOCK_TOKENS", "BLOCK_ROWS", "ROWS", "TILE", "G_TILE", "POSITIONS", "TOP_K", "K")
    sizes = [f"{name.lower()} {value}" for name in wanted if isinstance(value := launch.argument(name), int)]
    return ", ".join(sizes)


def _counts(machine_code: bytes) -> dict[str, int]:
    """Of a cubin, by the disassembler that comes with Triton."""
    from triton import knobs

    def dump(option: str, path: str) -> str:
        command = [knobs.nvidia.cuobjdump.path, option, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        usage, code = dump("-res-usage", file.name), dump("-sass", file.name)
    names = list(_instructions(code))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "instructions": len(names),
        "tensor_instructions": sum(name in ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA") for name in names),
        "conversions": sum(name in ("I2F", "I2FP", "F2I") for name in names),
    }


def _instructions(code: str) -> Iterator[str]:
    for found in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.MULTILINE):
        yield found.group(1)


if __name__ == "__main__":
    app()
