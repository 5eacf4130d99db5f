"""Quantized weights times many tokens with matrix tiles (`native.amx`): what `panel` does, several times faster.

A panel is up to 64 rows, 16 to a tile, of whole numbers in one byte, or in two for types whose codes times small scales
need them, so that 256 columns are added up as integers before anything becomes float32. For every 256 columns each tile
of rows has a record:

    block32    codes (16, 256); scales (16, 256 / group) float32; minima like scales
    block256   low digits (16, 256); high digits (16, 256); minima (16, 64) bytes; d (16,), dmin (16,) float32

Rows of weights are the first factor as they lie; the second are packs of 16 tokens (`packing`). A result tile has a row
of weights in each row and a token in each lane. It is brought to float32 in this order: block32, for every group,
sum += (scale of the tokens * products) * scale of the row, then -= (scale * sum of the tokens) * minimum; block256, for
every 256, sum += (products * d - minima * dmin) * scale of the tokens; each with one rounding where `fma` says so. A
product has the same bits whatever the other tokens are and however many.

    panel(weights, row_bytes, num_rows <= TILE_PANEL_ROWS, k, panel)
    gemm(panel, activations, packs, num_tokens, out, out_stride_bytes, mode)

`packs` are consecutive, `pack_bytes` each; the rest as in `panel`.
"""

from functools import cache

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kimi_lite.native.amx import (
    TILE_BYTES,
    TILE_ROWS,
    Shape,
    emit_load,
    emit_product,
    emit_store,
    emit_zero,
    has_amx,
    release_tiles,
    shapes,
)
from kimi_lite.native.calls import clear_bytes
from kimi_lite.native.cpu.activations import NUM_VALUES
from kimi_lite.native.cpu.blocks import Digits, digits, digits_of, row_scale, unpack
from kimi_lite.native.cpu.compiler import IN_ORDER, Kernel
from kimi_lite.native.cpu.packing import (
    DIGITS256,
    PACK_TOKENS,
    PRODUCTS32,
    RECORD32_BYTES,
    RECORD256_BYTES,
    SCALES32,
    SCALES256,
    pack_bytes,
    records256,
)
from kimi_lite.native.cpu.panel import ADD, GEMM_SIGNATURE, PANEL_SIGNATURE, store_results
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.simd import (
    broadcast_f32,
    fma_f32x16,
    int_to_f32x16,
    load_f32,
    load_f32x16,
    load_i32x16,
    load_i64,
    store_f32,
    store_f32x16,
    transpose_16x16,
    zero_f32x16,
)
from kimi_lite.native.vectors import Vec, call_llvm, constant, f32x16, i32x16, pointer, splat

TILE_PANEL_ROWS = 64  # more than a tile's, so that a pack is taken from a far cache once for all of them
_TILES = TILE_PANEL_ROWS // TILE_ROWS
_STAGE_BYTES = 16384  # 16 result tiles
_BLOCK_PACKS = 8  # that are multiplied while a record of weights is in the nearest cache; their sums follow the stage
_SUM_BYTES = 1024  # of a pack and a tile of rows
_RECORDS = _STAGE_BYTES + _BLOCK_PACKS * _TILES * _SUM_BYTES
_HIGH, _MINIMA, _FACTORS, _RECORD_BYTES = 4096, 8192, 8192 + 1024, 8192 + 1024 + 128


