"""SIMD for unpacking quantized blocks: bit fields, byte tables, masks. Continues `native.simd`."""

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kimi_lite.native.isa import AVX512_VNNI, PORTABLE, isa, target_features
from kimi_lite.native.vectors import (
    Vec,
    call_llvm,
    constant,
    converter,
    f32x8,
    f32x16,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i32x16,
    in_halves,
    pointer,
    shuffler,
    shuffler_of_two,
    splat,
)

_BYTE, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)

# Conversions and shuffles ---------------------------------------------------------------------------------------------

widen16_i8x16, widen16_signed_i8x16 = converter(i8x16, i16x16, "zext"), converter(i8x16, i16x16, "sext")
twice_each_i8x16 = shuffler_of_two(i8x16, i8x64, [*range(16)] * 2 + [*range(16, 32)] * 2)  # (a, b) -> a a b b
four_times_each_word = shuffler(
    i8x16, i8x64, [4 * (i // 16) + i % 4 for i in range(64)]
)  # 4 bytes 4 times, the next 4 ...
by_fours_i8x64 = shuffler(
    i8x64, i8x64, [16 * (i // 16) + 4 * (i % 4) + i // 4 % 4 for i in range(64)]
)  # 0 4 8 12 1 5 ...
twice_each_quad = shuffler(
    i8x32, i8x64, [16 * (i // 32) + 8 * (i // 16 % 2) + i % 8 for i in range(64)]
)  # 8 bytes twice
_LANES = [[*range(16 * k, 16 * k + 16)] for k in range(8)]  # of two vectors of 64 bytes
third_parts = shuffler_of_two(i8x64, i8x64, _LANES[4] + _LANES[5] + _LANES[2] + _LANES[2])  # used by TQ1_0: see there
fourth_parts = shuffler_of_two(i8x64, i8x64, _LANES[2] + _LANES[2] + _LANES[6] + [48, 49, 50, 51] * 4)
low_i8x32 = shuffler(i8x32, i8x16, range(16))
upper_i8x16 = shuffler(i8x16, i8x16, [8 + i % 8 for i in range(16)])  # the last 8 bytes, twice
twice_each_byte = shuffler(i8x16, i8x16, [i // 2 for i in range(16)])  # 0 0 1 1 ... of the first 8
twice_each_f32x8 = shuffler(f32x8, f32x16, [i // 2 for i in range(16)])


_HAS_BIT_MATRICES = "gfni" in target_features() and isa().name != PORTABLE


def bit_fields(mask: int, *shifts: int):
    """Makes `f(codes)`: i8x64 of (byte >> shift) & mask, a shift for each equal run of lanes; left where it is
    negative.

    With GFNI one instruction multiplies each byte by a matrix of bits, one matrix for 8 bytes. Else words of 32 bits
    are shifted: what crosses from byte to byte is masked out.
    """
    assert all(shift >= 0 for shift in shifts) or all(shift <= 0 for shift in shifts), shifts
    run = 64 // len(shifts)

    @intrinsic
    def extract(typingctx, codes):
        def codegen(context, builder, sig, args):
            if _HAS_BIT_MATRICES and run >= 8:
                return _by_matrix(builder, args[0], [_bit_matrix(mask, shifts[8 * q // run]) for q in range(8)])
            counts = constant(i32x16, [abs(shifts[4 * lane // run]) for lane in range(16)])
            shift = builder.lshr if max(shifts) > 0 else builder.shl
            shifted = builder.bitcast(shift(builder.bitcast(args[0], i32x16.llvm), counts), i8x64.llvm)
            return builder.and_(shifted, constant(i8x64, mask))

        return i8x64(i8x64), codegen

    return extract


def _bit_matrix(mask: int, shift: int) -> list[int]:
    """The 8 rows of vgf2p8affineqb, last bit first: bit i of the result is bit i + shift, where the mask has it."""
    rows = [1 << i + shift if mask >> i & 1 and 0 <= i + shift < 8 else 0 for i in range(8)]
    return rows[::-1]


def _by_matrix(builder, codes, matrices: list[list[int]]):
    all_rows = constant(i8x64, [row for matrix in matrices for row in matrix])
    zero = ir.Constant(_BYTE, 0)
    if isa().name == AVX512_VNNI:
        return call_llvm(builder, "llvm.x86.vgf2p8affineqb.512", i8x64.llvm, [codes, all_rows, zero])
    parts = zip(in_halves(builder, codes, 64), in_halves(builder, all_rows, 64), strict=True)
    products = [call_llvm(builder, "llvm.x86.vgf2p8affineqb.256", i8x32.llvm, [*part, zero]) for part in parts]
    return builder.shuffle_vector(*products, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))


def opaque(builder, value):
    """The same vector, through no instruction, where the optimizer cannot see."""
    kind = ir.FunctionType(value.type, [value.type])
    return builder.asm(
        kind, "", "=x,0" if value.type.count * value.type.element.width < 512 else "=v,0", [value], False
    )


def in_order(builder, value):
    """The same vector, made in this order. Else LLVM unpacks a whole block at once and runs out of 16 registers."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=x,0", [value], True)


def opaque_mask(builder, mask):
    """The same 64 flags, in a mask register of AVX-512, where the optimizer cannot see."""
    bits = ir.IntType(64)
    same = builder.asm(ir.FunctionType(bits, [bits]), "", "=k,0", [builder.bitcast(mask, bits)], False)
    return builder.bitcast(same, mask.type)


# Tables and masks
# ------------------------------------------------------------------------------------------------------


def _select_from(builder, table: Sequence[int], codes):
    """A table look-up as 15 selections, for targets without a byte shuffle."""
    vec = codes.type
    result = ir.Constant(vec, [table[0]] * vec.count)
    for code, value in enumerate(table[1:], 1):
        is_code = builder.icmp_unsigned("==", codes, ir.Constant(vec, [code] * vec.count))
        result = builder.select(is_code, ir.Constant(vec, [value] * vec.count), result)
    return result


def _by_low_nibbles(builder, values: Sequence[int], codes):
    """i8x64 of bytes below 128 to the one of 16 values that their low nibble names (vpshufb)."""
    if isa().name == AVX512_VNNI:
        table = ir.Constant(i8x64.llvm, [*values] * 4)
        return call_llvm(builder, "llvm.x86.avx512.pshuf.b.512", i8x64.llvm, [table, codes])
    table = ir.Constant(i8x32.llvm, [*values] * 2)
    parts = in_halves(builder, codes, 64)
    looked_up = [call_llvm(builder, "llvm.x86.avx2.pshuf.b", i8x32.llvm, [table, part]) for part in parts]
    return builder.shuffle_vector(*looked_up, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))


def byte_table(values: Sequence[int]):
    """Makes `f(codes)`: i8x64 of codes 0..15 to i8x64 of `values` (vpshufb)."""
    assert len(values) == 16, values

    @intrinsic
    def look_up(typingctx, codes):
        def codegen(context, builder, sig, args):
            if isa().name == PORTABLE:
                return _select_from(builder, values, args[0])
            return _by_low_nibbles(builder, values, args[0])

        return i8x64(i8x64), codegen

    return look_up


HAS_BYTE_PERMUTES = isa().name == AVX512_VNNI and "avx512vbmi" in target_features()


def byte_table_256(values: Sequence[int]):
    """Makes `f(codes)`: i8x64 of any bytes to i8x64 of `values`, two look-ups of 128 (vpermi2b). Needs
    HAS_BYTE_PERMUTES."""
    assert len(values) == 256, len(values)

    @intrinsic
    def look_up(typingctx, codes):
        def codegen(context, builder, sig, args):
            quarters = [ir.Constant(i8x64.llvm, [*values[i : i + 64]]) for i in range(0, 256, 64)]
            name = "llvm.x86.avx512.vpermi2var.qi.512"
            is_high = builder.icmp_signed("<", args[0], constant(i8x64, 0))
            is_low = opaque_mask(
                builder, builder.not_(is_high)
            )  # apart, so that each select becomes a permutation's mask
            high = call_llvm(builder, name, i8x64.llvm, [quarters[2], args[0], quarters[3]])
            half_done = builder.select(is_high, high, args[0])
            low = call_llvm(builder, name, i8x64.llvm, [quarters[0], half_done, quarters[1]])
            return builder.select(is_low, low, half_done)

        return i8x64(i8x64), codegen

    return look_up


def wide_byte_table(values: Sequence[int]):
    """Makes `f(codes)`: i8x64 of codes below 32 or 64 to i8x64 of as many `values` (vpermb, or vpshufb and selects)."""
    assert len(values) in (32, 64), len(values)

    @intrinsic
    def look_up(typingctx, codes):
        def codegen(context, builder, sig, args):
            if isa().name == PORTABLE:
                return _select_from(builder, values, args[0])
            if HAS_BYTE_PERMUTES:
                table = ir.Constant(i8x64.llvm, [*values] * (64 // len(values)))
                return call_llvm(builder, "llvm.x86.avx512.permvar.qi.512", i8x64.llvm, [table, args[0]])
            found = [_by_low_nibbles(builder, values[i : i + 16], args[0]) for i in range(0, len(values), 16)]
            for bit in (16, 32)[: len(values) // 32]:
                is_high = builder.icmp_unsigned("!=", builder.and_(args[0], constant(i8x64, bit)), constant(i8x64, 0))
                found = [builder.select(is_high, *pair[::-1]) for pair in zip(found[::2], found[1::2], strict=True)]
            return found[0]

        return i8x64(i8x64), codegen

    return look_up


def load_first_bytes(count: int):
    """Makes `f(address)`: `count` bytes, then zeros, as i8x64; nothing behind them is touched."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            mask = ir.Constant(ir.VectorType(ir.IntType(1), 64), [i < count for i in range(64)])
            place = pointer(builder, args[0], i8x64.llvm)
            kind = ir.FunctionType(i8x64.llvm, [place.type, _I32, mask.type, i8x64.llvm])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.load.v64i8.p0")
            return builder.call(function, [place, ir.Constant(_I32, 1), mask, constant(i8x64, 0)])

        return i8x64(types.uintp), codegen

    return load


@intrinsic
def ternary_digits(typingctx, rest):
    """The first ternary digit of each byte / 256, floor(3 * byte / 256), by rounded averages."""

    def codegen(context, builder, sig, args):
        less = call_llvm(builder, "llvm.usub.sat.v64i8", i8x64.llvm, [args[0], constant(i8x64, 1)])
        half = _average(builder, less, hidden(builder, constant(i8x64, 0)))
        words = builder.bitcast(hidden(builder, _average(builder, less, half)), i32x16.llvm)
        digits = builder.bitcast(builder.lshr(words, constant(i32x16, 6)), i8x64.llvm)
        return builder.and_(digits, constant(i8x64, 3))

    return i8x64(i8x64), codegen


@intrinsic
def powers_of_3(typingctx, address):
    """The 4 bytes at `address` four times: times 1, 3, 9, 27, mod 256."""

    def codegen(context, builder, sig, args):
        words = ir.VectorType(_I16, 8)
        word = builder.load(pointer(builder, args[0], _I32))
        word.align = 1
        four = builder.bitcast(splat(builder, Vec("i32", 4), word), words)
        factors = ir.Constant(words, [1, 1, 3, 3, 9, 9, 27, 27])
        low, high = ir.Constant(words, [0xFF] * 8), ir.Constant(words, [0xFF00] * 8)
        even, odd = builder.and_(builder.mul(four, factors), low), builder.mul(builder.and_(four, high), factors)
        return builder.bitcast(builder.or_(even, odd), i8x16.llvm)

    return i8x16(types.uintp), codegen


def hidden(builder, value):
    """The same bytes where LLVM cannot see them: it would turn averages and sums into something longer."""
    bits = 8 * value.type.count
    if isa().name == PORTABLE:
        return value
    if isa().name == AVX512_VNNI or bits <= 256:
        return opaque(builder, value)
    halves = [opaque(builder, half) for half in in_halves(builder, value, value.type.count)]
    return builder.shuffle_vector(
        *halves, ir.Constant(ir.VectorType(_I32, value.type.count), list(range(value.type.count)))
    )


@intrinsic
def times_3(typingctx, codes):
    """3 * byte mod 256, as two sums."""

    def codegen(context, builder, sig, args):
        return hidden(builder, builder.add(builder.add(args[0], args[0]), args[0]))

    return codes(codes), codegen


def _average(builder, a, b):
    """(a + b + 1) / 2 of unsigned bytes, in the words that LLVM knows as vpavgb."""
    wide = ir.VectorType(_I16, 64)
    total = builder.add(builder.add(builder.zext(a, wide), builder.zext(b, wide)), ir.Constant(wide, [1] * 64))
    return builder.trunc(builder.lshr(total, ir.Constant(wide, [1] * 64)), a.type)


@intrinsic
def where_bits(typingctx, bits, value):
    """i8x64 with `value` (a literal-like int8) in byte i where bit i of the uint64 is set, else 0."""

    def codegen(context, builder, sig, args):
        flags = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 64))
        filled = splat(builder, i8x64, context.cast(builder, args[1], sig.args[1], types.int8))
        return builder.select(flags, filled, constant(i8x64, 0))

    return i8x64(types.uint64, types.int64), codegen
