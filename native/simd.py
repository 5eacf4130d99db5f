"""SIMD vectors as Numba values: one kernel source for AVX-512-VNNI, AVX-VNNI, AVX2 and any other LLVM target.

A `Vec` is an LLVM vector (`<64 x i8>`, `<16 x float>`, ...). LLVM legalises it to the registers the CPU has, so a
64-byte vector is one register on AVX-512 and two on AVX2. Python operators work lane by lane, a Python scalar on the
right is broadcast, and the functions below are the loads, stores, conversions and products that operators cannot
spell. Only the int8 dot products choose an instruction per ISA (`native.isa`). Integers are bits: `>>` is logical.
Addresses are Numba `uintp` / `intp` numbers; loads and stores need no alignment and check no bounds.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from native.half import narrow_to_half, widen_half, widen_half_bits
from native.isa import AVX2, AVX512_VNNI, AVX_VNNI, isa

_ELEMENTS = {"i8": ir.IntType(8), "i16": ir.IntType(16), "i32": ir.IntType(32), "f16": ir.HalfType(), "f32": ir.FloatType()}
_I32 = ir.IntType(32)


class Vec(types.Type):
    """The Numba type of a vector of `lanes` elements, e.g. Vec("i8", 64)."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        self.llvm = ir.VectorType(_ELEMENTS[element], lanes)
        super().__init__(name=f"Vec<{lanes} x {element}>")

    @property
    def is_float(self) -> bool:
        return self.element[0] == "f"


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.llvm)


i8x16, i8x32, i8x64 = Vec("i8", 16), Vec("i8", 32), Vec("i8", 64)
i16x16, i16x32 = Vec("i16", 16), Vec("i16", 32)
i32x4, i32x8, i32x16 = Vec("i32", 4), Vec("i32", 8), Vec("i32", 16)
f32x8, f32x16 = Vec("f32", 8), Vec("f32", 16)


# Operators ------------------------------------------------------------------------------------------------------------


def _constant(vec: Vec, values) -> ir.Constant:
    """A constant vector; one number is repeated in every lane."""
    if not isinstance(values, (tuple, list)):
        values = [values] * vec.lanes
    return ir.Constant(vec.llvm, list(values))


def _splat(builder, vec: Vec, scalar):
    undefined = ir.Constant(vec.llvm, ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(_I32, vec.lanes), [0] * vec.lanes))


def _scalar_to(context, builder, value, from_type, vec: Vec):
    """A Numba number as one lane of `vec`: integers are truncated or widened, floats become float32."""
    target = types.float32 if vec.is_float else getattr(types, "int" + vec.element[1:])
    return context.cast(builder, value, from_type, target)


_BINARY = {
    operator.add: ("fadd", "add"),
    operator.sub: ("fsub", "sub"),
    operator.mul: ("fmul", "mul"),
    operator.and_: (None, "and_"),
    operator.or_: (None, "or_"),
    operator.xor: (None, "xor"),
    operator.lshift: (None, "shl"),
    operator.rshift: (None, "lshr"),
}


def _register_operator(op, float_name, int_name):
    class Operator(AbstractTemplate):
        key = op

        def generic(self, args, kws):
            left, right = args
            if isinstance(left, Vec) and (left == right or isinstance(right, types.Number)):
                return signature(left, left, right)
            return None

    infer_global(op)(Operator)

    @lower_builtin(op, Vec, Vec)
    def vector_vector(context, builder, sig, args):
        return getattr(builder, float_name if sig.args[0].is_float else int_name)(*args)

    @lower_builtin(op, Vec, types.Number)
    def vector_scalar(context, builder, sig, args):
        vec, number = sig.args
        right = _splat(builder, vec, _scalar_to(context, builder, args[1], number, vec))
        return getattr(builder, float_name if vec.is_float else int_name)(args[0], right)


for _op, _names in _BINARY.items():
    _register_operator(_op, *_names)


# Makers of intrinsics: each returns a function usable in @njit code ---------------------------------------------------


def _pointer(builder, address, llvm_type):
    return builder.inttoptr(address, llvm_type.as_pointer())


