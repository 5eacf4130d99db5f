"""Activations of 16 tokens side by side, as matrix tiles multiply them (`native.amx`).

A *pack* holds up to 16 tokens; for every 256 columns it has a record of each int8 form that the activations have:

    of 32   codes (64, 16, 4) int8: four columns of 16 tokens; scales (8, 16) float32; scales times sums (8, 16)
    of 256  codes (64, 16, 4) int8; scales (16,) float32; sums of 16 in two digits (8, 16, 4) int8: 16 a + b, first a
            of all 16 groups, then b

Tokens past the last one repeat it. An operation packs what it multiplies before its products, in a phase of its own.
"""

from numba import njit, types

from kimi_lite.native.calls import clear_bytes, copy_bytes, stack_4096
from kimi_lite.native.cpu.activations import (
    KIND32,
    KIND256,
    NUM_VALUES,
    X_CODES,
    X_MINUS16,
    X_SCALES,
    X_SUMS32,
    Activations,
)
from kimi_lite.native.grid_lanes import narrow_i16x16
from kimi_lite.native.simd import (
    load_f32,
    load_i16x16,
    load_i32,
    load_i64,
    store_f32,
    store_i8x16,
    transpose_16x8,
    transpose_16x16,
)

PACK_TOKENS = 16
_CODE_BYTES = 256 * PACK_TOKENS
SCALES32, PRODUCTS32, RECORD32_BYTES = _CODE_BYTES, _CODE_BYTES + 512, _CODE_BYTES + 1024
SCALES256, DIGITS256, RECORD256_BYTES = _CODE_BYTES, _CODE_BYTES + 64, _CODE_BYTES + 64 + 512


BEHIND_PACKS = 1024  # bytes that may be read there: tiles are whole


def packs_bytes(x: Activations, num_packs: int) -> int:
    """Memory for so many packs of `x`, and what may be read behind them."""
    record = RECORD32_BYTES * (32 in x.kinds) + RECORD256_BYTES * (256 in x.kinds)
    return num_packs * -(-x.k // 256) * record + BEHIND_PACKS


@njit
def _has(activations, kind):
    return load_i64(activations + kind + X_CODES) != 0


@njit
def pack_bytes(activations):
    """Of the forms that these activations have."""
    spans = (load_i64(activations + NUM_VALUES) + 255) // 256
    num_bytes = 0
    if _has(activations, KIND32):
        num_bytes += RECORD32_BYTES
    if _has(activations, KIND256):
        num_bytes += RECORD256_BYTES
    return spans * num_bytes


@njit
def records256(activations, pack):
    """Where the records of the form with a scale for 256 begin."""
    spans = (load_i64(activations + NUM_VALUES) + 255) // 256
    return pack + spans * RECORD32_BYTES if _has(activations, KIND32) else pack


@njit
def _token(tokens, i, count):
    return types.int64(load_i32(tokens + 4 * min(i, count - 1)))


@njit
def _pack_codes(codes, k, tokens, count, first, num_columns, target):
    """`num_columns` (up to 256) of every token from `first` on."""
    stage = stack_4096()
    for i in range(PACK_TOKENS):
        copy_bytes(stage + 256 * i, codes + k * _token(tokens, i, count) + first, num_columns)
    for chunk in range(4):
        transpose_16x16(stage + 64 * chunk, 256, target + 1024 * chunk)


@njit
def _pack32(activations, tokens, count, pack):
    k, form = load_i64(activations + NUM_VALUES), activations + KIND32
    codes, scales, sums = load_i64(form + X_CODES), load_i64(form + X_SCALES), load_i64(form + X_SUMS32)
    for first in range(0, k, 256):
        num_columns = min(256, k - first)
        if num_columns < 256:
            clear_bytes(pack + SCALES32, RECORD32_BYTES - SCALES32)  # what is missing counts nothing
        _pack_codes(codes, k, tokens, count, first, num_columns, pack)
        for i in range(PACK_TOKENS):
            at = (k * _token(tokens, i, count) + first) // 32 * 4
            for g in range(num_columns // 32):
                scale = load_f32(scales + at + 4 * g)
                store_f32(pack + SCALES32 + 64 * g + 4 * i, scale)
                store_f32(pack + PRODUCTS32 + 64 * g + 4 * i, scale * load_f32(sums + at + 4 * g))
        pack += RECORD32_BYTES


@njit
def _pack256(activations, tokens, count, pack):
    k, form = load_i64(activations + NUM_VALUES), activations + KIND256
    codes, scales, minus16 = load_i64(form + X_CODES), load_i64(form + X_SCALES), load_i64(form + X_MINUS16)
    stage = stack_4096()
    for first in range(0, k, 256):
        _pack_codes(codes, k, tokens, count, first, 256, pack)
        for i in range(PACK_TOKENS):
            at = k * _token(tokens, i, count) + first
            store_f32(pack + SCALES256 + 4 * i, load_f32(scales + at // 32 * 4))
            minus = load_i16x16(minus16 + at // 16 * 2)  # -2032 .. 2032
            sums = (minus ^ -1) + 1
            store_i8x16(stage + 64 * i, narrow_i16x16(((sums + 2048) >> 4) - 128))
            store_i8x16(stage + 64 * i + 16, narrow_i16x16(sums & 15))
        transpose_16x8(stage, 64, pack + DIGITS256)
        pack += RECORD256_BYTES


@njit
def pack_kinds(activations, kind, other, tokens, count, pack):
    """`pack_tokens` of one or two forms only."""
    if kind == KIND32 or other == KIND32:
        _pack32(activations, tokens, count, pack)
    if kind == KIND256 or other == KIND256:
        _pack256(activations, tokens, count, records256(activations, pack))


@njit
def pack_tokens(activations, tokens, count, pack):
    """Packs up to 16 tokens, whose numbers are int32 at `tokens`."""
    if _has(activations, KIND32):
        _pack32(activations, tokens, count, pack)
    if _has(activations, KIND256):
        _pack256(activations, tokens, count, records256(activations, pack))
