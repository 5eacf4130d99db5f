"""The register tile of products of int8 panels: 16 rows of weights times T tokens, 16 T sums in registers.

Generated against LLVM, because the width of a vector, the instructions and how many products fit 16 bits depend on the
CPU (`native.isa`) and on the type. The group's products are summed as integers and scaled into float32:

    block32    sum += x_scale * (products * scale - x_sum * minimum)
    block256   of 256 columns: part += products * scale, part -= x_sum * minimum; sum += x_scale * part

Without a dot-product instruction vpmaddubsw leaves sums of two products as int16; as many of them are added as such as
the type's largest code allows, and only then widened.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kimi_lite.native.calls import emit_prefetch
from kimi_lite.native.cpu.tiles import shifted
from kimi_lite.native.isa import AVX512_VNNI, PORTABLE, isa
from kimi_lite.native.simd_dot import add_pairs, byte_pairs, dot_of, unsigned_dot_of, with_sign_of
from kimi_lite.native.vectors import Vec, call_llvm, splat

_LANES = 16 if isa().name == AVX512_VNNI else 8
TILE_TOKENS = 8 if isa().name == AVX512_VNNI else 4  # whose sums fit the registers; 8 of 32, 8 of 16
_BYTES, _WORDS, _FLOATS = Vec("i8", 4 * _LANES), Vec("i32", _LANES), Vec("f32", _LANES)
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class PanelForm(NamedTuple):
    """What decides the product of a panel: `span` columns share a scale of the activations (32 or 256), `group` one of
    the weights; `num_pairs` sums of two products are added in 16 bits, 0 where a dot product adds up 32."""

    span: int
    group: int
    is_signed: bool
    has_minima: bool
    num_pairs: int


def _load(builder, address, kind, align: int = 4):
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _fma(builder, a, b, c):
    return call_llvm(builder, f"llvm.fma.v{_LANES}f32", _FLOATS.llvm, (a, b, c))


def _group_products(builder, form: PanelForm, codes, inputs) -> dict:
    """{(token, half): int32 sums of a group's products}. codes: address of (group / 4, 16, 4) bytes; inputs: of each
    token's `group` bytes."""
    halves = range(16 // _LANES)
    sums, pairs = {}, {}
    longest, words = form.num_pairs, form.group // 4
    for j in range(words):
        weights = [_load(builder, shifted(builder, codes, 64 * j + 4 * _LANES * h), _BYTES.llvm) for h in halves]
        for t, line in enumerate(inputs):
            word = splat(builder, _WORDS, _load(builder, shifted(builder, line, 4 * j), _I32))
            x = builder.bitcast(word, _BYTES.llvm)
            for h in halves:
                place, zero = (t, h), ir.Constant(_WORDS.llvm, [0] * _LANES)
                if not longest:
                    emit = dot_of if form.is_signed else unsigned_dot_of
                    sums[place] = emit(builder, sums.get(place, zero), weights[h], x)
                    continue
                factors = with_sign_of(builder, weights[h], x) if form.is_signed else (weights[h], x)
                product = byte_pairs(builder, *factors)
                pairs[place] = builder.add(pairs[place], product) if j % longest else product
                if j % longest == longest - 1 or j == words - 1:
                    sums[place] = add_pairs(builder, sums.get(place), pairs.pop(place))
        for values in (sums, pairs):
            values.update((place, _in_register(builder, value)) for place, value in values.items())
    return sums


def _in_register(builder, value):
    """The value, which LLVM must have in a register here: it would take token after token otherwise, and write the
    group's weights, which do not fit the registers, to the stack."""
    if isa().name == PORTABLE:
        return value
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], side_effect=True)