def _loader(result, llvm_type, convert=None):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            value = builder.load(_pointer(builder, args[0], llvm_type))
            value.align = 1
            return convert(builder, value) if convert else value

        return result(types.uintp), codegen

    return load


def _storer(value_type, llvm_type, convert=None):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            bits = convert(builder, args[1]) if convert else args[1]
            builder.store(bits, _pointer(builder, args[0], llvm_type)).align = 1
            return context.get_dummy_value()

        return types.void(types.uintp, value_type), codegen

    return store


def _maker(vec: Vec, values):
    """A function without arguments that returns a constant vector."""

    @intrinsic
    def make(typingctx):
        return vec(), lambda context, builder, sig, args: _constant(vec, values)

    return make


def _broadcaster(vec: Vec, scalar):
    @intrinsic
    def broadcast(typingctx, value):
        return vec(scalar), lambda context, builder, sig, args: _splat(builder, vec, args[0])

    return broadcast


def _shuffler(source: Vec, result: Vec, mask):
    """result[i] = concat(a, b)[mask[i]]; with one argument b is undefined."""
    lanes = ir.Constant(ir.VectorType(_I32, len(mask)), list(mask))

    @intrinsic
    def shuffle(typingctx, a):
        def codegen(context, builder, sig, args):
            return builder.shuffle_vector(args[0], ir.Constant(source.llvm, ir.Undefined), lanes)

        return result(source), codegen

    return shuffle


def _shuffler2(source: Vec, result: Vec, mask):
    lanes = ir.Constant(ir.VectorType(_I32, len(mask)), list(mask))

    @intrinsic
    def shuffle(typingctx, a, b):
        return result(source, source), lambda context, builder, sig, args: builder.shuffle_vector(*args, lanes)

    return shuffle


def _converter(source: Vec, result: Vec, instruction: str):
    @intrinsic
    def convert(typingctx, a):
        return result(source), lambda context, builder, sig, args: getattr(builder, instruction)(args[0], result.llvm)

    return convert


def _bitcaster(source: Vec, result: Vec):
    return _converter(source, result, "bitcast")


def _call(builder, name: str, result, args):
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _unary(vec: Vec, llvm_name: str):
    @intrinsic
    def apply(typingctx, a):
        return vec(vec), lambda context, builder, sig, args: _call(builder, llvm_name, vec.llvm, args)

    return apply


def _binary(vec: Vec, llvm_name: str):
    @intrinsic
    def apply(typingctx, a, b):
        return vec(vec, vec), lambda context, builder, sig, args: _call(builder, llvm_name, vec.llvm, args)

    return apply


def _divider(vec: Vec):
    @intrinsic
    def divide(typingctx, a, b):
        return vec(vec, vec), lambda context, builder, sig, args: builder.fdiv(*args)

    return divide


def _reducer(vec: Vec, scalar, llvm_name: str, start=None):
    @intrinsic
    def reduce(typingctx, a):
        def codegen(context, builder, sig, args):
            lane = vec.llvm.element
            arguments = args if start is None else [ir.Constant(lane, start), args[0]]
            kind = ir.FunctionType(lane, [a.type for a in arguments])
            function = cgutils.get_or_insert_function(builder.module, kind, llvm_name)
            return builder.call(function, arguments, fastmath=("reassoc",) if vec.is_float else ())

        return scalar(vec), codegen

    return reduce


def _first_lane(builder, word):
    """An i32 in the lowest lane of 16 bytes, the rest zero."""
    vector = builder.insert_element(_constant(i32x4, 0), word, ir.Constant(_I32, 0))
    return builder.bitcast(vector, i8x16.llvm)


# Loads and stores -----------------------------------------------------------------------------------------------------

