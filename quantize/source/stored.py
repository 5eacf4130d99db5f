"""The ways a checkpoint stores a weight, each read as float32 rows: plain floats, FP8 in blocks, integer codes of
2 to 8 bits in groups.

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
ZERO_POINT = ".zero_point"  # what Humming puts in the place of ".weight"
FACTOR_SUFFIXES = ("_packed", "_scale", "_shape", "_scale_inv", "_zero_point", "_g_idx")
_WORD_BITS = 32
_CODE_BITS = range(2, 9)
_FORMATS_HINT = (
    "It reads float32, float16, bfloat16, block FP8 (e4m3), and integers of 2 to 8 bits as compressed-tensors "
    "(pack-quantized) and Humming store them."
)


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
class CodeFormat:
    """How a configuration says that codes are stored; `group`: columns that share a scale, None where that is not
    said."""

    bits: int
    group: int | None = None


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """Codes of `bits` bits in int32 words, one after another from the lowest bits on, that stand for
    (code - zero point) * scale, with a scale for each group of columns. So Kimi's INT4 experts are stored
    (compressed-tensors' pack-quantized), and GSQ's, in that form and in Humming's. The container may be wider than
    its codes: which codes there are, only reading all of them tells."""

    packed: RawTensor  # (N, M * bits / 32) int32
    scales: RawTensor  # (N, M / group)
    bits: int
    zero_points: RawTensor | None = None  # (N, M / group) floats; None: 2^(bits - 1) throughout

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape[0], self.packed.shape[1] * _WORD_BITS // self.bits

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def offset(self) -> int:
        """The code that stands for 0 where there are no zero points."""
        return 1 << (self.bits - 1)

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """As they are stored, from 0 on: uint8 (rows, M)."""
        return unpack(self.packed.read_rows(start, stop), self.bits)

    def read_signed(self, start: int, stop: int) -> np.ndarray:
        """Codes less their zero points: int8 (rows, M), or float32 where zero points are given."""
        codes = self.read_codes(start, stop)
        if self.zero_points is None:
            return (codes ^ self.offset).view(np.int8) if self.bits == 8 else codes.view(np.int8) - np.int8(self.offset)
        groups = codes.reshape(stop - start, self.scales.shape[1], -1)  # (R, groups, group)
        return (groups - self.read_zero_points(start, stop)[..., None]).reshape(stop - start, -1)

    def read_zero_points(self, start: int, stop: int) -> np.ndarray:
        """float32 (rows, M / group)"""
        assert self.zero_points is not None
        return _to_float32(self.zero_points.read_rows(start, stop), self.zero_points.dtype)

    def read_scales(self, start: int, stop: int) -> np.ndarray:
        """float32 (rows, M / group)"""
        return _to_float32(self.scales.read_rows(start, stop), self.scales.dtype)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        scales = self.read_scales(start, stop)
        weights = self.read_signed(start, stop).astype(np.float32)
        groups = weights.reshape(stop - start, scales.shape[1], -1)  # (R, groups, group), a view
        with np.errstate(invalid="ignore"):  # a damaged scale may be infinite: encoders refuse what comes of it
            groups *= scales[..., None]
        return weights


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 (R, W) to the uint8 codes (R, 32 W / bits) in them, from the lowest bits on."""
    stream = np.ascontiguousarray(words).view(np.uint8)  # (R, 4 W)
    if bits == 8:
        return stream
    if bits == 4:
        return np.stack([stream & 15, stream >> 4], axis=-1).reshape(len(words), -1)
    if bits == 2:
        quads = [stream & 3, stream >> 2 & 3, stream >> 4 & 3, stream >> 6]
        return np.stack(quads, axis=-1).reshape(len(words), -1)
    single = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(words), -1, bits)  # (R, M, bits)
    return np.packbits(single, axis=-1, bitorder="little")[..., 0]


