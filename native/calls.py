"""What kernels need besides vectors: calls through an address, atomics, prefetching, a pause for spinning threads,
memory."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kimi_lite.native.isa import PORTABLE, isa
from kimi_lite.native.vectors import pointer

_I32 = ir.IntType(32)


def _caller(num_args: int):
    """Calls a C function of `num_args` int64 arguments (a `cfunc` address) that returns nothing."""
    i64 = ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [i64] * num_args)

    def codegen(context, builder, sig, args):
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))
        return context.get_dummy_value()

    return codegen, types.void(*[types.int64] * (num_args + 1))


@intrinsic
def call3(typingctx, function, a, b, c):
    """function(a, b, c) through its address."""
    codegen, sig = _caller(3)
    return sig, codegen


@intrinsic
def call5(typingctx, function, a, b, c, d, e):
    """function(a, ..., e) through its address."""
    codegen, sig = _caller(5)
    return sig, codegen


@intrinsic
def call7(typingctx, function, a, b, c, d, e, f, g):
    """function(a, ..., g) through its address."""
    codegen, sig = _caller(7)
    return sig, codegen


@intrinsic
def call8(typingctx, function, a, b, c, d, e, f, g, h):
    """function(a, ..., h) through its address."""
    codegen, sig = _caller(8)
    return sig, codegen


@intrinsic
def atomic_add(typingctx, address, value):
    """Adds to the int64 at `address` (sequentially consistent) and returns what was there before."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, address):
    """The int64 at `address`, ordered after it: acquire."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(pointer(builder, args[0], ir.IntType(64)), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx, address, value):
    """The int64 at `address` becomes `value`, behind all that was written before: release."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[1], pointer(builder, args[0], ir.IntType(64)), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def read_clock(typingctx, function, clock, target):
    """clock_gettime(clock, target) through its address: seconds and nanoseconds, two int64."""

    def codegen(context, builder, sig, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        kind = ir.FunctionType(i32, [i32, i64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.trunc(args[1], i32), args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def emit_prefetch(builder, address, locality: int = 3) -> None:
    """LLVM code that asks for the cache line at an address; any address is harmless."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    hints = [ir.Constant(_I32, number) for number in (0, locality, 1)]  # to read, data
    builder.call(function, [builder.inttoptr(address, byte), *hints])


def _prefetcher(locality: int):
    @intrinsic
    def prefetch(typingctx, address):
        def codegen(context, builder, sig, args):
            emit_prefetch(builder, args[0], locality)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


prefetch_near, prefetch_far = _prefetcher(3), _prefetcher(2)  # into L1, into L2


@intrinsic
def pause(typingctx):
    """Tells the core that it is spinning: x86 `pause`; nothing elsewhere."""

    def codegen(context, builder, sig, args):
        if isa().name != PORTABLE:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _stack(num_bytes: int):
    """The address of memory that is valid until the function returns, on a cache line."""

    @intrinsic
    def reserve(typingctx):
        def codegen(context, builder, sig, args):
            memory = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), num_bytes))
            memory.align = 64
            return builder.ptrtoint(memory, ir.IntType(64))

        return types.int64(), codegen

    return reserve


stack_1024, stack_4096 = _stack(1024), _stack(4096)


@intrinsic
def copy_bytes(typingctx, target, source, num_bytes):
    """memcpy"""

    def codegen(context, builder, sig, args):
        target, source, count = args
        cgutils.raw_memcpy(
            builder, pointer(builder, target, ir.IntType(8)), pointer(builder, source, ir.IntType(8)), count, 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def clear_bytes(typingctx, target, num_bytes):
    """memset to zero"""

    def codegen(context, builder, sig, args):
        cgutils.memset(builder, pointer(builder, args[0], ir.IntType(8)), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