load_i8x16, load_i8x32, load_i8x64 = (_loader(v, v.llvm) for v in (i8x16, i8x32, i8x64))
load_i32x16 = _loader(i32x16, i32x16.llvm)
load_f32x16, load_f32x8 = _loader(f32x16, f32x16.llvm), _loader(f32x8, f32x8.llvm)
load_f16x16 = _loader(f32x16, Vec("f16", 16).llvm, widen_half)
load_bf16x16 = _loader(
    f32x16, i16x16.llvm, lambda b, v: b.bitcast(b.shl(b.zext(v, i32x16.llvm), _constant(i32x16, 16)), f32x16.llvm)
)
load_f16 = _loader(types.float32, ir.IntType(16), widen_half_bits)
load_f32 = _loader(types.float32, ir.FloatType())
load_i64 = _loader(types.int64, ir.IntType(64))
load_u64 = _loader(types.uint64, ir.IntType(64))
load_i32 = _loader(types.int32, ir.IntType(32))
load_u32 = _loader(types.uint32, ir.IntType(32))
load_u16 = _loader(types.uint16, ir.IntType(16))


def _to_bf16(builder, value):
    """float32 lanes as bfloat16 bits, rounded to nearest even; NaN, which rounding could carry into the sign, stays NaN."""
    bits = builder.bitcast(value, i32x16.llvm)
    odd = builder.and_(builder.lshr(bits, _constant(i32x16, 16)), _constant(i32x16, 1))
    rounded = builder.add(builder.add(bits, _constant(i32x16, 0x7FFF)), odd)
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), _constant(i32x16, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, _constant(i32x16, 16)), i16x16.llvm)


store_f32x16 = _storer(f32x16, f32x16.llvm)
store_f16x16 = _storer(f32x16, Vec("f16", 16).llvm, narrow_to_half)
store_bf16x16 = _storer(f32x16, i16x16.llvm, _to_bf16)
store_f32x8 = _storer(f32x8, f32x8.llvm)
store_i8x16, store_i8x32, store_i8x64 = (_storer(v, v.llvm) for v in (i8x16, i8x32, i8x64))
store_i32x16 = _storer(i32x16, i32x16.llvm)
store_f32 = _storer(types.float32, ir.FloatType())
store_f16 = _storer(types.float32, ir.HalfType(), narrow_to_half)
store_i32 = _storer(types.int32, ir.IntType(32))
store_i64 = _storer(types.int64, ir.IntType(64))

# Constants, broadcasts, shuffles --------------------------------------------------------------------------------------

zero_i8x16 = _maker(i8x16, 0)
zero_i32x16 = _maker(i32x16, 0)
zero_f32x8, zero_f32x16 = _maker(f32x8, 0.0), _maker(f32x16, 0.0)
splat_f32x8, splat_f32x16 = _broadcaster(f32x8, types.float32), _broadcaster(f32x16, types.float32)
splat_i32x16 = _broadcaster(i32x16, types.int32)

join_i8x16 = _shuffler2(i8x16, i8x32, range(32))  # (16, 16) -> 32
join_i8x32 = _shuffler2(i8x32, i8x64, range(64))  # (32, 32) -> 64
twice_i8x32 = _shuffler(i8x32, i8x64, [*range(32)] * 2)  # 32 -> the same 32 twice
low_i8x64 = _shuffler(i8x64, i8x32, range(32))
low_f32x16, high_f32x16 = _shuffler(f32x16, f32x8, range(8)), _shuffler(f32x16, f32x8, range(8, 16))

# Conversions and arithmetic -------------------------------------------------------------------------------------------

int_to_f32x16 = _converter(i32x16, f32x16, "sitofp")
f32_to_i32x16 = _converter(f32x16, i32x16, "fptosi")  # truncates: round first
narrow_i32x16 = _converter(i32x16, i8x16, "trunc")
widen_i8x16 = _converter(i8x16, i32x16, "zext")
widen_signed_i8x16 = _converter(i8x16, i32x16, "sext")
round_f32x16 = _unary(f32x16, "llvm.rint.v16f32")  # to nearest even
divide_f32x16 = _divider(f32x16)
max_f32x16 = _binary(f32x16, "llvm.maxnum.v16f32")
sum_f32x16 = _reducer(f32x16, types.float32, "llvm.vector.reduce.fadd.v16f32", -0.0)
sum_f32x8 = _reducer(f32x8, types.float32, "llvm.vector.reduce.fadd.v8f32", -0.0)
largest_f32x16 = _reducer(f32x16, types.float32, "llvm.vector.reduce.fmax.v16f32")
sum_i32x16 = _reducer(i32x16, types.int32, "llvm.vector.reduce.add.v16i32")
max_i32x16 = _binary(i32x16, "llvm.smax.v16i32")
largest_i32x16 = _reducer(i32x16, types.int32, "llvm.vector.reduce.smax.v16i32")
words_of = _bitcaster(i8x64, i16x32)
f32_bits = _bitcaster(f32x16, i32x16)
f32_from_bits = _bitcaster(i32x16, f32x16)


