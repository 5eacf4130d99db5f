"""A checkpoint's codes in a GGUF type that can hold these very codes: repacked, so nothing is lost.

Kimi's INT4 experts become Q4_0: a 4-bit code with offset 8 and one scale for 32 weights, in another order. Going
through float32 and a general Q4_0 encoder would round onto another grid (it divides by 8 where Kimi's codes were made
by 7) and cost 8 % relative error. GSQ's 2-bit and ternary experts become Q2_0: their codes stand for -2, -1, 0, 1 times
a scale for 128 columns, Q2_0's for -1, 0, 1, 2 times one for 64: the negative scale, written twice, and the codes
counted from the other end. LITE2_128, kimi-lite's own type, writes the scale once. The codes may lie in a container of
4 bits; GSQ's 3 bits become Q4_0.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.host import usable_cores
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs.two_bits import pack_neighbours
from kimi_lite.quantize.source.stored import CodedWeight, StoredWeight

_Q2_0, _Q4_0, _Q8_0 = BY_NAME["Q2_0"], BY_NAME["Q4_0"], BY_NAME["Q8_0"]
_LITE2_128 = BY_NAME["LITE2_128"]
_LOWEST = {_Q4_0.name: -8, _Q8_0.name: -128}  # of the codes that a type holds; the highest is as far from 0, less 1
_CHUNK_BYTES = 4 << 20
_MOST_HALF = 65504.0


def kept_type(weights: Sequence[StoredWeight]) -> str | None:
    """The GGUF type that holds the codes of all these weights, the parts of a tensor, as they are; None where there is
    none. Reads every code where the container is wider than a type that may do, and none where it is not."""
    if not all(isinstance(weight, CodedWeight) for weight in weights):
        return None
    if all(weight.group % _Q2_0.block_size == 0 for weight in weights) and _all(_is_two_bits, weights):
        return _Q2_0.name
    for layout in (_Q4_0, _Q8_0):
        if all(weight.group % layout.block_size == 0 for weight in weights):
            low = _LOWEST[layout.name]
            if _all(lambda weight, low=low: _is_within(weight, low), weights):
                return layout.name
    return None


def held_by(weights: Sequence[StoredWeight], kept: str | None) -> frozenset[str]:
    """All types that hold the codes as they are, of which `kept_type` gave the one to take where none is named."""
    if kept is None:
        return frozenset()
    is_wide = kept == _Q2_0.name and all(weight.group % _LITE2_128.block_size == 0 for weight in weights)
    return frozenset((kept, _LITE2_128.name) if is_wide else (kept,))


def check_scales(weights: Sequence[StoredWeight], type_name: str) -> None:
    """Raises KimiLiteError, with the largest error, where a scale is no float16. Kimi's INT4 has 60 GB of them and is
    looked at when it is converted; GSQ's are a thirtieth of that."""
    if type_name in (_Q2_0.name, _LITE2_128.name):
        _all(lambda weight: _halves(weight.read_scales(0, weight.shape[0]), is_strict=True) is not None, weights)


def repack_rows(weight: CodedWeight, type_name: str, start: int, stop: int) -> np.ndarray:
    """Rows start..stop as blocks of a type of `held_by`, uint8 (rows, row_bytes). A bfloat16 scale fits a float16
    exactly from 2^-17 to 65,280; raises KimiLiteError where one is too large, for two bits also where it is not
    exact."""
    if type_name in (_Q2_0.name, _LITE2_128.name):
        return _two_bit_rows(BY_NAME[type_name], weight, start, stop)
    repack = {_Q4_0.name: _q4_0_rows, _Q8_0.name: _q8_0_rows}[type_name]
    return repack(weight, start, stop)


def _all(holds: Callable[[CodedWeight], bool], weights: Sequence[StoredWeight]) -> bool:
    """Of the first alone before of all: most tensors that do not fit show it there."""
    weights = list(weights)
    if not holds(weights[0]):
        return False
    with ThreadPoolExecutor(usable_cores().most_threads) as pool:
        found = pool.map(holds, islice(weights, 1, None))
        try:
            return all(found)
        finally:
            pool.shutdown(cancel_futures=True)


def _is_two_bits(weight: CodedWeight) -> bool:
    """Whether all signed codes are from -2 to 1, or all from -1 to 2."""
    if weight.zero_points is not None:
        return weight.bits == 2 and _zero_points_are(weight, (1.0, 2.0))
    if weight.bits == 2:
        return True
    low, high = _signed_range(weight, -2, 2)
    return (low >= -2 and high <= 1) or (low >= -1 and high <= 2)


def _is_within(weight: CodedWeight, low: int) -> bool:
    if weight.zero_points is not None and not _zero_points_are(weight, (float(weight.offset),)):
        return False
    if weight.offset <= -low:
        return True
    lowest, highest = _signed_range(weight, low, -low - 1)
    return lowest >= low and highest < -low


