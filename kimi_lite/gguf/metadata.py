"""The metadata of a GGUF file: a cursor that never reads past the end, and the values that it reads.

Every length and count comes from a file that may be damaged, so it is compared with the bytes that are left before
anything is allocated, and whatever is wrong is one sentence with the file, the field, need and have. The format: the
GGUF specification in ggml's docs, versions 2 and 3, little-endian.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.errors import KimiLiteError

MAX_HEADER_BYTES = 128 << 20  # Kimi's is 8 MB; the bound keeps a damaged count from walking through 50 GB of weights
MAX_KEYS = 65_536
DAMAGED_HINT = "The file is damaged: download it again and compare its checksum with the publisher's."
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class ValueType(IntEnum):
    """The types of metadata values, by their numbers in the file."""

    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


class Value(NamedTuple):
    """A metadata value with its exact type; `element_type` for arrays. llama.cpp refuses a u32 where it wants an
    i32."""

    value: object
    value_type: ValueType
    element_type: ValueType | None = None


def text(value: str) -> Value:
    return Value(value, ValueType.STRING)


def u32(value: int) -> Value:
    return Value(int(value), ValueType.UINT32)


def f32(value: float) -> Value:
    return Value(float(value), ValueType.FLOAT32)


def boolean(value: bool) -> Value:
    return Value(bool(value), ValueType.BOOL)


def array(values: Sequence[str] | Sequence[int] | np.ndarray) -> Value:
    """Strings, or integers as i32: the two kinds of array that tokenizers need."""
    element_type = ValueType.STRING if isinstance(values[0], str) else ValueType.INT32
    return Value([value if isinstance(value, str) else int(value) for value in values], ValueType.ARRAY, element_type)


_BOOL, _STRING, _ARRAY = ValueType.BOOL, ValueType.STRING, ValueType.ARRAY
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {value_type: struct.Struct(f"<{code}") for value_type, code in _CODES.items()}
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one letter, value type, one byte of value


def pack_text(value: str) -> bytes:
    """Length and UTF-8, as names and texts stand in a file."""
    encoded = value.encode()
    return U64.pack(len(encoded)) + encoded


def pack_value(value: Value) -> bytes:
    """Type and value, as they stand behind a key."""
    kind = U32.pack(value.value_type)
    if value.value_type == _STRING:
        return kind + pack_text(value.value)
    if value.value_type != _ARRAY:
        return kind + _SCALARS[value.value_type].pack(value.value)
    head = kind + U32.pack(value.element_type) + U64.pack(len(value.value))
    if value.element_type == _STRING:
        return head + b"".join(map(pack_text, value.value))
    code = _CODES[value.element_type]
    return head + np.asarray(value.value).astype(f"<{np.dtype(code).str[1:]}").tobytes()


def quoted(value: object, limit: int = 80) -> str:
    """A value from a file as it may be shown: text in quotes with control characters escaped, cut to `limit`
    characters."""
    shown = repr(value[:limit]) if isinstance(value, str) else str(value).replace("\n", " ")
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


class HeaderGoesOn(KimiLiteError):
    """The header is longer than the part of the file that was given: `num_bytes` of it are needed, or more."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        super().__init__(f"{path}: the header has {num_bytes:,} bytes or more.", DAMAGED_HINT)
        self.num_bytes = num_bytes


@dataclass(slots=True)
class Cursor:
    """A place in the file. Every read says what it is for, so that a file that ends too early is told in a sentence.
    `data` may be the beginning of a file of `file_bytes`; None: it is the whole."""

    path: Path
    data: memoryview
    at: int = 0
    file_bytes: int | None = None

    @property
    def end(self) -> int:
        return min(len(self.data), MAX_HEADER_BYTES)

    @property
    def left(self) -> int:
        return self.end - self.at

    def skip(self, num_bytes: int, what: str) -> int:
        """Where the next `num_bytes` start; the cursor goes past them."""
        if num_bytes > self.left:
            self.refuse_length(num_bytes, what)
        start = self.at
        self.at += num_bytes
        return start

    def unpack(self, kind: struct.Struct, what: str):
        return kind.unpack_from(self.data, self.skip(kind.size, what))[0]

    def string(self, what: str) -> str:
        num_bytes = self.unpack(U64, f"the length of {what}")
        start = self.skip(num_bytes, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start:,} is not UTF-8 text", DAMAGED_HINT) from error

    def check_count(self, count: int, min_bytes: int, what: str, most: int = 1 << 63) -> None:
        """A count is believed only when the bytes that are left could hold so many, and it is not absurd."""
        if count > most:
            raise self.error(f"it claims {count:,} {what}, and at most {most:,} are believed", DAMAGED_HINT)
        if count * min_bytes > self.left:
            self.refuse_length(count * min_bytes, f"a list of {count:,} {what}")

    def refuse_length(self, num_bytes: int, what: str) -> None:
        if self.file_bytes is not None and self.at + num_bytes <= min(self.file_bytes, MAX_HEADER_BYTES):
            raise HeaderGoesOn(self.path, self.at + num_bytes)
        if self.end == len(self.data):
            left = f"and {self.left:,} are left: the file is cut short or damaged"
            raise self.error(f"{what} needs {num_bytes:,} bytes at byte {self.at:,}, {left}", DAMAGED_HINT)
        most = f"and a header may have {MAX_HEADER_BYTES:,} in all"
        raise self.error(f"{what} needs {num_bytes:,} bytes at byte {self.at:,}, {most}", DAMAGED_HINT)

    def error(self, problem: str, hint: str) -> KimiLiteError:
        return KimiLiteError(f"{self.path}: {problem}.", hint)