@intrinsic
def scalar_from_bits(typingctx, bits):
    """The float32 whose bits are this int32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def clamp_f32x16(typingctx, x, low, high):
    """x between low and high; NaN stays NaN, which the max and min of `llvm.maxnum` would replace."""

    def codegen(context, builder, sig, args):
        x, low, high = args
        x = builder.select(builder.fcmp_ordered(">", low, x), low, x)
        return builder.select(builder.fcmp_ordered(">", x, high), high, x)

    return f32x16(f32x16, f32x16, f32x16), codegen


def _fused(vec: Vec, llvm_name: str):
    @intrinsic
    def fma(typingctx, a, b, c):
        return vec(vec, vec, vec), lambda context, builder, sig, args: _call(builder, llvm_name, vec.llvm, args)

    return fma


fma_f32x16 = _fused(f32x16, "llvm.fma.v16f32")


# Dot products of bytes: 4 products a lane, summed into int32 ----------------------------------------------------------


def _halves(builder, value, lanes: int):
    undefined = ir.Constant(value.type, ir.Undefined)
    parts = (range(lanes // 2), range(lanes // 2, lanes))
    return [builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(_I32, lanes // 2), list(p))) for p in parts]


def _by_halves(builder, emit, acc, a, b):
    """A 64-byte product as two 32-byte ones."""
    low, high = (
        emit(builder, *parts)
        for parts in zip(_halves(builder, acc, 16), _halves(builder, a, 64), _halves(builder, b, 64), strict=True)
    )
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))


def _vpdpbusd_256(builder, acc, unsigned, signed):
    return _call(builder, "llvm.x86.avx512.vpdpbusd.256", acc.type, [acc, unsigned, signed])


def _maddubs_256(builder, acc, unsigned, signed):
    """vpmaddubsw saturates at int16, which no code up to 128 can reach: 2 * 128 * 127 < 32768."""
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [unsigned, signed])
    quads = _call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [pairs, _constant(i16x16, 1)])
    return builder.add(acc, quads)


def _generic(builder, acc, a, b, is_unsigned: bool):
    """Products in int32, then three adds: what LLVM makes of it depends on the target."""
    lanes = acc.type.count
    wide = ir.VectorType(_I32, 4 * lanes)
    product = builder.mul(builder.zext(a, wide) if is_unsigned else builder.sext(a, wide), builder.sext(b, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    for k in range(4):
        mask = ir.Constant(ir.VectorType(_I32, lanes), list(range(k, 4 * lanes, 4)))
        acc = builder.add(acc, builder.shuffle_vector(product, undefined, mask))
    return acc


def _dot_unsigned(builder, acc, unsigned, signed):
    path, lanes = isa().name, acc.type.count
    if path == AVX512_VNNI:
        return _call(builder, f"llvm.x86.avx512.vpdpbusd.{lanes * 32}", acc.type, [acc, unsigned, signed])
    if path in (AVX_VNNI, AVX2):
        emit = _vpdpbusd_256 if path == AVX_VNNI else _maddubs_256
        return emit(builder, acc, unsigned, signed) if lanes == 8 else _by_halves(builder, emit, acc, unsigned, signed)
    return _generic(builder, acc, unsigned, signed, is_unsigned=True)


def _sign_256(builder, acc, a, b):
    """|a| times (b with the sign of a), so that the first factor is unsigned (at most 128)."""
    magnitude = _call(builder, "llvm.abs.v32i8", i8x32.llvm, [a, ir.Constant(ir.IntType(1), 0)])
    return _maddubs_256(builder, acc, magnitude, _call(builder, "llvm.x86.avx2.psign.b", i8x32.llvm, [b, a]))


def _dot_signed(builder, acc, a, b):
    lanes = acc.type.count
    if isa().name in (AVX_VNNI, AVX2):
        return _sign_256(builder, acc, a, b) if lanes == 8 else _by_halves(builder, _sign_256, acc, a, b)
    return _generic(builder, acc, a, b, is_unsigned=False)


def _dot(acc_vec: Vec, byte_vec: Vec, emit):
    @intrinsic
    def dot(typingctx, acc, a, b):
        return acc_vec(acc_vec, byte_vec, byte_vec), lambda context, builder, sig, args: emit(builder, *args)

    return dot


dot_u8x64 = _dot(i32x16, i8x64, _dot_unsigned)  # codes <= 128 off VNNI
HAS_FULL_UNSIGNED_DOT = "vnni" in isa().name  # unsigned codes may use all 8 bits
dot_i8x64 = _dot(i32x16, i8x64, _dot_signed)


@intrinsic
def pack_u64(typingctx, low, high):
    """Two uint64 as 16 bytes."""

    def codegen(context, builder, sig, args):
        pair = ir.Constant(ir.VectorType(ir.IntType(64), 2), ir.Undefined)
        for lane, value in enumerate(args):
            pair = builder.insert_element(pair, value, ir.Constant(_I32, lane))
        return builder.bitcast(pair, i8x16.llvm)

    return i8x16(types.uint64, types.uint64), codegen


@intrinsic
def lane_f32x16(typingctx, a, index):
    """One lane, by number."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], context.cast(builder, args[1], sig.args[1], types.int32))

    return types.float32(f32x16, types.int64), codegen