def _zero_points_are(weight: CodedWeight, allowed: tuple[float, ...]) -> bool:
    return bool(np.isin(weight.read_zero_points(0, weight.shape[0]), allowed).all())


def _signed_range(weight: CodedWeight, low: int, high: int) -> tuple[int, int]:
    """The lowest and the highest signed code of the matrix; reading stops where one is below `low` or above `high`."""
    rows = max(1, _CHUNK_BYTES // (4 * weight.packed.shape[1]))
    lowest, highest = weight.offset, -weight.offset - 1
    for start in range(0, weight.shape[0], rows):
        stop = min(start + rows, weight.shape[0])
        codes = _codes_present(weight, start, stop)
        lowest, highest = min(lowest, int(codes[0]) - weight.offset), max(highest, int(codes[-1]) - weight.offset)
        if lowest < low or highest > high:
            break
    return lowest, highest


def _codes_present(weight: CodedWeight, start: int, stop: int) -> np.ndarray:
    """The different codes of some rows, ascending; of 4 bits four at a time by a table."""
    if weight.bits != 4:
        return np.unique(weight.read_codes(start, stop))
    words = weight.packed.read_rows(start, stop).view(np.uint16)
    present = int(np.bitwise_or.reduce(_nibbles_in()[words], axis=None))
    return np.flatnonzero([present >> code & 1 for code in range(16)])


@cache
def _nibbles_in() -> np.ndarray:
    """For each 16 bits a bit for each of the four nibbles that they have: uint16 (65536,)."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    masks = [np.uint32(1) << (bits >> shift & 15) for shift in (0, 4, 8, 12)]
    return (masks[0] | masks[1] | masks[2] | masks[3]).astype(np.uint16)


def _halves(scales: np.ndarray, is_strict: bool) -> np.ndarray:
    """As float16, of the same shape. Raises KimiLiteError where one does not fit, or is not exact and that is asked."""
    with np.errstate(over="ignore"):
        halves = scales.astype("<f2")
    if not np.isfinite(halves).all():
        largest = float(np.abs(scales).max())
        raise KimiLiteError(
            f"A scale of the codes is {largest:g}, and the largest that fits a float16 is {_MOST_HALF:g}.",
            "Choose BF16.",
        )
    if is_strict and not np.array_equal(halves, scales):
        errors = np.abs(halves.astype(np.float32) - scales)
        worst = int(errors.argmax())
        raise KimiLiteError(
            f"{int((errors > 0).sum()):,} of {scales.size:,} scales of the codes are no float16: the largest error is "
            f"{errors.flat[worst]:.3g}, of {float(scales.flat[worst]):.3g}.",
            "Give it a type that holds them, as --tensor-type 'NAME=bf16'.",
        )
    return halves


def _q4_0_rows(weight: CodedWeight, start: int, stop: int) -> np.ndarray:
    codes = (weight.read_signed(start, stop) + 8).astype(np.uint8)
    codes = codes.reshape(stop - start, -1, 2, _Q4_0.block_size // 2)  # (R, B, halves, 16)
    packed = np.empty(codes.shape[:2], _Q4_0.dtype)
    packed["d"] = _block_scales(weight, start, stop, _Q4_0.block_size)
    packed["qs"] = codes[:, :, 0] | codes[:, :, 1] << 4  # byte j: weight j low, weight j + 16 high
    return packed.view(np.uint8)


def _q8_0_rows(weight: CodedWeight, start: int, stop: int) -> np.ndarray:
    codes = weight.read_signed(start, stop).astype(np.int8).reshape(stop - start, -1, _Q8_0.block_size)
    packed = np.empty(codes.shape[:2], _Q8_0.dtype)
    packed["d"] = _block_scales(weight, start, stop, _Q8_0.block_size)
    packed["qs"] = codes
    return packed.view(np.uint8)


def _block_scales(weight: CodedWeight, start: int, stop: int, block_size: int) -> np.ndarray:
    """float16 (R, B): each group's, for the blocks in it."""
    return np.repeat(_halves(weight.read_scales(start, stop), is_strict=False), weight.group // block_size, axis=1)


def _two_bit_rows(layout: Layout, weight: CodedWeight, start: int, stop: int) -> np.ndarray:
    """The type's codes stand for -1 to 2, so those with a -2 are counted from the other end, with the negative
    scale."""
    signed = weight.read_signed(start, stop).astype(np.int8).reshape(-1, layout.block_size)  # (B, block)
    scales = _halves(weight.read_scales(start, stop), is_strict=True).reshape(-1)
    scales = np.repeat(scales, weight.group // layout.block_size)  # (B,)
    is_turned = signed.max(axis=1, keepdims=True) <= 1
    codes = np.where(is_turned, 1 - signed, 1 + signed)
    if codes.min() < 0 or codes.max() > 3:
        raise KimiLiteError("Codes of the source are not what they were when it was opened.", "Repeat the command.")
    return pack_neighbours(layout, codes.astype(np.uint8), np.where(is_turned[:, 0], -scales, scales), stop - start)