def _emit(builder, num_tokens: int, form: PanelForm, addresses) -> None:
    """LLVM code of `panel_tile`."""
    halves = range(16 // _LANES)
    places = [(t, h) for t in range(num_tokens) for h in halves]
    codes, scales, minima, x, x_scales, x_sums, tokens, last, k, out, ahead, num_lines = addresses

    def start_of(base, index, values_per_entry):
        return shifted(builder, base, builder.mul(index, builder.udiv(k, ir.Constant(_I64, values_per_entry))))

    lines, scale_lines, sum_lines = [], [], []
    for t in range(num_tokens):
        number = ir.Constant(_I64, t)
        number = builder.select(builder.icmp_signed("<", number, last), number, last)
        token = builder.sext(_load(builder, shifted(builder, tokens, (number, 4)), _I32), _I64)
        lines.append(start_of(x, token, 1))
        scale_lines.append(start_of(x_scales, token, 8))
        sum_lines.append(start_of(x_sums, token, form.group // 4))
    zero = ir.Constant(_FLOATS.llvm, [0.0] * _LANES)
    totals = {place: cgutils.alloca_once_value(builder, zero) for place in places}
    groups = max(1, form.span // form.group)  # of a span
    span_columns = groups * form.group

    def broadcast(address):
        return splat(builder, _FLOATS, _load(builder, address, _F32))

    def per_half(base, group):
        return [_load(builder, shifted(builder, base, (group, 64), 4 * _LANES * h), _FLOATS.llvm) for h in halves]

    with cgutils.for_range(builder, builder.udiv(k, ir.Constant(_I64, span_columns)), intp=_I64) as spans:
        with cgutils.for_range(builder, num_lines, intp=_I64) as loop:
            line = shifted(builder, loop.index, builder.mul(spans.index, num_lines))
            emit_prefetch(builder, shifted(builder, ahead, (line, 64)), locality=2)
        inner = {place: cgutils.alloca_once_value(builder, zero) for place in places}
        for place in places:
            builder.store(zero, inner[place])
        with cgutils.for_range(builder, ir.Constant(_I64, groups), intp=_I64) as loop:
            group = shifted(builder, loop.index, (spans.index, groups))
            products = _group_products(
                builder,
                form,
                shifted(builder, codes, (group, 16 * form.group)),
                [shifted(builder, line, (group, form.group)) for line in lines],
            )
            scale = per_half(scales, group)
            minimum = per_half(minima, group) if form.has_minima else None
            for t in range(num_tokens):
                if form.has_minima:
                    x_sum = builder.fsub(
                        ir.Constant(_FLOATS.llvm, [-0.0] * _LANES),
                        broadcast(shifted(builder, sum_lines[t], (group, 4))),
                    )
                for h in halves:
                    total = builder.load(inner[t, h])
                    value = builder.sitofp(products[t, h], _FLOATS.llvm)
                    total = _fma(builder, value, scale[h], total)
                    if form.has_minima:
                        total = _fma(builder, minimum[h], x_sum, total)
                    builder.store(total, inner[t, h])
        for t in range(num_tokens):
            x_scale = broadcast(shifted(builder, scale_lines[t], (spans.index, span_columns // 8)))
            for h in halves:
                total = builder.load(totals[t, h])
                builder.store(_fma(builder, builder.load(inner[t, h]), x_scale, total), totals[t, h])
    for t, h in places:
        target = shifted(builder, out, 64 * t + 4 * _LANES * h)
        builder.store(builder.load(totals[t, h]), builder.inttoptr(target, _FLOATS.llvm.as_pointer())).align = 4


@intrinsic(prefer_literal=True)
def panel_tile(
    typingctx,
    num_tokens, span, group, is_signed, has_minima, num_pairs,
    codes, scales, minima, x, x_scales, x_sums, tokens, last, k, out, ahead, lines,
):  # fmt: skip
    """out (T, 16) float32 = the products of a panel with tokens 0 .. T - 1, where `tokens` has their int32 numbers;
    behind number `last` that one again.

    num_tokens (T) and what follows it, a `PanelForm`, are constants. codes, scales, minima: the panel
    (`native.cpu.panel`); x, x_scales, x_sums: of all tokens, as `native.cpu.activations` lays them, sums of `group`.
    For every span `lines` more cache lines from `ahead` on are asked for.
    """
    constants = num_tokens, span, group, is_signed, has_minima, num_pairs
    if not all(isinstance(each, (types.IntegerLiteral, types.BooleanLiteral)) for each in constants):
        return None
    count, *form = (each.literal_value for each in constants)

    def codegen(context, builder, sig, args):
        _emit(builder, count, PanelForm(*form), args[6:])
        return context.get_dummy_value()

    return types.void(*constants, *[types.int64] * 12), codegen