def make_weight(
    name: str, raw: dict[str, RawTensor], fp8_block: tuple[int, int], codes: CodeFormat | None = None
) -> StoredWeight:
    """The weight `name` (ending in ".weight", or plain), from whichever tensors of `raw` store it; `codes` says how its
    codes are stored, where it is of codes (as it is: 4 bits packed, else 2). Raises KimiLiteError, also for a tensor
    next to it that this way of storing does not use: it would change the weight."""
    if f"{name}_packed" in raw:
        weight, used = _make_coded(name, f"{name}_packed", raw, codes or CodeFormat(4)), {"_packed", "_scale", "_shape"}
    elif name not in raw:
        raise KimiLiteError(f"{name} has a scale or a shape, but no weights with them.", _FORMATS_HINT)
    else:
        tensor = raw[name]
        if tensor.dtype == "F8_E4M3":
            weight, used = _make_fp8(name, raw, fp8_block), {"", "_scale_inv"}
        elif tensor.dtype == "I32":
            weight, used = _make_coded(name, name, raw, codes or CodeFormat(2)), {"", "_scale", "_shape"}
        elif tensor.dtype in FLOAT_DTYPES:
            weight, used = PlainWeight(tensor), {""}
        else:
            problem = f"{name} is stored as {shown(tensor.dtype)}, which this program does not read"
            raise KimiLiteError(f"{problem}.", _FORMATS_HINT)
    others = [name + suffix for suffix in ("", *FACTOR_SUFFIXES) if suffix not in used]
    if not isinstance(weight, CodedWeight):
        others.append(zero_point_name(name))
    unused = [other for other in others if other in raw]
    if unused:
        problem = f"{name} is {weight.kind}, and {unused[0]} would change it in a way that is not known here"
        raise KimiLiteError(f"{problem}.", _FORMATS_HINT)
    return weight


def zero_point_name(name: str) -> str:
    """Where Humming has the zero points of `X.weight`."""
    return f"{name.removesuffix('.weight')}{ZERO_POINT}"


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


def _make_coded(name: str, packed_name: str, raw: dict[str, RawTensor], codes: CodeFormat) -> CodedWeight:
    """`weight_shape` says nothing that the packed shape and config.json do not, and reading 70,000 of them is slow."""
    packed, scales, zeros = raw[packed_name], raw.get(f"{name}_scale"), raw.get(zero_point_name(name))
    if scales is None:
        raise KimiLiteError(
            f"{name} is packed in {packed.dtype} {list(packed.shape)} without its scale.", _FORMATS_HINT
        )
    sizes = (packed.shape, scales.shape, *([zeros.shape] if zeros else []))
    is_sound = packed.dtype == "I32" and scales.dtype in FLOAT_DTYPES and all(len(shape) == 2 for shape in sizes)
    if is_sound and codes.bits in _CODE_BITS:
        columns = packed.shape[1] * _WORD_BITS
        is_sound = columns % codes.bits == 0 and packed.shape[0] == scales.shape[0] and scales.shape[1] > 0
        columns //= codes.bits
        is_sound = is_sound and columns % scales.shape[1] == 0
        is_sound = is_sound and codes.group in (None, columns // scales.shape[1])
    if is_sound and zeros:
        is_sound = zeros.shape == scales.shape and zeros.dtype in FLOAT_DTYPES
    if not is_sound or codes.bits not in _CODE_BITS:
        group = f" of {codes.group}" if codes.group else ""
        have = f"{packed.dtype} {list(packed.shape)} with {scales.dtype} scales {list(scales.shape)}"
        have += f" and {zeros.dtype} zero points {list(zeros.shape)}" if zeros else ""
        problem = f"{name} is not {codes.bits}-bit codes in groups{group} along its rows: have {have}"
        raise KimiLiteError(f"{problem}.", _FORMATS_HINT)
    return CodedWeight(packed, scales, codes.bits, zeros)


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
