"""float16 <-> float32 in LLVM code, also for processors that have no instruction for it (x86 without F16C).

There LLVM would call functions of the compiler's runtime library, which is not in a Python process.
"""

import platform
from functools import cache

from llvmlite import ir

from kimi_lite.native.isa import target_features


@cache
def has_half_instructions() -> bool:
    """x86 from 2012 on and 64-bit ARM convert in hardware; elsewhere nothing is taken for granted."""
    machine = platform.machine().lower()
    return machine in ("arm64", "aarch64") or (machine in ("x86_64", "amd64") and "f16c" in target_features())


def _like(value_type: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, in as many lanes as `value_type` has."""
    return ir.VectorType(element, value_type.count) if isinstance(value_type, ir.VectorType) else element


def _number(value_type: ir.Type, value) -> ir.Constant:
    return ir.Constant(value_type, [value] * value_type.count if isinstance(value_type, ir.VectorType) else value)


def widen_half(builder: ir.IRBuilder, value):
    """half (or a vector of them) -> float, exactly."""
    wide, word = _like(value.type, ir.FloatType()), _like(value.type, ir.IntType(32))
    if has_half_instructions():
        return builder.fpext(value, wide)
    bits = builder.zext(builder.bitcast(value, _like(value.type, ir.IntType(16))), word)
    magnitude = builder.shl(builder.and_(bits, _number(word, 0x7FFF)), _number(word, 13))
    scaled = builder.fmul(
        builder.bitcast(magnitude, wide), _number(wide, 2.0**112)
    )  # the exponent's bias; subnormals too
    finite = builder.bitcast(scaled, word)
    infinite = builder.icmp_unsigned(">=", magnitude, _number(word, 0x7C00 << 13))
    result = builder.select(infinite, builder.or_(magnitude, _number(word, 0x7F800000)), finite)
    sign = builder.shl(builder.and_(bits, _number(word, 0x8000)), _number(word, 16))
    return builder.bitcast(builder.or_(result, sign), wide)


def widen_half_bits(builder: ir.IRBuilder, bits):
    """One float16, given as an int16, -> float. Through an integer register: loaded as a float it would be merged into
    a vector register, and so wait for whatever was computed there in the last turn of the loop."""
    if not has_half_instructions():
        return widen_half(builder, builder.bitcast(bits, ir.HalfType()))
    lane = ir.Constant(ir.IntType(32), 0)
    words = builder.insert_element(
        ir.Constant(ir.VectorType(ir.IntType(32), 4), None), builder.zext(bits, ir.IntType(32)), lane
    )
    halves = builder.bitcast(words, ir.VectorType(ir.HalfType(), 8))
    return builder.extract_element(widen_half(builder, halves), lane)


def narrow_to_half(builder: ir.IRBuilder, value):
    """float (or a vector of them) -> half, rounded to nearest even; beyond 65504 infinity, NaN stays NaN."""
    half, word = _like(value.type, ir.HalfType()), _like(value.type, ir.IntType(32))
    if has_half_instructions():
        return builder.fptrunc(value, half)
    bits = builder.bitcast(value, word)
    magnitude = builder.and_(bits, _number(word, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _number(word, 13)), _number(word, 1))
    rounding = builder.add(odd, _number(word, 0x0FFF - (112 << 23)))  # half of the last place, less the exponent's bias
    normal = builder.lshr(builder.add(magnitude, rounding), _number(word, 13))
    shifted = builder.fadd(
        builder.bitcast(magnitude, value.type), _number(value.type, 0.5)
    )  # the sum's mantissa is the result
    small = builder.sub(builder.bitcast(shifted, word), _number(word, 0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", magnitude, _number(word, 113 << 23)), small, normal)
    is_large = builder.icmp_unsigned(">=", magnitude, _number(word, 143 << 23))
    result = builder.select(is_large, _number(word, 0x7C00), result)
    result = builder.select(
        builder.icmp_unsigned(">", magnitude, _number(word, 0x7F800000)), _number(word, 0x7E00), result
    )
    sign = builder.and_(builder.lshr(bits, _number(word, 16)), _number(word, 0x8000))
    return builder.bitcast(builder.trunc(builder.or_(result, sign), _like(value.type, ir.IntType(16))), half)