def read_metadata(cursor: Cursor, num_keys: int) -> dict[str, Value]:
    """The key-value pairs under the cursor with their types: str, int, float, bool, list[str] or a read-only numpy
    array."""
    cursor.check_count(num_keys, _MIN_KEY_BYTES, "metadata keys", MAX_KEYS)
    metadata: dict[str, Value] = {}
    for index in range(num_keys):
        key = cursor.string(f"the name of metadata key {index + 1:,} of {num_keys:,}")
        if not key or key in metadata:
            problem = (
                f"the metadata key {quoted(key)} appears twice" if key else f"metadata key {index + 1:,} has no name"
            )
            raise cursor.error(problem, DAMAGED_HINT)
        metadata[key] = _read_value(cursor, quoted(key))
    return metadata


def _read_value(cursor: Cursor, key: str) -> Value:
    value_type = cursor.unpack(U32, f"the type of {key}")
    if value_type == _STRING:
        return text(cursor.string(f"the text of {key}"))
    if value_type == _ARRAY:
        return _read_array(cursor, key)
    return Value(_read_scalar(cursor, value_type, key), ValueType(value_type))


def _read_scalar(cursor: Cursor, value_type: int, key: str) -> int | float | bool:
    if value_type not in _SCALARS:
        raise cursor.error(f"{key} has value type {value_type:,}, and types 0 to 12 are known", DAMAGED_HINT)
    if value_type != _BOOL:
        return cursor.unpack(_SCALARS[value_type], f"the value of {key}")
    byte = cursor.unpack(_SCALARS[0], f"the value of {key}")
    if byte > 1:
        raise cursor.error(f"{key} is true or false, and its byte is {byte}, neither 0 nor 1", DAMAGED_HINT)
    return bool(byte)


def _read_array(cursor: Cursor, key: str) -> Value:
    item_type = cursor.unpack(U32, f"the item type of {key}")
    count = cursor.unpack(U64, f"the length of {key}")
    if item_type == _ARRAY:
        raise cursor.error(f"{key} is a list of lists, which no key of a language model is", DAMAGED_HINT)
    if item_type == _STRING:
        cursor.check_count(count, 8, f"texts in {key}")
        return Value(_read_strings(cursor, count, key), _ARRAY, _STRING)
    if item_type not in _SCALARS:
        raise cursor.error(f"{key} has items of type {item_type:,}, and types 0 to 12 are known", DAMAGED_HINT)
    cursor.check_count(count, _SCALARS[item_type].size, f"numbers in {key}")
    start = cursor.skip(count * _SCALARS[item_type].size, f"the numbers of {key}")
    dtype = np.dtype("u1" if item_type == _BOOL else _SCALARS[item_type].format)
    numbers = np.frombuffer(cursor.data, dtype, count, start).astype(dtype.newbyteorder("="))
    if item_type == _BOOL:
        if numbers.size and numbers.max() > 1:
            raise cursor.error(f"{key} is a list of true or false, and has bytes up to {numbers.max()}", DAMAGED_HINT)
        numbers = numbers.astype(np.bool_)
    numbers.flags.writeable = False
    return Value(numbers, _ARRAY, ValueType(item_type))


def _read_strings(cursor: Cursor, count: int, key: str) -> list[str]:
    """`Cursor.string` written out: a vocabulary and its merges are 327,168 strings, too many for a call each."""
    data, at, end, unpack = cursor.data, cursor.at, cursor.end, U64.unpack_from
    texts: list[str] = []
    try:
        for _ in range(count):
            start = at + 8
            stop = start + unpack(data, at)[0]
            if stop > end:
                break
            texts.append(str(data[start:stop], "utf-8"))
            at = stop
    except (UnicodeDecodeError, struct.error):
        pass  # the slow reader below meets the same string again and says what is wrong with it
    cursor.at = at
    if len(texts) < count:
        cursor.string(f"text {len(texts) + 1:,} of {count:,} in {key}")
        raise AssertionError((len(texts), count, at))
    return texts
