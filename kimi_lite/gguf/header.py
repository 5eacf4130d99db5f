"""The header of one GGUF file: its metadata and where its tensors lie, checked to the last byte before any weight is
read.

Why a parser of our own: the `gguf` package's reader trusts its input. It takes lengths and counts from the file as they
stand (a flipped bit asks for exabytes or never ends), raises whatever numpy raises, refuses type 42, and builds five
arrays for every string of a 163,840-word vocabulary. Here nothing is believed, and a Kimi header takes a tenth of a
second.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_no_pointer
from kimi_lite.gguf.foreign_types import foreign_type
from kimi_lite.gguf.metadata import DAMAGED_HINT, U32, U64, Cursor, Value, quoted, read_metadata
from kimi_lite.native.layouts import LAYOUTS, Layout
from kimi_lite.native.types.interleaved import Interleaved, interleaved

MAX_TENSORS = 262_144
MAX_NAME_BYTES = 63  # ggml.h GGML_MAX_NAME, less its zero
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, one letter, number of dimensions, one of them, type, offset


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in numpy order (last axis = input), `start` and `num_bytes` in the file. `interleaved`: how
    the file has its rows, where they are not in order."""

    name: str
    layout: Layout
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    interleaved: Interleaved | None = None


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF file says about itself. Metadata: str, int, float, bool, list[str] or a read-only numpy array, each
    with its type in `values`."""

    values: dict[str, Value]
    metadata: dict[str, object]
    tensors: tuple[TensorInfo, ...]


def read_header(
    path: Path, data: memoryview, file_bytes: int | None = None, has_interleaved: bool = False
) -> GGUFHeader:
    """Parse and check the header of a whole mapped file (uint8); `path` is only for the sentences. `file_bytes`: `data`
    is the beginning of a file of this size; `has_interleaved`: rows may be interleaved, which is refused else. Raises
    KimiLiteError; HeaderGoesOn where more of the file is needed."""
    cursor = Cursor(path, data, file_bytes=file_bytes)
    _check_magic(cursor)
    num_tensors = cursor.unpack(U64, "the number of tensors")
    num_keys = cursor.unpack(U64, "the number of metadata keys")
    values = read_metadata(cursor, num_keys)
    metadata = {key: value.value for key, value in values.items()}
    cursor.check_count(num_tensors, _MIN_TENSOR_BYTES, "tensors", MAX_TENSORS)
    entries = [_read_tensor_entry(cursor, index, num_tensors) for index in range(num_tensors)]
    alignment = _checked_alignment(cursor, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    data_start = -(-cursor.at // alignment) * alignment
    tensors = tuple(_place_tensor(cursor, entry, alignment, data_start, has_interleaved) for entry in entries)
    _check_unique(cursor, tensors)
    _check_places(cursor, tensors)
    return GGUFHeader(values, metadata, tensors)


def _check_magic(cursor: Cursor) -> None:
    magic = bytes(cursor.data[:4])
    require_no_pointer(cursor.path, bytes(cursor.data[:8]))
    if magic != b"GGUF":
        hint = "Give a .gguf file. Safetensors become one with: kimi-lite quantize FOLDER"
        raise cursor.error(f"this is not a GGUF file: it starts with {magic!r} and must start with b'GGUF'", hint)
    cursor.at = 4
    version = cursor.unpack(U32, "the format version")
    if version & 0xFFFF == 0 and version:
        hint = "Get the little-endian file, which is what nearly all publishers offer."
        raise cursor.error("this GGUF file is big-endian, and only little-endian ones can be read", hint)
    if version not in (2, 3):
        hint = "Download a current file, or make one with: kimi-lite quantize FOLDER"
        raise cursor.error(f"this is GGUF version {version:,}, and versions 2 and 3 can be read", hint)


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    """A tensor as the file states it: `dims` fastest first, `offset` from the start of the weights."""

    name: str
    dims: tuple[int, ...]
    ggml_id: int
    offset: int


def _read_tensor_entry(cursor: Cursor, index: int, num_tensors: int) -> _TensorEntry:
    which = f"tensor {index + 1:,} of {num_tensors:,}"
    name = cursor.string(f"the name of {which}")
    num_name_bytes = len(name.encode())
    if not 0 < num_name_bytes <= MAX_NAME_BYTES:
        raise cursor.error(
            f"the name of {which} has {num_name_bytes:,} bytes, and must have 1 to {MAX_NAME_BYTES}", DAMAGED_HINT
        )
    shown = f"tensor {quoted(name)}"
    num_dims = cursor.unpack(U32, f"the number of dimensions of {shown}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"{shown} has {num_dims:,} dimensions, and must have 1 to {MAX_DIMS}", DAMAGED_HINT)
    dims = tuple(cursor.unpack(U64, f"dimension {d} of {shown}") for d in range(num_dims))
    if not all(dims):
        raise cursor.error(f"{shown} has dimensions {dims}, and none may be 0", DAMAGED_HINT)
    ggml_id = cursor.unpack(U32, f"the type of {shown}")
    return _TensorEntry(name, dims, ggml_id, cursor.unpack(U64, f"the offset of {shown}"))


def _checked_alignment(cursor: Cursor, alignment: object) -> int:
    is_number = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not is_number or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        problem = f"general.alignment is {quoted(alignment)}, and must be a power of two from 8 to 1,048,576"
        raise cursor.error(problem, DAMAGED_HINT)
    return alignment


def _place_tensor(
    cursor: Cursor, entry: _TensorEntry, alignment: int, data_start: int, has_interleaved: bool
) -> TensorInfo:
    shown = f"tensor {quoted(entry.name)}"
    kind = interleaved().get(entry.ggml_id) if has_interleaved else None
    layout = kind.base if kind else LAYOUTS.get(entry.ggml_id)
    if layout is None:
        raise _unknown_type(cursor, shown, entry.ggml_id)
    if entry.dims[0] % layout.block_size:
        problem = (
            f"{shown} has rows of {entry.dims[0]:,} weights, and {layout.name} needs a multiple of {layout.block_size}"
        )
        raise cursor.error(problem, DAMAGED_HINT)
    if kind and (len(entry.dims) < 2 or entry.dims[1] % kind.num_rows):
        problem = f"{shown} of type {kind.name} has dimensions {entry.dims}, and needs groups of {kind.num_rows} rows"
        raise cursor.error(problem, DAMAGED_HINT)
    if entry.offset % alignment:
        problem = f"{shown} starts at offset {entry.offset:,}, which is no multiple of the alignment {alignment:,}"
        raise cursor.error(problem, DAMAGED_HINT)
    num_bytes = layout.row_bytes(entry.dims[0]) * math.prod(entry.dims[1:])
    return TensorInfo(entry.name, layout, entry.dims[::-1], data_start + entry.offset, num_bytes, kind)


class UnknownTypeError(KimiLiteError):
    """A tensor of a type that is not read here; `what` names the type in a few words."""

    def __init__(self, message: str, hint: str, what: str) -> None:
        super().__init__(message, hint)
        self.what = what


def _unknown_type(cursor: Cursor, shown: str, ggml_id: int) -> UnknownTypeError:
    known = ", ".join(f"{known.name} ({known.ggml_id})" for known in LAYOUTS.values())
    foreign = foreign_type(ggml_id)
    named = f" ({foreign.name})" if foreign else ""
    origin = f", {foreign.origin}" if foreign and foreign.origin else ""
    problem = f"{cursor.path}: {shown} has type {ggml_id:,}{named}{origin}, and the known types are {known}."
    hint = "Get the model in one of these types, or make it with: kimi-lite quantize FOLDER"
    what = f"{foreign.name}{origin}" if foreign else f"type {ggml_id:,}"
    return UnknownTypeError(problem, foreign.instead if foreign else hint, what)


def _check_unique(cursor: Cursor, tensors: tuple[TensorInfo, ...]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise cursor.error(f"tensor {quoted(tensor.name)} appears twice", DAMAGED_HINT)
        seen.add(tensor.name)


def _check_places(cursor: Cursor, tensors: tuple[TensorInfo, ...]) -> None:
    """All tensors inside the file and none over another. Gaps are harmless and let pass."""
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    for before, after in pairwise(ordered):
        end = before.start + before.num_bytes
        if end > after.start:
            where = f"bytes {before.start:,} to {end:,}, and tensor {quoted(after.name)} starts at {after.start:,}"
            raise cursor.error(f"tensors overlap: {quoted(before.name)} takes {where}", DAMAGED_HINT)
    need = max((tensor.start + tensor.num_bytes for tensor in ordered), default=0)
    have = len(cursor.data) if cursor.file_bytes is None else cursor.file_bytes
    for num_whole, tensor in enumerate(ordered):
        end = tensor.start + tensor.num_bytes
        if end > have:
            kind = f"{tensor.layout.name}, {tensor.num_bytes:,} bytes"
            progress = f"{num_whole:,} of {len(ordered):,} tensors are whole, all of them need {need:,} bytes"
            problem = (
                f"tensor {quoted(tensor.name)} ({kind}) ends at byte {end:,}, and the file has {have:,}: {progress}"
            )
            raise cursor.error(problem, "The download is not finished, or the disk was full: fetch the file again.")
