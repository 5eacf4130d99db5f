"""Codebooks as registers: on CPUs with AVX-512 VBMI a point is found by permuting bytes, without any load that depends
on data.

A point's values are 2 or 3-bit codes packed into 16 bits. The whole list fills 8 to 32 registers' worth of constants; a
look-up permutes two at a time and keeps, by masks of the index bits, the half that holds the point. Then 8 weights at a
time, their codes are shifted into bytes and replaced by values, both one instruction.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kimi_lite.native.codebooks import codebook
from kimi_lite.native.isa import AVX512_VNNI, isa, target_features
from kimi_lite.native.vectors import call_llvm, constant, i8x32, i8x64, i16x32

HAS_BYTE_PERMUTES = isa().name == AVX512_VNNI and {"avx512vbmi", "gfni"} <= target_features()
_I32 = ir.IntType(32)


def _packed(name: str) -> np.ndarray:
    """uint16 (N,): a point's codes, the first in the lowest bits."""
    points = codebook(name)
    codes = np.searchsorted(np.unique(points), points)  # (N, 8 or 4)
    bits = 16 // points.shape[1] if points.shape[1] == 8 else 3
    return (codes << (bits * np.arange(points.shape[1]))).sum(1).astype(np.uint16)


def _tree(builder, permute, tables: list, is_set: list):
    """One look-up per pair of tables, then selections by the index bits from the lowest up."""
    found = [permute(*tables[i : i + 2]) for i in range(0, len(tables), 2)]
    for mask in is_set:
        found = [builder.select(mask, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _bit_is_set(builder, vec, value, bit: int):
    return builder.icmp_unsigned("!=", builder.and_(value, constant(vec, 1 << bit)), constant(vec, 0))


def find_words(name: str):
    """Makes `f(indices i16x32)`: the packed points, i16x32."""

    @intrinsic
    def find(typingctx, indices):
        def codegen(context, builder, sig, args):
            words = _packed(name)
            tables = [constant(i16x32, words[i : i + 32].tolist()) for i in range(0, len(words), 32)]
            llvm_name = "llvm.x86.avx512.vpermi2var.hi.512"
            bits = range(6, len(words).bit_length() - 1)
            is_set = [_bit_is_set(builder, i16x32, args[0], bit) for bit in bits]
            return _tree(
                builder, lambda a, b: call_llvm(builder, llvm_name, i16x32.llvm, [a, args[0], b]), tables, is_set
            )

        return i16x32(i16x32), codegen

    return find


def find_bytes(name: str, shift: int):
    """Makes `f(indices i8x64, ninth uint64)`: bits shift .. shift + 7 of the packed points. Bit i of `ninth` extends
    index i."""

    @intrinsic
    def find(typingctx, indices, ninth):
        def codegen(context, builder, sig, args):
            part = (_packed(name) >> shift & 255).astype(np.uint8)
            tables = [constant(i8x64, part[i : i + 64].tolist()) for i in range(0, len(part), 64)]
            llvm_name = "llvm.x86.avx512.vpermi2var.qi.512"
            is_set = [_bit_is_set(builder, i8x64, args[0], 7)]
            if len(part) > 256:
                is_set.append(builder.bitcast(args[1], ir.VectorType(ir.IntType(1), 64)))
            return _tree(
                builder, lambda a, b: call_llvm(builder, llvm_name, i8x64.llvm, [a, args[0], b]), tables, is_set
            )

        return i8x64(i8x64, types.uint64), codegen

    return find


def _values(builder, name: str, qwords, shifts: list[int]):
    """Codes at the bit positions `shifts` of every 8 bytes, replaced by their values. Higher bits in a byte do not
    matter."""
    spread = call_llvm(builder, "llvm.x86.avx512.pmultishift.qb.512", i8x64.llvm, [constant(i8x64, shifts * 8), qwords])
    values = np.unique(codebook(name)).tolist()
    values += [0] * (4 - len(values) if len(values) < 4 else 0)
    table = constant(i8x64, values * (64 // len(values)))
    return call_llvm(builder, "llvm.x86.avx512.permvar.qi.512", i8x64.llvm, [table, spread])


def expand_words(name: str):
    """Makes `f(points i16x32, chunk)`: the chunk's 64 values, of 8 points with 2-bit codes."""

    @intrinsic(prefer_literal=True)
    def expand(typingctx, points, chunk):
        if not isinstance(chunk, types.IntegerLiteral):
            return None
        lanes = [lane for i in range(8) for lane in (8 * chunk.literal_value + i, 0, 0, 0)]

        def codegen(context, builder, sig, args):
            picked = call_llvm(
                builder, "llvm.x86.avx512.permvar.hi.512", i16x32.llvm, [args[0], constant(i16x32, lanes)]
            )
            return _values(builder, name, builder.bitcast(picked, i8x64.llvm), list(range(0, 16, 2)))

        return i8x64(i16x32, chunk), codegen

    return expand


def expand_bytes(name: str):
    """Makes `f(low i8x64, high i8x64, chunk)`: the chunk's 64 values, of 16 points with 3-bit codes."""

    @intrinsic(prefer_literal=True)
    def expand(typingctx, low, high, chunk):
        if not isinstance(chunk, types.IntegerLiteral):
            return None
        first = 16 * chunk.literal_value
        lanes = [lane for i in range(first, first + 16, 2) for lane in (i, 64 + i, i + 1, 65 + i, 0, 0, 0, 0)]

        def codegen(context, builder, sig, args):
            name_of_permute = "llvm.x86.avx512.vpermi2var.qi.512"
            picked = call_llvm(builder, name_of_permute, i8x64.llvm, [args[0], constant(i8x64, lanes), args[1]])
            return _values(builder, name, picked, [0, 3, 6, 9, 16, 19, 22, 25])

        return i8x64(i8x64, i8x64, chunk), codegen

    return expand


def sign_fields(vec, positions: tuple[int, ...]):
    """Makes `f(bits)`: the 7 bits from each of 8 positions in every 8 bytes, with an 8th that makes their number
    even."""
    # A bit matrix, its first byte for the highest result bit: each byte masks the bits whose sum a result bit is.
    rows = [0x7F] + [1 << bit for bit in range(6, -1, -1)]
    width = 8 * vec.lanes

    @intrinsic
    def take(typingctx, bits):
        def codegen(context, builder, sig, args):
            shift = f"llvm.x86.avx512.pmultishift.qb.{width}"
            fields = call_llvm(builder, shift, vec.llvm, [constant(vec, [*positions] * (vec.lanes // 8)), args[0]])
            matrix = constant(vec, rows * (vec.lanes // 8))
            affine = ir.FunctionType(vec.llvm, [vec.llvm, vec.llvm, ir.IntType(8)])
            function = cgutils.get_or_insert_function(builder.module, affine, f"llvm.x86.vgf2p8affineqb.{width}")
            return builder.call(function, [fields, matrix, ir.Constant(ir.IntType(8), 0)])

        return vec(vec), codegen

    return take


iq2_xxs_sign_fields = sign_fields(i8x64, (32, 39, 46, 53) * 2)
iq2_xs_sign_fields = sign_fields(i8x64, (9, 25, 41, 57) * 2)
iq3_xxs_sign_fields = sign_fields(i8x32, (0, 7, 14, 21, 32, 39, 46, 53))
find_iq2_xxs, expand_iq2 = find_words("IQ2_XXS"), expand_words("IQ2_XXS")
find_iq3_xxs_low, find_iq3_xxs_high = find_bytes("IQ3_XXS", 0), find_bytes("IQ3_XXS", 8)
find_iq3_s_low, find_iq3_s_high = find_bytes("IQ3_S", 0), find_bytes("IQ3_S", 8)
expand_iq3_xxs, expand_iq3_s = expand_bytes("IQ3_XXS"), expand_bytes("IQ3_S")
