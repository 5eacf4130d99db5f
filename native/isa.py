"""What this CPU has, and which dot-product instruction the kernels use. `kimi-lite doctor` prints `describe()`.

Kernels are compiled by Numba for the CPU it targets (`NUMBA_CPU_NAME` / `NUMBA_CPU_FEATURES` override the host, which
is how the AVX2 path is tested on a newer machine), so the same source of truth is read here.
"""

import platform
from functools import cache
from typing import NamedTuple

AVX512_VNNI, AVX_VNNI, AVX2, PORTABLE = "avx512-vnni", "avx-vnni", "avx2", "portable"


class SumOrder(NamedTuple):
    """In which order this CPU adds up a row (`native.cpu.dot`); a GPU that works with it does the same.

    `row_lanes`: float32 sums of a row of super-blocks: 16, or 8 where registers hold 32 bytes and are few. `bias`: what
    is added to signed codes of 8 bits and to those of tables, because the product wants them unsigned: 128 or 0.
    """

    row_lanes: int
    bias: int


class Isa(NamedTuple):
    """`name` is one of the four paths; `instruction` is the int8 dot product that the kernels emit on it."""

    name: str
    instruction: str
    cpu: str


@cache
def target_features() -> frozenset[str]:
    """LLVM feature names of the CPU that Numba compiles for, e.g. {"avx2", "avx512vnni"}."""
    import llvmlite.binding as llvm
    from numba.core import config

    if config.CPU_FEATURES is not None:
        return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+"))
    return frozenset(name for name, is_on in llvm.get_host_cpu_features().items() if is_on)


@cache
def isa() -> Isa:
    """The path of this process: the best that the target CPU's features allow."""
    from llvmlite import binding as llvm
    from numba.core import config

    cpu = config.CPU_NAME or llvm.get_host_cpu_name()
    features = target_features()
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return Isa(PORTABLE, "generic vector code", cpu)
    if {"avx512vnni", "avx512bw", "avx512vl"} <= features:
        return Isa(AVX512_VNNI, "vpdpbusd zmm", cpu)
    if "avxvnni" in features:
        return Isa(AVX_VNNI, "vpdpbusd ymm", cpu)
    if "avx2" in features:
        return Isa(AVX2, "vpmaddubsw ymm", cpu)
    return Isa(PORTABLE, "generic vector code", cpu)


def sum_order() -> SumOrder:
    """Of the path of this process. 8 sums cost AVX-512 a cycle a block, 16 are spilled on AVX2 (tools/LOG.md)."""
    name = isa().name
    return SumOrder(8 if name in (AVX2, AVX_VNNI) else 16, 128 if name in (AVX512_VNNI, AVX_VNNI) else 0)
