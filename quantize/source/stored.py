"""The ways a checkpoint stores a weight, each read as float32 rows: plain floats, FP8 in blocks, INT4 and 2 bits in
groups.

Rows are counted over all axes but the last, and only the rows asked for are touched. Everything here is exact in
float32: each stored number is a float32, and each product below is the number the checkpoint stands for.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from kimi_lite.arch.reader import shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.shards import RawTensor

FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
# what may stand behind "X.weight" and say what the weight means
FACTOR_SUFFIXES = ("_packed", "_scale", "_shape", "_scale_inv", "_zero_point", "_g_idx")
_CODES_PER_WORD = 8
_FORMATS_HINT = "It reads float32, float16, bfloat16, block FP8 (e4m3), pack-quantized INT4 and Humming's uint2."


class StoredWeight(Protocol):
    """A logical weight: its `shape`, its rows, and in a word how they are stored."""

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as float32 (rows, last axis)."""


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """float32, float16 or bfloat16."""

    raw: RawTensor

    @property
    def kind(self) -> str:
        return self.raw.dtype.lower()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return _to_float32(self.raw.read_rows(start, stop), self.raw.dtype)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """DeepSeek's block FP8: e4m3 codes times one factor for each `block` of rows x columns; edge blocks may be
    partial."""

    raw: RawTensor
    factors: RawTensor  # (ceil(N / block rows), ceil(M / block columns))
    block: tuple[int, int]

    @property
    def kind(self) -> str:
        return "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        block_rows, block_columns = self.block
        weights = e4m3_values()[self.raw.read_rows(start, stop)]  # (R, M)
        first, end = start // block_rows, -(-stop // block_rows)
        factors = _to_float32(self.factors.read_rows(first, end), self.factors.dtype)  # (block rows, block columns)
        factors = factors[np.arange(start, stop) // block_rows - first]  # (R, block columns)
        weights *= np.repeat(factors, block_columns, axis=1)[:, : weights.shape[1]]
        return weights


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """compressed-tensors' pack-quantized INT4, as Kimi's routed experts: eight codes in an int32, lowest nibble first,
    offset 8, one scale for each group of columns."""

    packed: RawTensor  # (N, M / 8) int32
    scales: RawTensor  # (N, M / group)

    @property
    def kind(self) -> str:
        return "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape[0], self.packed.shape[1] * _CODES_PER_WORD

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """Codes 0..15 (the weight's integer plus 8) as uint8 (rows, M)."""
        packed = self.packed.read_rows(start, stop).view(np.uint8)  # (R, M / 2), a plain stream of nibbles
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(stop - start, -1)

    def read_scales(self, start: int, stop: int) -> np.ndarray:
        return _to_float32(self.scales.read_rows(start, stop), self.scales.dtype)  # (R, M / group)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        scales = self.read_scales(start, stop)
        weights = self.read_codes(start, stop).astype(np.float32)
        weights -= 8
        groups = weights.reshape(stop - start, scales.shape[1], -1)  # (R, groups, group), a view
        with np.errstate(invalid="ignore"):  # a damaged scale may be infinite: encoders refuse what comes of it
            groups *= scales[..., None]
        return weights


@dataclass(frozen=True, slots=True)
class Int2Weight:
    """Humming's uint2, as the 2-bit GSQ release of K2.5: sixteen codes in an int32, lowest bits first, that stand for
    -2, -1, 0 and 1 times the scale of their group of columns."""

    packed: RawTensor  # (N, M / 16) int32
    scales: RawTensor  # (N, M / group)

    @property
    def kind(self) -> str:
        return "int2"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape[0], self.packed.shape[1] * _CODES_PER_WORD * 2

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """Codes 0..3 (the weight's integer plus 2) as uint8 (rows, M)."""
        quads = self.packed.read_rows(start, stop).view(np.uint8)  # (R, M / 4)
        return np.stack([quads & 3, quads >> 2 & 3, quads >> 4 & 3, quads >> 6], axis=-1).reshape(stop - start, -1)

    def read_scales(self, start: int, stop: int) -> np.ndarray:
        return _to_float32(self.scales.read_rows(start, stop), self.scales.dtype)  # (R, M / group)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        scales = self.read_scales(start, stop)
        weights = self.read_codes(start, stop).astype(np.float32) - np.float32(2)
        weights.reshape(stop - start, scales.shape[1], -1)[...] *= scales[..., None]
        return weights


def make_weight(name: str, raw: dict[str, RawTensor], fp8_block: tuple[int, int]) -> StoredWeight:
    """The weight `name` (ending in ".weight", or plain), from whichever tensors of `raw` store it. Raises
    KimiLiteError, also for a tensor next to it that this way of storing does not use: it would change the weight."""
    if f"{name}_packed" in raw:
        weight, used = _make_int4(name, raw), {"_packed", "_scale", "_shape"}
    elif name not in raw:
        raise KimiLiteError(f"{name} has a scale or a shape, but no weights with them.", _FORMATS_HINT)
    else:
        tensor = raw[name]
        if tensor.dtype == "F8_E4M3":
            weight, used = _make_fp8(name, raw, fp8_block), {"", "_scale_inv"}
        elif tensor.dtype == "I32":
            weight, used = _make_int2(name, raw), {"", "_scale", "_shape"}
        elif tensor.dtype in FLOAT_DTYPES:
            weight, used = PlainWeight(tensor), {""}
        else:
            problem = f"{name} is stored as {shown(tensor.dtype)}, which this program does not read"
            raise KimiLiteError(f"{problem}.", _FORMATS_HINT)
    unused = [name + suffix for suffix in ("", *FACTOR_SUFFIXES) if suffix not in used and name + suffix in raw]
    if unused:
        problem = f"{name} is {weight.kind}, and {unused[0]} would change it in a way that is not known here"
        raise KimiLiteError(f"{problem}.", _FORMATS_HINT)
    return weight


def _make_fp8(name: str, raw: dict[str, RawTensor], block: tuple[int, int]) -> Fp8Weight:
    tensor, factors = raw[name], raw.get(f"{name}_scale_inv")
    if factors is None:
        raise KimiLiteError(f"{name} is FP8 without {name}_scale_inv.", _FORMATS_HINT)
    if len(tensor.shape) != 2:
        raise KimiLiteError(f"{name} is FP8 of shape {list(tensor.shape)}, and must be a matrix.", _FORMATS_HINT)
    need = tuple(-(-size // width) for size, width in zip(tensor.shape, block, strict=True))
    if factors.shape != need or factors.dtype not in FLOAT_DTYPES:
        have = f"{factors.dtype} {list(factors.shape)}"
        raise KimiLiteError(
            f"{factors.name}: need floats {list(need)} for blocks of {block}, have {have}.", _FORMATS_HINT
        )
    return Fp8Weight(tensor, factors, block)


def _make_int4(name: str, raw: dict[str, RawTensor]) -> Int4Weight:
    """`weight_shape` says nothing that the packed shape and config.json do not, and reading 70,000 of them is slow."""
    packed, scales = raw[f"{name}_packed"], raw.get(f"{name}_scale")
    if scales is None:
        raise KimiLiteError(f"{name} is packed without its scale.", _FORMATS_HINT)
    is_sound = packed.dtype == "I32" and scales.dtype in FLOAT_DTYPES and len(packed.shape) == len(scales.shape) == 2
    if is_sound:
        columns = packed.shape[1] * _CODES_PER_WORD
        is_sound = packed.shape[0] == scales.shape[0] and scales.shape[1] > 0 and columns % scales.shape[1] == 0
    if not is_sound:
        have = f"{packed.dtype} {list(packed.shape)} with {scales.dtype} scales {list(scales.shape)}"
        raise KimiLiteError(f"{name} is not INT4 packed in groups along its rows: have {have}.", _FORMATS_HINT)
    return Int4Weight(packed, scales)


def _make_int2(name: str, raw: dict[str, RawTensor]) -> Int2Weight:
    packed, scales = raw[name], raw.get(f"{name}_scale")
    is_sound = scales is not None and scales.dtype in FLOAT_DTYPES and len(packed.shape) == len(scales.shape) == 2
    if is_sound:
        columns = packed.shape[1] * _CODES_PER_WORD * 2
        is_sound = packed.shape[0] == scales.shape[0] and scales.shape[1] > 0 and columns % scales.shape[1] == 0
    if not is_sound:
        have = f"{scales.dtype} scales {list(scales.shape)}" if scales else "no scales"
        raise KimiLiteError(
            f"{name}: I32 {list(packed.shape)} is not 2-bit weights in groups: have {have}.", _FORMATS_HINT
        )
    return Int2Weight(packed, scales)


def _to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """A fresh float32 array. A bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32)


@cache
def e4m3_values() -> np.ndarray:
    """The 256 values of FP8 e4m3fn: sign, 4 exponent bits of bias 7, 3 mantissa bits, no infinities, NaN where all are
    ones."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)
