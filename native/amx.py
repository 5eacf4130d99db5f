"""Matrix tiles of x86 (AMX): eight registers of 16 rows of 64 bytes, and products of two of them, added up in a third.

One instruction multiplies 16 x 64 bytes with 64 x 16: 16,384 products in 16 cycles, eight times what the vectors of
the same core do. The first factor is rows of bytes as they lie in memory; of the second, a row holds four bytes of each
of 16 columns (`native.cpu.packing`). A process asks the system for the registers once (`has_amx`). A kernel sets their
shapes before it uses them, and lets go of them at its end: the next thread on the core then saves 8 KiB less.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kimi_lite.native.isa import AVX512_VNNI, isa, target_features
from kimi_lite.native.vectors import pointer

TILE_ROWS, TILE_BYTES = 16, 64  # of a row
_I8, _I64 = ir.IntType(8), ir.IntType(64)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # x86-64 Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, ...)


@cache
def has_amx() -> bool:
    """Whether kernels may use the tiles: the CPU that is compiled for has them, and the system lets this process.

    Threads and processes that are started later inherit the permission. `KIMI_LITE_AMX=0` leaves the tiles alone;
    `compile` asks no system: this process compiles for others and runs none of it (`tools.make.kernels`).
    """
    asked = os.environ.get("KIMI_LITE_AMX")
    if asked == "0":
        return False
    if isa().name != AVX512_VNNI or not {"amx-tile", "amx-int8"} <= target_features():
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return asked == "compile" or ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


class Shape(NamedTuple):
    """Of a tile: rows, and bytes of a row."""

    rows: int = TILE_ROWS
    row_bytes: int = TILE_BYTES


def shapes(*tiles: Shape) -> Callable:
    """Makes `f()`: tile i gets the i-th shape, and zeros."""
    config = bytearray(64)
    config[0] = 1  # palette 1: tiles
    for i, tile in enumerate(tiles):
        config[16 + 2 * i] = tile.row_bytes
        config[48 + i] = tile.rows

    @intrinsic
    def set_shapes(typingctx):
        def codegen(context, builder, sig, args):
            memory = cgutils.global_constant(builder.module, ".tile_shapes", ir.Constant(ir.ArrayType(_I8, 64), config))
            _call(builder, "llvm.x86.ldtilecfg", builder.bitcast(memory, _I8.as_pointer()))
            return context.get_dummy_value()

        return types.void(), codegen

    return set_shapes


@intrinsic
def release_tiles(typingctx):
    """Behind the last use: the tiles' contents are gone."""

    def codegen(context, builder, sig, args):
        _call(builder, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


# LLVM code of one instruction; tiles by number ------------------------------------------------------------------------


def _call(builder, name: str, *args) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _numbers(tiles: Sequence[int]) -> list[ir.Constant]:
    return [ir.Constant(_I8, tile) for tile in tiles]


def emit_zero(builder, tile: int) -> None:
    """By a load: in a loop of nothing else a product behind `tilezero` was slower at times (tools/LOG.md)."""
    kind = ir.ArrayType(_I8, TILE_ROWS * TILE_BYTES)
    name = ".tile_of_zeros"
    if name not in builder.module.globals:
        memory = cgutils.add_global_variable(builder.module, kind, name)
        memory.linkage, memory.global_constant, memory.align = "private", True, 64
        memory.initializer = ir.Constant(kind, None)
    zeros = builder.bitcast(builder.module.globals[name], _I8.as_pointer())
    _call(builder, "llvm.x86.tileloadd64", *_numbers([tile]), zeros, ir.Constant(_I64, TILE_BYTES))


def emit_load(builder, tile: int, address, stride: int) -> None:
    _call(builder, "llvm.x86.tileloadd64", *_numbers([tile]), pointer(builder, address, _I8), ir.Constant(_I64, stride))


def emit_store(builder, tile: int, address, stride: int) -> None:
    _call(
        builder, "llvm.x86.tilestored64", *_numbers([tile]), pointer(builder, address, _I8), ir.Constant(_I64, stride)
    )


def emit_product(builder, total: int, first: int, second: int, is_signed: bool) -> None:
    """total += first x second, int32: bytes of the second are signed, those of the first as said."""
    _call(builder, f"llvm.x86.tdpb{'s' if is_signed else 'u'}sd", *_numbers([total, first, second]))
