"""The codebooks of the IQ1, IQ2 and IQ3 types, compiled into the kernels that use them.

A weight group (8 weights, or 4 for IQ3) is stored as an index into a fixed list of points. The lists come from the
`gguf` package and become constants of the LLVM module, so a kernel from Numba's disk cache carries its own and `gguf`
is imported only while a kernel compiles.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kimi_lite.native.isa import isa, target_features
from kimi_lite.native.types.code_books import code_book
from kimi_lite.native.vectors import call_llvm, i8x64, pointer

_BYTE, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


@cache
def codebook(name: str) -> np.ndarray:
    """The points of a type as unsigned codes: int64 (N, 8 or 4). IQ1's -1, 0, 1 become 0, 8, 16, as 1/8 is added.

    IQ1_M's are listed twice, first plus 1/8, then minus: 2 and 0 more, as codes are unsigned.
    """
    if name == "IQ1_M":
        return np.concatenate([codebook("IQ1_S") + 2, codebook("IQ1_S")])
    return 8 * (code_book(name) + 1) if name == "IQ1_S" else code_book(name)


def _constant_table(module: ir.Module, name: str, element: ir.IntType, values: list[int]) -> ir.GlobalVariable:
    """The module's constant array `name`, made on first use."""
    if name in module.globals:
        return module.globals[name]
    kind = ir.ArrayType(element, len(values))
    table = ir.GlobalVariable(module, kind, name)
    table.linkage, table.global_constant, table.unnamed_addr = "internal", True, True
    table.align, table.initializer = 64, ir.Constant(kind, values)
    return table


def _load(builder, address, offset: int, kind: ir.IntType):
    value = builder.load(pointer(builder, builder.add(address, ir.Constant(address.type, offset)), kind))
    value.align = 1
    return value


def _join(builder, parts: list):
    """Equal vectors side by side, pair by pair."""
    while len(parts) > 1:
        lanes = ir.Constant(ir.VectorType(_I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(low, high, lanes) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _points(builder, name: str, indices: list):
    """The points of 8 or 16 scalar indices, joined to 64 bytes. One load each: gather instructions are half as fast.

    Points of 8 bytes pass for doubles, which x86 can load into either half of a register.
    """
    wide, per_part = ir.IntType(64), len(indices) // 4
    bits, element = (64, ir.DoubleType()) if per_part == 2 else (32, _I32)
    values = codebook(name).astype(np.uint8).view(f"<u{bits // 8}").ravel().tolist()
    table = _constant_table(builder.module, f"kimi_lite_{name}", ir.IntType(bits), values)
    parts = []
    for first in range(0, len(indices), per_part):
        part = ir.Constant(ir.VectorType(element, per_part), ir.Undefined)
        for lane in range(per_part):
            place = builder.gep(table, [ir.Constant(wide, 0), builder.zext(indices[first + lane], wide)], inbounds=True)
            point = builder.load(builder.bitcast(place, element.as_pointer()))
            part = builder.insert_element(part, point, ir.Constant(_I32, lane))
        parts.append(part)
    return builder.bitcast(_join(builder, parts), i8x64.llvm)


def points_at(name: str, offsets: tuple[int, ...]):
    """Makes `f(address)`: the 64 codes of the points whose indices are the bytes at `address + offsets`."""

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            return _points(builder, name, [_load(builder, args[0], offset, _BYTE) for offset in offsets])

        return i8x64(types.int64), codegen

    return read


def points_of_words(name: str, mask: int):
    """Makes `f(address)`: the codes of 8 points whose indices are the masked 16-bit words there."""
    word = ir.IntType(16)

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            indices = [_load(builder, args[0], 2 * i, word) for i in range(8)]
            return _points(builder, name, [builder.and_(index, ir.Constant(word, mask)) for index in indices])

        return i8x64(types.int64), codegen

    return read


def _has_fast_deposit() -> bool:
    """Whether `pdep` is one instruction, not the 19 to 250 cycles of microcode that AMD had before Zen 3."""
    return "bmi2" in target_features() and isa().cpu not in ("bdver4", "znver1", "znver2")


def _split_by_shifts(builder, low, high, num_indices: int, index_bits: int, step: int):
    """Index i: byte i at `low`, and above it the bits of `high` from i * step on."""
    indices = []
    for i in range(num_indices):
        shift = 8 - i * step
        move, count = (builder.shl, shift) if shift >= 0 else (builder.lshr, -shift)
        upper = builder.and_(move(high, ir.Constant(_I32, count)), ir.Constant(_I32, (1 << index_bits) - 256))
        indices.append(builder.or_(builder.zext(_load(builder, low, i, _BYTE), _I32), upper))
    return indices


def _split_by_deposit(builder, low, high, num_indices: int, index_bits: int, step: int):
    """The same, four at a time: `pdep` spreads their bits in half the instructions."""
    indices, lanes = [], 0x0001_0001_0001_0001

    def deposit(value, mask: int):
        return call_llvm(
            builder, "llvm.x86.bmi.pdep.64", _I64, [builder.zext(value, _I64), ir.Constant(_I64, mask * lanes)]
        )

    for first in range(0, num_indices, 4):
        bits = builder.lshr(high, ir.Constant(_I32, first * step))
        upper = builder.and_(
            deposit(bits, ((1 << step) - 1) << 8), ir.Constant(_I64, ((1 << index_bits) - 256) * lanes)
        )
        four = builder.or_(deposit(_load(builder, low, first, _I32), 255), upper)
        indices += [builder.trunc(builder.lshr(four, ir.Constant(_I64, 16 * i)), ir.IntType(16)) for i in range(4)]
    return indices


def points_split(name: str, high_bits: int, num_half: int, step: int, index_bits: int):
    """Makes `f(low, high)`: the codes of 2 * num_half points whose indices are bytes at `low`, extended by bits at
    `high`.

    There, two words of `high_bits` serve half of the points each, `step` bits a point; an index has `index_bits` in
    all.
    """

    @intrinsic
    def read(typingctx, low, high):
        def codegen(context, builder, sig, args):
            split = _split_by_deposit if _has_fast_deposit() else _split_by_shifts
            indices = []
            for half in range(2):
                word = builder.zext(_load(builder, args[1], half * high_bits // 8, ir.IntType(high_bits)), _I32)
                first = builder.add(args[0], ir.Constant(args[0].type, half * num_half))
                indices += split(builder, first, word, num_half, index_bits, step)
            return _points(builder, name, indices)

        return i8x64(types.int64, types.int64), codegen

    return read


iq2_xxs_points = points_at("IQ2_XXS", (0, 1, 2, 3, 8, 9, 10, 11))  # 4 indices, 4 bytes of signs and scale, ...
iq3_xxs_points = points_at("IQ3_XXS", tuple(range(16)))
iq2_xs_points = points_of_words("IQ2_XS", 511)
iq2_s_points, iq3_s_points = points_split("IQ2_S", 8, 4, 2, 10), points_split("IQ3_S", 8, 8, 1, 9)
iq1_s_points, iq1_m_points = points_split("IQ1_S", 16, 4, 3, 11), points_split("IQ1_S", 16, 4, 4, 11)
iq1_m_signed_points = points_split("IQ1_M", 16, 4, 4, 12)