@intrinsic
def extend_f32x8(typingctx, a):
    """8 lanes followed by 8 zeros."""

    def codegen(context, builder, sig, args):
        mask = ir.Constant(ir.VectorType(_I32, 16), list(range(16)))
        return builder.shuffle_vector(args[0], _constant(f32x8, 0.0), mask)

    return f32x16(f32x8), codegen


def _spreaders(lanes_per_group: int):
    """Four functions: lanes of chunk k = 0..3 of a super-block, each of its groups' values repeated (4 products a lane)."""
    groups = 16 // lanes_per_group
    return [_shuffler(f32x16, f32x16, [groups * k + i // lanes_per_group for i in range(16)]) for k in range(4)]


spread16_0, spread16_1, spread16_2, spread16_3 = _spreaders(4)  # groups of 16 weights
spread32_0, spread32_1, spread32_2, spread32_3 = _spreaders(8)  # groups of 32


def _transposer(num_out: int, bias: int):
    """Makes `f(source, stride, target)`: 16 rows of 16 words, `stride` bytes apart, become columns: `num_out` x 64 bytes.

    `bias` is xored into every byte first (128 turns signed codes into unsigned ones). Four rounds of perfect shuffles.
    """
    low = [i // 2 + 16 * (i % 2) for i in range(16)]
    masks = [ir.Constant(ir.VectorType(_I32, 16), m) for m in (low, [i + 8 for i in low])]

    @intrinsic
    def transpose(typingctx, source, stride, target):
        def codegen(context, builder, sig, args):
            source, stride, target = args
            rows = []
            for row in range(16):
                offset = builder.mul(stride, ir.Constant(stride.type, row))
                value = builder.load(_pointer(builder, builder.add(source, offset), i32x16.llvm))
                value.align = 1
                rows.append(builder.xor(value, _constant(i32x16, bias * 0x01010101)) if bias else value)
            for _ in range(4):
                rows = [builder.shuffle_vector(rows[i], rows[i + 8], mask) for i in range(8) for mask in masks]
            for row in range(num_out):
                address = builder.add(target, ir.Constant(target.type, 64 * row))
                builder.store(rows[row], _pointer(builder, address, i32x16.llvm)).align = 1
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return transpose


transpose_16x16, transpose_16x8 = _transposer(16, 0), _transposer(8, 0)
transpose_signed = _transposer(16, 128)
broadcast_i8x4 = _loader(i8x64, _I32, lambda b, v: b.bitcast(_splat(b, i32x16, v), i8x64.llvm))
broadcast_f32 = _loader(f32x16, ir.FloatType(), lambda b, v: _splat(b, f32x16, v))