def tile_panel_bytes(k: int) -> int:
    """Bytes of scratch that a panel of K columns takes, whatever its type."""
    return _RECORDS + -(-k // 256) * _TILES * _RECORD_BYTES


def uses_tiles(name: str) -> bool:
    """Whether this process multiplies panels of type `name` with matrix tiles."""
    layout = BY_NAME[name]
    return has_amx() and (layout.product == "block32" or digits_of(name) is not None)


# Unpacking ------------------------------------------------------------------------------------------------------------


def _block_panel(name: str, block_size: int, block_bytes: int, group: int):
    scale_bytes = 4 * (256 // group)  # of a row

    def panel(weights, row_bytes, num_rows, k, panel):
        for row in range(num_rows):
            block = weights + row * row_bytes
            record, place = panel + _RECORDS + row // TILE_ROWS * _RECORD_BYTES, row % TILE_ROWS
            for column in range(0, k, 256):
                scales = record + _HIGH + scale_bytes * place
                if k - column < 256:  # what is missing counts nothing
                    clear_bytes(scales, scale_bytes)
                    clear_bytes(scales + 1024, scale_bytes)
                for b in range(min(256, k - column) // block_size):
                    at = b * block_size
                    to = 4 * (at // group)
                    unpack(name, block, record + 256 * place + at, scales + to, scales + 1024 + to)
                    block += block_bytes
                record += _TILES * _RECORD_BYTES

    return panel


def _digits_panel(name: str, block_bytes: int, has_minima: bool):
    header_bytes = BY_NAME[name].header_bytes

    def panel(weights, row_bytes, num_rows, k, panel):
        for row in range(num_rows):
            start = weights + row * row_bytes
            block, of_row = start + header_bytes, row_scale(name, start)
            record, place = panel + _RECORDS + row // TILE_ROWS * _RECORD_BYTES, row % TILE_ROWS
            for _ in range(k // 256):
                low, factors = record + 256 * place, record + _FACTORS + 4 * place
                digits(name, block, low, low + _HIGH, record + _MINIMA + 64 * place, factors)
                if header_bytes > 0:
                    store_f32(factors, load_f32(factors) * of_row)
                    if has_minima:
                        store_f32(factors + 64, load_f32(factors + 64) * of_row)
                block += block_bytes
                record += _TILES * _RECORD_BYTES

    return panel


@cache
def tile_panel_kernel(name: str) -> Kernel:
    """The compiled `panel` function of type `name`."""
    layout = BY_NAME[name]
    if layout.product == "block32":
        panel = _block_panel(name, layout.block_size, layout.block_bytes, layout.group)
    else:
        form = digits_of(name)
        assert form is not None, name
        panel = _digits_panel(name, layout.block_bytes, form.minima != "none")
    return Kernel(panel, PANEL_SIGNATURE)


# Products -------------------------------------------------------------------------------------------------------------

_I64 = ir.IntType(64)
_AHEAD = 2  # groups whose tiles are under way
_whole_shapes = shapes(*[Shape()] * 8)


def _numbers(*literals):
    """The Python numbers of arguments that kernels give as constants; None while their types are not known to be."""
    if not all(isinstance(each, (types.IntegerLiteral, types.BooleanLiteral)) for each in literals):
        return None
    return [int(each.literal_value) for each in literals]


def _at(builder, address, offset: int):
    return builder.add(address, ir.Constant(_I64, offset))


def _load(builder, vec: Vec, address, offset: int):
    value = builder.load(pointer(builder, _at(builder, address, offset), vec.llvm))
    value.align = 4
    return value


def _broadcast(builder, address, offset: int):
    scalar = builder.load(pointer(builder, _at(builder, address, offset), ir.FloatType()))
    scalar.align = 4
    return splat(builder, f32x16, scalar)


def _fma(builder, a, b, c):
    return call_llvm(builder, "llvm.fma.v16f32", f32x16.llvm, (a, b, c))


def _emit_group(builder, group: int, is_signed: bool, g: int, record, pack, stage) -> None:
    """The stage gets the products of the g-th group."""
    total, first, second = g % 4, 4 + g % 2, 6 + g % 2
    emit_zero(builder, total)
    emit_load(builder, first, _at(builder, record, group * g), 256)
    emit_load(builder, second, _at(builder, pack, TILE_BYTES // 4 * group * g), 64)
    emit_product(builder, total, first, second, is_signed)
    emit_store(builder, total, _at(builder, stage, 1024 * g), 64)


@intrinsic(prefer_literal=True)
def _add_groups(typingctx, group, is_signed, record, pack, stage, sums):
    """256 columns of a tile of rows times a pack, added to its sums. The tiles of a group are multiplied while the one
    before is brought to float32."""
    numbers = _numbers(group, is_signed)
    if numbers is None:
        return None
    columns, has_signs = numbers
    groups = 256 // columns

    def codegen(context, builder, sig, args):
        record, pack, stage, sums = args[2:]
        totals = [_load(builder, f32x16, sums, 64 * row) for row in range(TILE_ROWS)]
        for g in range(_AHEAD):
            _emit_group(builder, columns, has_signs, g, record, pack, stage)
        for g in range(groups):
            if g + _AHEAD < groups:
                _emit_group(builder, columns, has_signs, g + _AHEAD, record, pack, stage)
            place = 64 * (g * columns // 32)
            x_scale = _load(builder, f32x16, pack, SCALES32 + place)
            taken = _load(builder, f32x16, pack, PRODUCTS32 + place)
            for row in range(TILE_ROWS):
                at = _HIGH + 4 * (groups * row + g)
                products = builder.sitofp(_load(builder, i32x16, stage, 1024 * g + 64 * row), f32x16.llvm)
                products = builder.fmul(products, x_scale)
                totals[row] = _fma(builder, products, _broadcast(builder, record, at), totals[row])
                if not has_signs:
                    minimum = _broadcast(builder, record, at + 1024)
                    totals[row] = _fma(builder, taken, builder.fsub(constant(f32x16, -0.0), minimum), totals[row])
        for row, total in enumerate(totals):
            builder.store(total, pointer(builder, _at(builder, sums, 64 * row), f32x16.llvm)).align = 64
        return context.get_dummy_value()

    return types.void(group, is_signed, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def _multiply_digits(typingctx, num_packs, shift, is_signed, num_minima, record, pack, pack_stride, stage):
    """The stage gets result tiles of `num_packs` packs: of low digits, of high ones, of minima with a, with b."""
    numbers = _numbers(num_packs, shift, is_signed, num_minima)
    if numbers is None:
        return None
    count, has_high, has_signs, minima = numbers
    signs = (False, has_signs) if has_high else (has_signs,)
    total_of = {place: i for i, place in enumerate((d, p) for d in range(len(signs)) for p in range(count))}
    assert len(total_of) <= 4, total_of

    def codegen(context, builder, sig, args):
        record, pack, pack_stride, stage = args[4:]
        packs = [builder.add(pack, builder.mul(pack_stride, ir.Constant(_I64, p))) for p in range(count)]
        for total in total_of.values():
            emit_zero(builder, total)
        for chunk in range(4):
            for d in range(len(signs)):
                emit_load(builder, 4 + d, _at(builder, record, _HIGH * d + 64 * chunk), 256)
            for p, place in enumerate(packs):
                emit_load(builder, 6 + p % 2, _at(builder, place, 1024 * chunk), 64)
                for d, has_sign in enumerate(signs):
                    emit_product(builder, total_of[d, p], 4 + d, 6 + p % 2, has_sign)
        for total in total_of.values():
            emit_store(builder, total, _at(builder, stage, 1024 * total), 64)
        for i in range(minima):
            emit_load(builder, 4, _at(builder, record, _MINIMA), 64)
            for p, place in enumerate(packs):
                emit_zero(builder, p)
                emit_load(builder, 6 + p % 2, _at(builder, place, DIGITS256 + 256 * i), 64)
                emit_product(builder, p, 4, 6 + p % 2, is_signed=False)
                emit_store(builder, p, _at(builder, stage, 1024 * (len(total_of) + count * i + p)), 64)
        return context.get_dummy_value()

    return types.void(num_packs, shift, is_signed, num_minima, *[types.int64] * 4), codegen


@njit
def _clear(sums, num_packs):
    for i in range(0, _SUM_BYTES * _TILES * num_packs, 64):
        store_f32x16(sums + i, zero_f32x16())


@njit
def _deliver(sums, stage, num_packs, num_tokens, out, out_stride, mode):
    """The sums of packs, rows by tokens, to the rows of their tokens."""
    for p in range(num_packs):
        for tile in range((mode % ADD + TILE_ROWS - 1) // TILE_ROWS):
            transpose_16x16(sums + _SUM_BYTES * (_TILES * p + tile), 64, stage)
            num_rows = min(TILE_ROWS, mode % ADD - TILE_ROWS * tile)
            for i in range(min(PACK_TOKENS, num_tokens - PACK_TOKENS * p)):
                target = out + (PACK_TOKENS * p + i) * out_stride + 64 * tile
                store_results(load_f32x16(stage + 64 * i), target, num_rows, mode >= ADD)


_shapes_of_16, _shapes_of_32 = (
    shapes(*[Shape()] * 4, *[Shape(row_bytes=group)] * 2, *[Shape(rows=group // 4)] * 2) for group in (16, 32)
)


def _block_gemm(group: int, is_signed: bool):
    def gemm(panel, activations, packs, num_tokens, out, out_stride, mode):
        k, stride = load_i64(activations + NUM_VALUES), pack_bytes(activations)
        num_packs, num_tiles = (num_tokens + PACK_TOKENS - 1) // PACK_TOKENS, (mode % ADD + TILE_ROWS - 1) // TILE_ROWS
        if group == 16:
            _shapes_of_16()
        else:
            _shapes_of_32()
        for begin in range(0, num_packs, _BLOCK_PACKS):
            block, sums = min(_BLOCK_PACKS, num_packs - begin), panel + _STAGE_BYTES
            _clear(sums, block)
            for span in range((k + 255) // 256):
                first = panel + _RECORDS + span * _TILES * _RECORD_BYTES
                pack = packs + begin * stride + span * RECORD32_BYTES
                for p in range(block):
                    for tile in range(num_tiles):
                        record, at = first + tile * _RECORD_BYTES, sums + _SUM_BYTES * (_TILES * p + tile)
                        _add_groups(group, is_signed, record, pack, panel, at)
                    pack += stride
            first = PACK_TOKENS * begin
            _deliver(sums, panel, block, num_tokens - first, out + first * out_stride, out_stride, mode)
        release_tiles()

    return gemm


@njit(fastmath=IN_ORDER)
def _add_digits(num_packs, shift, num_minima, record, x_scales, stage, sums):
    """Adds the result tiles of one of `num_packs` packs to its sums."""
    minima = 1024 * num_packs * (2 if shift else 1)
    x_scale = load_f32x16(x_scales)
    for row in range(TILE_ROWS):
        at = stage + 64 * row
        total = load_i32x16(at)
        if shift:
            total = total + (load_i32x16(at + 1024 * num_packs) << shift)
        value = int_to_f32x16(total) * broadcast_f32(record + _FACTORS + 4 * row)
        if num_minima:
            taken = load_i32x16(at + minima)
            if num_minima == 2:
                taken = (taken << 4) + load_i32x16(at + minima + 1024 * num_packs)
            value = fma_f32x16(int_to_f32x16(taken), broadcast_f32(record + _FACTORS + 64 + 4 * row) * -1.0, value)
        store_f32x16(sums + 64 * row, fma_f32x16(value, x_scale, load_f32x16(sums + 64 * row)))


def _digits_gemm(shift: int, is_signed: bool, num_minima: int):
    most = 2 if shift else 4  # packs at a time: their result tiles, of one digit or two, are four

    def gemm(panel, activations, packs, num_tokens, out, out_stride, mode):
        k, stride = load_i64(activations + NUM_VALUES), pack_bytes(activations)
        num_packs, num_tiles = (num_tokens + PACK_TOKENS - 1) // PACK_TOKENS, (mode % ADD + TILE_ROWS - 1) // TILE_ROWS
        offset = records256(activations, 0)
        _whole_shapes()
        for begin in range(0, num_packs, _BLOCK_PACKS):
            block, sums = min(_BLOCK_PACKS, num_packs - begin), panel + _STAGE_BYTES
            _clear(sums, block)
            for span in range(k // 256):
                first = panel + _RECORDS + span * _TILES * _RECORD_BYTES
                pack, p = packs + begin * stride + offset + span * RECORD256_BYTES, 0
                while p + most <= block:
                    for tile in range(num_tiles):
                        record, at = first + tile * _RECORD_BYTES, sums + _SUM_BYTES * (_TILES * p + tile)
                        _multiply_digits(most, shift, is_signed, num_minima, record, pack, stride, panel)
                        for i in range(most):
                            x_scales = pack + i * stride + SCALES256
                            to = at + _SUM_BYTES * _TILES * i
                            _add_digits(most, shift, num_minima, record, x_scales, panel + 1024 * i, to)
                    pack, p = pack + most * stride, p + most
                while p < block:
                    for tile in range(num_tiles):
                        record, at = first + tile * _RECORD_BYTES, sums + _SUM_BYTES * (_TILES * p + tile)
                        _multiply_digits(1, shift, is_signed, num_minima, record, pack, stride, panel)
                        _add_digits(1, shift, num_minima, record, pack + SCALES256, panel, at)
                    pack, p = pack + stride, p + 1
            first = PACK_TOKENS * begin
            _deliver(sums, panel, block, num_tokens - first, out + first * out_stride, out_stride, mode)
        release_tiles()

    return gemm


@cache
def _shared_gemm(form: Digits | tuple[int, bool]) -> Kernel:
    if not isinstance(form, Digits):
        return Kernel(_block_gemm(*form), GEMM_SIGNATURE, IN_ORDER)
    num_minima = {"none": 0, "nibbles": 1, "bytes": 2}[form.minima]
    return Kernel(_digits_gemm(form.shift, form.is_signed, num_minima), GEMM_SIGNATURE, IN_ORDER)


def tile_gemm_kernel(name: str) -> Kernel:
    """The compiled `gemm` function for panels of type `name`."""
    layout = BY_NAME[name]
    form = (layout.group, layout.is_signed) if layout.product == "block32" else digits_of(name)
    assert form is not None, name
    return _shared_gemm(form)
