"""Vectors as Numba values, and makers of the operations on them.

A `Vec` is an LLVM vector (`<64 x i8>`, `<16 x float>`, ...). LLVM legalises it to the registers the CPU has, so a
64-byte vector is one register on AVX-512 and two on AVX2. Python operators work lane by lane, a Python scalar on the
right is broadcast. Integers are bits: `>>` is logical. Addresses are Numba `uintp` / `intp` numbers. The operations
themselves are in `simd`, `simd_bytes`, `simd_scales` and `simd_dot`.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

_ELEMENTS = {
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "f16": ir.HalfType(),
    "f32": ir.FloatType(),
}
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
i32x8, i32x16 = Vec("i32", 8), Vec("i32", 16)
f32x8, f32x16 = Vec("f32", 8), Vec("f32", 16)


# Operators ------------------------------------------------------------------------------------------------------------


def constant(vec: Vec, values) -> ir.Constant:
    """A constant vector; one number is repeated in every lane."""
    if not isinstance(values, (tuple, list)):
        values = [values] * vec.lanes
    return ir.Constant(vec.llvm, list(values))


def splat(builder, vec: Vec, scalar):
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
        right = splat(builder, vec, _scalar_to(context, builder, args[1], number, vec))
        return getattr(builder, float_name if vec.is_float else int_name)(args[0], right)


for _op, _names in _BINARY.items():
    _register_operator(_op, *_names)


# Makers of intrinsics: each returns a function usable in @njit code ---------------------------------------------------


def pointer(builder, address, llvm_type):
    return builder.inttoptr(address, llvm_type.as_pointer())


def loader(result, llvm_type, convert=None):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            value = builder.load(pointer(builder, args[0], llvm_type))
            value.align = 1
            return convert(builder, value) if convert else value

        return result(types.uintp), codegen

    return load


def storer(value_type, llvm_type, convert=None):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            bits = convert(builder, args[1]) if convert else args[1]
            builder.store(bits, pointer(builder, args[0], llvm_type)).align = 1
            return context.get_dummy_value()

        return types.void(types.uintp, value_type), codegen

    return store


def maker(vec: Vec, values):
    """A function without arguments that returns a constant vector."""

    @intrinsic
    def make(typingctx):
        return vec(), lambda context, builder, sig, args: constant(vec, values)

    return make


def broadcaster(vec: Vec, scalar):
    @intrinsic
    def broadcast(typingctx, value):
        return vec(scalar), lambda context, builder, sig, args: splat(builder, vec, args[0])

    return broadcast


def shuffler(source: Vec, result: Vec, mask):
    """result[i] = concat(a, b)[mask[i]]; with one argument b is undefined."""
    lanes = ir.Constant(ir.VectorType(_I32, len(mask)), list(mask))

    @intrinsic
    def shuffle(typingctx, a):
        def codegen(context, builder, sig, args):
            return builder.shuffle_vector(args[0], ir.Constant(source.llvm, ir.Undefined), lanes)

        return result(source), codegen

    return shuffle


def shuffler_of_two(source: Vec, result: Vec, mask):
    lanes = ir.Constant(ir.VectorType(_I32, len(mask)), list(mask))

    @intrinsic
    def shuffle(typingctx, a, b):
        return result(source, source), lambda context, builder, sig, args: builder.shuffle_vector(*args, lanes)

    return shuffle


def converter(source: Vec, result: Vec, instruction: str):
    @intrinsic
    def convert(typingctx, a):
        return result(source), lambda context, builder, sig, args: getattr(builder, instruction)(args[0], result.llvm)

    return convert


def bitcaster(source: Vec, result: Vec):
    return converter(source, result, "bitcast")


def call_llvm(builder, name: str, result, args, fastmath: tuple[str, ...] = ()):
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args, fastmath=fastmath)


def unary(vec: Vec, llvm_name: str):
    @intrinsic
    def apply(typingctx, a):
        return vec(vec), lambda context, builder, sig, args: call_llvm(builder, llvm_name, vec.llvm, args)

    return apply


def binary(vec: Vec, llvm_name: str):
    @intrinsic
    def apply(typingctx, a, b):
        return vec(vec, vec), lambda context, builder, sig, args: call_llvm(builder, llvm_name, vec.llvm, args)

    return apply


def divider(vec: Vec):
    @intrinsic
    def divide(typingctx, a, b):
        return vec(vec, vec), lambda context, builder, sig, args: builder.fdiv(*args)

    return divide


def reducer(vec: Vec, scalar, llvm_name: str):
    """Of an operation whose order does not matter."""

    @intrinsic
    def reduce(typingctx, a):
        def codegen(context, builder, sig, args):
            return call_llvm(builder, llvm_name, vec.llvm.element, args)

        return scalar(vec), codegen

    return reduce


def in_halves(builder, value, lanes: int):
    undefined = ir.Constant(value.type, ir.Undefined)
    parts = (range(lanes // 2), range(lanes // 2, lanes))
    return [
        builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(_I32, lanes // 2), list(p))) for p in parts
    ]


def halver(vec: Vec):
    """The sum of all lanes: the upper half is added to the lower one, again and again, on every CPU."""

    @intrinsic
    def add_up(typingctx, a):
        def codegen(context, builder, sig, args):
            value, lanes = args[0], vec.lanes
            while lanes > 1:
                value, lanes = builder.fadd(*in_halves(builder, value, lanes)), lanes // 2
            return builder.extract_element(value, ir.Constant(_I32, 0))

        return types.float32(vec), codegen

    return add_up


def fuser(vec: Vec, llvm_name: str):
    @intrinsic
    def fma(typingctx, a, b, c):
        return vec(vec, vec, vec), lambda context, builder, sig, args: call_llvm(builder, llvm_name, vec.llvm, args)

    return fma


def extender(source: Vec, result: Vec):
    """8 lanes followed by 8 zeros."""
    mask = ir.Constant(ir.VectorType(_I32, 16), list(range(16)))

    @intrinsic
    def extend(typingctx, a):
        return result(source), lambda context, builder, sig, args: builder.shuffle_vector(
            args[0], constant(source, 0), mask
        )

    return extend
