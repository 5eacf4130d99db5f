"""The codebooks of the IQ1, IQ2 and IQ3 types, compiled into the kernels that use them.

A weight group (8 weights, or 4 for IQ3) is stored as an index into a fixed list of points. The lists come from the `gguf`
package and become constants of the LLVM module, so a kernel from Numba's disk cache carries its own and `gguf` is imported
only while a kernel compiles.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from native.simd import i8x64, i16x32


@cache
def codebook(name: str) -> np.ndarray:
    """The points of a type as unsigned codes: int64 (N, 8 or 4). IQ1's -1, 0, 1 become 0, 8, 16: room for its 1/8."""
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    points = source.grid.reshape(source.grid_shape).astype(np.int64)
    return 8 * (points + 1) if name == "IQ1_S" else points


def _constant_table(module: ir.Module, name: str, element: ir.IntType, values: list[int]) -> ir.GlobalVariable:
    """The module's constant array `name`, made on first use."""
    if name in module.globals:
        return module.globals[name]
    kind = ir.ArrayType(element, len(values))
    table = ir.GlobalVariable(module, kind, name)
    table.linkage, table.global_constant, table.unnamed_addr = "internal", True, True
    table.align, table.initializer = 64, ir.Constant(kind, values)
    return table


def reader(name: str, index_bits: int, offsets: tuple[int, ...], mask: int | None = None):
    """Makes `f(address)`: the 64 magnitudes of the points whose indices lie at `address + offsets`.

    Every index is one scalar load, every point another: on the CPUs at hand that beats gather instructions twice over.
    """
    point_bits, index_type = 8 * 64 // len(offsets), ir.IntType(index_bits)
    element, wide = ir.IntType(point_bits), ir.IntType(64)

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            packed = codebook(name).astype(np.uint8).view(f"<u{point_bits // 8}").ravel()
            table = _constant_table(builder.module, f"kimi_lite_{name}", element, packed.tolist())
            points = ir.Constant(ir.VectorType(element, len(offsets)), ir.Undefined)
            for lane, offset in enumerate(offsets):
                at = builder.inttoptr(builder.add(args[0], ir.Constant(args[0].type, offset)), index_type.as_pointer())
                index = builder.load(at)
                index.align = 1
                index = builder.zext(index, wide)
                if mask is not None:
                    index = builder.and_(index, ir.Constant(wide, mask))
                point = builder.load(builder.gep(table, [ir.Constant(wide, 0), index], inbounds=True))
                points = builder.insert_element(points, point, ir.Constant(ir.IntType(32), lane))
            return builder.bitcast(points, i8x64.llvm)

        return i8x64(types.int64), codegen

    return read


def _spiller(num_vectors: int):
    """Emits a store of vectors of 32 indices on the stack, and returns its address."""
    kind = ir.ArrayType(i16x32.llvm, num_vectors)

    def codegen(context, builder, sig, args):
        place = cgutils.alloca_once(builder, kind)
        for i, indices in enumerate(args):
            builder.store(indices, cgutils.gep_inbounds(builder, place, 0, i))
        address = builder.ptrtoint(place, ir.IntType(64))
        # An empty instruction that "returns" the address: LLVM would turn the loads back into vector extracts.
        opaque = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.asm(opaque, "", "=r,0,~{memory}", [address], side_effect=True)

    return types.int64(*[i16x32] * num_vectors), codegen


@intrinsic
def spill(typingctx, indices):
    """The address of 32 indices stored on the stack: cheaper than moving them one by one to scalar registers."""
    return _spiller(1)


@intrinsic
def spill_pair(typingctx, first, second):
    """The address of 64 indices stored on the stack."""
    return _spiller(2)


_EIGHT_WORDS, _SIXTEEN_WORDS = tuple(range(0, 16, 2)), tuple(range(0, 32, 2))
read_iq2_xxs = reader("IQ2_XXS", 8, (0, 1, 2, 3, 8, 9, 10, 11))  # 4 indices, 4 bytes of signs and scale, ...
read_iq2_xs = reader("IQ2_XS", 16, _EIGHT_WORDS, mask=511)
read_iq2_s = reader("IQ2_S", 16, _EIGHT_WORDS)
read_iq3_xxs = reader("IQ3_XXS", 8, tuple(range(16)))
read_iq3_s = reader("IQ3_S", 16, _SIXTEEN_WORDS)
read_iq1 = reader("IQ1_S", 16, _EIGHT_WORDS)
