"""SIMD for unpacking and scaling quantized blocks: byte tables, bit masks, scaled int8 products. Continues `native.simd`."""

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from native.half import widen_half
from native.isa import AVX2, AVX512_VNNI, AVX_VNNI, PORTABLE, isa, target_features
from native.simd import (
    Vec,
    _binary,
    _call,
    _constant,
    _converter,
    _dot_unsigned,
    _halves,
    _maker,
    _pointer,
    _shuffler,
    _shuffler2,
    _splat,
    f32x8,
    f32x16,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
    sum_f32x8,
    sum_f32x16,
    zero_f32x8,
    zero_f32x16,
)

_BYTE, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)

# Conversions and shuffles ---------------------------------------------------------------------------------------------

widen16_i8x16, widen16_signed_i8x16 = _converter(i8x16, i16x16, "zext"), _converter(i8x16, i16x16, "sext")
twice_each_i8x16 = _shuffler2(i8x16, i8x64, [*range(16)] * 2 + [*range(16, 32)] * 2)  # (a, b) -> a a b b
four_times_each_word = _shuffler(i8x16, i8x64, [4 * (i // 16) + i % 4 for i in range(64)])  # 4 bytes 4 times, the next 4 ...
by_fours_i8x64 = _shuffler(i8x64, i8x64, [16 * (i // 16) + 4 * (i % 4) + i // 4 % 4 for i in range(64)])  # 0 4 8 12 1 5 ...
twice_each_quad = _shuffler(i8x32, i8x64, [16 * (i // 32) + 8 * (i // 16 % 2) + i % 8 for i in range(64)])  # 8 bytes twice
_LANES = [[*range(16 * k, 16 * k + 16)] for k in range(8)]  # of two vectors of 64 bytes
third_parts = _shuffler2(i8x64, i8x64, _LANES[4] + _LANES[5] + _LANES[2] + _LANES[2])  # used by TQ1_0: see there
fourth_parts = _shuffler2(i8x64, i8x64, _LANES[2] + _LANES[2] + _LANES[6] + [48, 49, 50, 51] * 4)
low_i8x32 = _shuffler(i8x32, i8x16, range(16))
twice_each_f32x8 = _shuffler(f32x8, f32x16, [i // 2 for i in range(16)])


_HAS_BIT_MATRICES = "gfni" in target_features() and isa().name != PORTABLE


def bit_fields(mask: int, *shifts: int):
    """Makes `f(codes)`: i8x64 of (byte >> shift) & mask, a shift for each equal run of lanes; left where it is negative.

    With GFNI one instruction multiplies each byte by a matrix of bits, one matrix for 8 bytes. Else words of 32 bits are
    shifted: what crosses from byte to byte is masked out.
    """
    assert all(shift >= 0 for shift in shifts) or all(shift <= 0 for shift in shifts), shifts
    run = 64 // len(shifts)

    @intrinsic
    def extract(typingctx, codes):
        def codegen(context, builder, sig, args):
            if _HAS_BIT_MATRICES and run >= 8:
                return _by_matrix(builder, args[0], [_bit_matrix(mask, shifts[8 * q // run]) for q in range(8)])
            counts = _constant(i32x16, [abs(shifts[4 * lane // run]) for lane in range(16)])
            shift = builder.lshr if max(shifts) > 0 else builder.shl
            shifted = builder.bitcast(shift(builder.bitcast(args[0], i32x16.llvm), counts), i8x64.llvm)
            return builder.and_(shifted, _constant(i8x64, mask))

        return i8x64(i8x64), codegen

    return extract


def _bit_matrix(mask: int, shift: int) -> list[int]:
    """The 8 rows of vgf2p8affineqb, last bit first: bit i of the result is bit i + shift, where the mask has it."""
    rows = [1 << i + shift if mask >> i & 1 and 0 <= i + shift < 8 else 0 for i in range(8)]
    return rows[::-1]


def _by_matrix(builder, codes, matrices: list[list[int]]):
    constant = _constant(i8x64, [row for matrix in matrices for row in matrix])
    zero = ir.Constant(_BYTE, 0)
    if isa().name == AVX512_VNNI:
        return _call(builder, "llvm.x86.vgf2p8affineqb.512", i8x64.llvm, [codes, constant, zero])
    parts = zip(_halves(builder, codes, 64), _halves(builder, constant, 64), strict=True)
    products = [_call(builder, "llvm.x86.vgf2p8affineqb.256", i8x32.llvm, [*part, zero]) for part in parts]
    return builder.shuffle_vector(*products, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))


@intrinsic
def spreadable(typingctx, words):
    """16 scales, ready for the functions below. LLVM would merge their shuffles with what made the scales, to worse code."""

    def codegen(context, builder, sig, args):
        lanes = [*range(8), *range(8), *range(8, 16), *range(8, 16)] if isa().name in (AVX2, AVX_VNNI) else [*range(16)] * 2
        mask = ir.Constant(ir.VectorType(_I32, 32), lanes)
        ready = builder.shuffle_vector(args[0], ir.Constant(i16x16.llvm, ir.Undefined), mask)
        if isa().name == PORTABLE:
            return ready
        halves = [_opaque(builder, half) for half in _halves(builder, ready, 32)] if isa().name != AVX512_VNNI else None
        if halves:
            return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
        return _opaque(builder, ready)

    return i16x32(i16x16), codegen


def _opaque(builder, value):
    """The same vector, through no instruction, where the optimizer cannot see."""
    kind = ir.FunctionType(value.type, [value.type])
    return builder.asm(kind, "", "=x,0" if value.type.count * value.type.element.width < 512 else "=v,0", [value], False)


def _in_order(builder, value):
    """The same vector, made in this order. Else LLVM unpacks a whole block at once and runs out of 16 registers."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=x,0", [value], True)


def _opaque_mask(builder, mask):
    """The same 64 flags, in a mask register of AVX-512, where the optimizer cannot see."""
    bits = ir.IntType(64)
    same = builder.asm(ir.FunctionType(bits, [bits]), "", "=k,0", [builder.bitcast(mask, bits)], False)
    return builder.bitcast(same, mask.type)


def _word_spreaders(words_per_group: int):
    """Four functions: word lanes of chunk k = 0..3 of a super-block, each of its groups' scales repeated (2 products a lane).

    AVX2 shuffles within 16 bytes only: there a lane takes a scale from its own copy of 8.
    """
    is_by_lanes = isa().name in (AVX2, AVX_VNNI)
    masks = []
    for k in range(4):
        groups = [32 * k // words_per_group + i // words_per_group for i in range(32)]
        own_copy = [16 * (g // 8) + 8 * (i // 8 % 2) + g % 8 for i, g in enumerate(groups)]
        masks.append(own_copy if is_by_lanes else groups)
    return [_shuffler(i16x32, i16x32, mask) for mask in masks]


words16_0, words16_1, words16_2, words16_3 = _word_spreaders(8)  # groups of 16 weights
words32_0, words32_1, words32_2, words32_3 = _word_spreaders(16)  # groups of 32


# Scales of blocks that lie apart ---------------------------------------------------------------------------------------


def _gather(builder, address, element, offsets: Sequence[int]):
    """The numbers at address + offsets as a vector; an offset may come again, and None leaves a zero."""
    distinct = sorted({offset for offset in offsets if offset is not None})
    values = ir.Constant(ir.VectorType(element, len(offsets)), None)
    for lane, offset in enumerate(distinct):
        place = builder.add(address, ir.Constant(address.type, offset))
        number = builder.load(_pointer(builder, place, element))
        number.align = 1
        values = builder.insert_element(values, number, ir.Constant(_I32, lane))
    lanes = [len(distinct) if offset is None else distinct.index(offset) for offset in offsets]
    if lanes == list(range(len(distinct))) + lanes[len(distinct) :] and all(
        lane == len(distinct) for lane in lanes[len(distinct) :]
    ):
        return values
    mask = ir.Constant(ir.VectorType(_I32, len(offsets)), lanes)
    return builder.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), mask)


def gather_f16(*offsets: int):
    """Makes `f(address)`: the float16 at 8 byte offsets as f32x8."""
    assert len(offsets) == 8, offsets

    @intrinsic
    def gather(typingctx, address):
        def codegen(context, builder, sig, args):
            bits = _gather(builder, args[0], ir.IntType(16), offsets)  # as floats each load would wait for its register's past
            return widen_half(builder, builder.bitcast(bits, Vec("f16", 8).llvm))

        return f32x8(types.uintp), codegen

    return gather


def gather_u8(*offsets: int):
    """Makes `f(address)`: the bytes at up to 16 offsets as i8x16, then zeros."""

    @intrinsic
    def gather(typingctx, address):
        def codegen(context, builder, sig, args):
            return _gather(builder, args[0], _BYTE, [*offsets, *[None] * (16 - len(offsets))])

        return i8x16(types.uintp), codegen

    return gather


def gather_u32(*offsets: int):
    """Makes `f(address)`: the 4 bytes at each of 4 offsets as i8x16."""

    @intrinsic
    def gather(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.bitcast(_gather(builder, args[0], _I32, offsets), i8x16.llvm)

        return i8x16(types.uintp), codegen

    return gather


@intrinsic
def small_floats_f32x16(typingctx, codes):
    """16 bytes of unsigned E4M3 as float32 / 256: bits 3..6 and 0..2 are a float16's; its bias is 8 more."""

    def codegen(context, builder, sig, args):
        bits = builder.shl(builder.and_(builder.zext(args[0], i16x16.llvm), _constant(i16x16, 0x7F)), _constant(i16x16, 7))
        return widen_half(builder, builder.bitcast(bits, Vec("f16", 16).llvm))

    return f32x16(i8x16), codegen


@intrinsic
def zero_where(typingctx, value, codes, code):
    """f32x16 `value`, 0 where the byte of `codes` equals `code`."""

    def codegen(context, builder, sig, args):
        number = context.cast(builder, args[2], sig.args[2], types.int8)
        wanted = _splat(builder, i8x16, number)
        return builder.select(builder.icmp_unsigned("==", args[1], wanted), _constant(f32x16, 0.0), args[0])

    return f32x16(f32x16, i8x16, types.int64), codegen


min_i32x16, max_i32x16 = _binary(i32x16, "llvm.umin.v16i32"), _binary(i32x16, "llvm.smax.v16i32")  # unsigned, signed

# Tables and masks ------------------------------------------------------------------------------------------------------


def _select_from(builder, table: Sequence[int], codes):
    """A table look-up as 15 selections, for targets without a byte shuffle."""
    vec = codes.type
    result = ir.Constant(vec, [table[0]] * vec.count)
    for code, value in enumerate(table[1:], 1):
        is_code = builder.icmp_unsigned("==", codes, ir.Constant(vec, [code] * vec.count))
        result = builder.select(is_code, ir.Constant(vec, [value] * vec.count), result)
    return result


def byte_table(values: Sequence[int]):
    """Makes `f(codes)`: i8x64 of codes 0..15 to i8x64 of `values` (vpshufb)."""
    assert len(values) == 16, values

    @intrinsic
    def look_up(typingctx, codes):
        def codegen(context, builder, sig, args):
            if isa().name == PORTABLE:
                return _select_from(builder, values, args[0])
            if isa().name == AVX512_VNNI:
                table = ir.Constant(i8x64.llvm, [*values] * 4)
                return _call(builder, "llvm.x86.avx512.pshuf.b.512", i8x64.llvm, [table, args[0]])
            table = ir.Constant(i8x32.llvm, [*values] * 2)
            parts = _halves(builder, args[0], 64)
            looked_up = [_call(builder, "llvm.x86.avx2.pshuf.b", i8x32.llvm, [table, part]) for part in parts]
            return builder.shuffle_vector(*looked_up, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))

        return i8x64(i8x64), codegen

    return look_up


HAS_BYTE_PERMUTES = isa().name == AVX512_VNNI and "avx512vbmi" in target_features()


def byte_table_256(values: Sequence[int]):
    """Makes `f(codes)`: i8x64 of any bytes to i8x64 of `values`, two look-ups of 128 (vpermi2b). Needs HAS_BYTE_PERMUTES."""
    assert len(values) == 256, len(values)

    @intrinsic
    def look_up(typingctx, codes):
        def codegen(context, builder, sig, args):
            quarters = [ir.Constant(i8x64.llvm, [*values[i : i + 64]]) for i in range(0, 256, 64)]
            name = "llvm.x86.avx512.vpermi2var.qi.512"
            is_high = builder.icmp_signed("<", args[0], _constant(i8x64, 0))
            is_low = _opaque_mask(builder, builder.not_(is_high))  # apart, so that each select becomes a permutation's mask
            high = _call(builder, name, i8x64.llvm, [quarters[2], args[0], quarters[3]])
            half_done = builder.select(is_high, high, args[0])
            low = _call(builder, name, i8x64.llvm, [quarters[0], half_done, quarters[1]])
            return builder.select(is_low, low, half_done)

        return i8x64(i8x64), codegen

    return look_up


def load_first_bytes(count: int):
    """Makes `f(address)`: `count` bytes, then zeros, as i8x64; nothing behind them is touched."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            mask = ir.Constant(ir.VectorType(ir.IntType(1), 64), [i < count for i in range(64)])
            place = _pointer(builder, args[0], i8x64.llvm)
            kind = ir.FunctionType(i8x64.llvm, [place.type, _I32, mask.type, i8x64.llvm])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.load.v64i8.p0")
            return builder.call(function, [place, ir.Constant(_I32, 1), mask, _constant(i8x64, 0)])

        return i8x64(types.uintp), codegen

    return load


@intrinsic
def ternary_digits(typingctx, rest):
    """The first ternary digit of each byte / 256, floor(3 * byte / 256), by rounded averages."""

    def codegen(context, builder, sig, args):
        less = _call(builder, "llvm.usub.sat.v64i8", i8x64.llvm, [args[0], _constant(i8x64, 1)])
        half = _average(builder, less, _hidden(builder, _constant(i8x64, 0)))
        words = builder.bitcast(_hidden(builder, _average(builder, less, half)), i32x16.llvm)
        digits = builder.bitcast(builder.lshr(words, _constant(i32x16, 6)), i8x64.llvm)
        return builder.and_(digits, _constant(i8x64, 3))

    return i8x64(i8x64), codegen


@intrinsic
def powers_of_3(typingctx, address):
    """The 4 bytes at `address` four times: times 1, 3, 9, 27, mod 256."""

    def codegen(context, builder, sig, args):
        words = ir.VectorType(_I16, 8)
        word = builder.load(_pointer(builder, args[0], _I32))
        word.align = 1
        four = builder.bitcast(_splat(builder, Vec("i32", 4), word), words)
        factors = ir.Constant(words, [1, 1, 3, 3, 9, 9, 27, 27])
        low, high = ir.Constant(words, [0xFF] * 8), ir.Constant(words, [0xFF00] * 8)
        even, odd = builder.and_(builder.mul(four, factors), low), builder.mul(builder.and_(four, high), factors)
        return builder.bitcast(builder.or_(even, odd), i8x16.llvm)

    return i8x16(types.uintp), codegen


def _hidden(builder, value):
    """The same bytes where LLVM cannot see them: it would turn averages and sums into something longer."""
    bits = 8 * value.type.count
    if isa().name == PORTABLE:
        return value
    if isa().name == AVX512_VNNI or bits <= 256:
        return _opaque(builder, value)
    halves = [_opaque(builder, half) for half in _halves(builder, value, value.type.count)]
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, value.type.count), list(range(value.type.count))))


@intrinsic
def times_3(typingctx, codes):
    """3 * byte mod 256, as two sums."""

    def codegen(context, builder, sig, args):
        return _hidden(builder, builder.add(builder.add(args[0], args[0]), args[0]))

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
        splat = _splat(builder, i8x64, context.cast(builder, args[1], sig.args[1], types.int8))
        return builder.select(flags, splat, _constant(i8x64, 0))

    return i8x64(types.uint64, types.int64), codegen


# Products with integer scales ------------------------------------------------------------------------------------------


def _pair_products(builder, wide, narrow: ir.VectorType):
    """Adds neighbours of a vector of products."""
    undefined = ir.Constant(wide.type, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(
            wide, undefined, ir.Constant(ir.VectorType(_I32, narrow.count), list(range(k, wide.type.count, 2)))
        )
        for k in (0, 1)
    )
    return builder.add(even, odd)


def _scaled_512(builder, acc, codes, x, scales):
    pairs = _call(builder, "llvm.x86.avx512.pmaddubs.w.512", i16x32.llvm, [codes, x])
    return _call(builder, "llvm.x86.avx512.vpdpwssd.512", i32x16.llvm, [acc, pairs, scales])


def _scaled_256(builder, acc, codes, x, scales):
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [codes, x])
    return builder.add(acc, _call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [pairs, scales]))


def _scaled_generic(builder, acc, codes, x, scales):
    words = ir.VectorType(_I16, 64)
    products = builder.mul(builder.zext(codes, words), builder.sext(x, words))
    pairs = _pair_products(builder, products, i16x32.llvm)
    wide = ir.VectorType(_I32, 32)
    scaled = builder.mul(builder.sext(pairs, wide), builder.sext(scales, wide))
    return builder.add(acc, _pair_products(builder, scaled, i32x16.llvm))


@intrinsic
def scaled_dot_u8x64(typingctx, acc, codes, x, scales):
    """acc + 4 products a lane, each pair of them times its int16 scale. codes unsigned, at most 128; sums stay in int32."""

    def codegen(context, builder, sig, args):
        if isa().name == AVX512_VNNI:
            return _scaled_512(builder, *args)
        if isa().name == PORTABLE:
            return _scaled_generic(builder, *args)
        split = [_halves(builder, value, value.type.count) for value in args]
        low, high = (_in_order(builder, _scaled_256(builder, *parts)) for parts in zip(*split, strict=True))
        return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))

    return i32x16(i32x16, i8x64, i8x64, i16x32), codegen


@intrinsic
def pair_dot_i16x16(typingctx, a, b):
    """Two products of int16 a lane, summed: i32x8."""

    def codegen(context, builder, sig, args):
        if isa().name != PORTABLE:
            return _call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, args)
        wide = ir.VectorType(_I32, 16)
        return _pair_products(builder, builder.mul(*(builder.sext(arg, wide) for arg in args)), i32x8.llvm)

    return i32x8(i16x16, i16x16), codegen


# Products of small codes -----------------------------------------------------------------------------------------------
# Without a dot-product instruction vpmaddubsw leaves int16 pairs; while they are small they are added as such.

_SMALL = i16x32 if isa().name == AVX2 else i32x16
zero_small = _maker(_SMALL, 0)


@intrinsic
def small_dot(typingctx, acc, codes, x):
    """acc + codes * x, of 64 unsigned codes; begin with `zero_small()`. Sums of codes at each place stay under 128."""

    def codegen(context, builder, sig, args):
        acc, codes, x = args
        if isa().name != AVX2:
            return _dot_unsigned(builder, acc, codes, x)
        halves = zip(_halves(builder, codes, 64), _halves(builder, x, 64), strict=True)
        pairs = [_call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, half) for half in halves]
        joined = builder.shuffle_vector(*pairs, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
        return builder.add(acc, joined)

    return _SMALL(_SMALL, i8x64, i8x64), codegen


@intrinsic
def sum_small(typingctx, acc):
    """The sums of `small_dot` as i32x16."""

    def codegen(context, builder, sig, args):
        if isa().name != AVX2:
            return args[0]
        ones = _constant(i16x16, 1)
        sums = [_call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [part, ones]) for part in _halves(builder, args[0], 32)]
        return builder.shuffle_vector(*sums, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))

    return i32x16(_SMALL), codegen


# Sums of a row ----------------------------------------------------------------------------------------------------------
# Where registers are few and hold 32 bytes, a row's sum takes one of them, not two.

_IS_NARROW = isa().name in (AVX2, AVX_VNNI)
zero_row, sum_row = (zero_f32x8, sum_f32x8) if _IS_NARROW else (zero_f32x16, sum_f32x16)


@intrinsic
def add_scaled(typingctx, acc, values, scale):
    """A row's `acc` plus the f32x16 `values` times a scalar."""

    def codegen(context, builder, sig, args):
        acc, values, scale = args
        if _IS_NARROW:
            values = builder.fadd(*_halves(builder, values, 16))
        return _call(builder, f"llvm.fma.v{acc.type.count}f32", acc.type, [values, _splat(builder, sig.args[0], scale), acc])

    return acc(acc, f32x16, types.float32), codegen


# Memory ----------------------------------------------------------------------------------------------------------------


@intrinsic
def stack_512(typingctx):
    """The address of 512 bytes that live as long as the function."""

    def codegen(context, builder, sig, args):
        room = cgutils.alloca_once(builder, ir.ArrayType(_BYTE, 512))
        return builder.ptrtoint(room, ir.IntType(64))

    return types.int64(), codegen


@intrinsic
def copy_bytes(typingctx, target, source, num_bytes):
    """memcpy"""

    def codegen(context, builder, sig, args):
        target, source, count = args
        cgutils.raw_memcpy(builder, _pointer(builder, target, _BYTE), _pointer(builder, source, _BYTE), count, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def clear_bytes(typingctx, target, num_bytes):
    """memset to zero"""

    def codegen(context, builder, sig, args):
        cgutils.memset(builder, _pointer(builder, args[0], _BYTE), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
