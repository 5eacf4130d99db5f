"""safetensors files as they lie on disk: where each tensor's bytes are, found and checked without reading them.

Every header of a folder is read before any work, so a missing or half-downloaded shard is named in the first second.
The layout is simple (u64 length, JSON, data) and read here rather than by the library, which gives numpy no bfloat16 or
FP8, no sizes in its errors, and needs torch for the rest. Format: https://huggingface.co/docs/safetensors.
"""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.arch.checkpoint import inner_object, read_json_object
from kimi_lite.arch.reader import shown
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_no_pointer

_INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5,6}-of-(?P<count>\d{5,6})\.safetensors", re.IGNORECASE)
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_DOWNLOAD_HINT = "Download that file again and compare its size with the repository's."
STORAGE_DTYPES = {  # numpy's view of each stored type; the ones numpy lacks are seen as their bits
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's name, stored type (safetensors' word), shape, and place in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    num_bytes: int

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, counted over all axes but the last, in the storage dtype (rows, last axis). Read and not
        mapped: memory stays small, and a file that shrinks meanwhile is an error and not a crash."""
        dtype, row = np.dtype(STORAGE_DTYPES[self.dtype]), self.shape[-1]
        offset, count = self.offset + start * row * dtype.itemsize, (stop - start) * row
        try:
            values = np.fromfile(self.file, dtype, count, offset=offset)
        except OSError as error:
            raise KimiLiteError(f"{self.file} cannot be read: {error.strerror or error}.", _DOWNLOAD_HINT) from error
        if len(values) != count:
            raise KimiLiteError(f"{self.file} shrank while it was read: {self.name} is cut off.", _DOWNLOAD_HINT)
        return values.reshape(stop - start, row)


def find_raw_tensors(folder: Path) -> dict[str, RawTensor]:
    """All tensors of a checkpoint by name: those that the index names, or of the only file. Raises KimiLiteError.

    The index decides: a tensor that another shard holds too, and files that it does not name (a consolidated copy), are
    not looked at. Without an index the weights are one file.
    """
    index = folder / _INDEX
    if not index.is_file():
        return {tensor.name: tensor for tensor in read_header(_file_without_index(folder))}
    weight_map = inner_object(read_json_object(index, _DOWNLOAD_HINT), "weight_map", str(index), _DOWNLOAD_HINT)
    if not weight_map:
        raise KimiLiteError(f"{index} is not a safetensors index: it has no weight_map.", _DOWNLOAD_HINT)
    names = sorted({_checked_name(index, tensor, name) for tensor, name in weight_map.items()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise KimiLiteError(
            f"{folder} lacks {len(missing)} of its {len(names)} shards: {some}.", "Download the missing files."
        )
    found = {name: {tensor.name: tensor for tensor in read_header(folder / name)} for name in names}
    for tensor, name in weight_map.items():
        if tensor not in found[name]:
            raise KimiLiteError(
                f"The index says that {shown(tensor)} is in {name}, and it is not.", "Download index and shards again."
            )
    return {tensor: found[name][tensor] for tensor, name in weight_map.items()}


def _checked_name(index: Path, tensor: str, name: object) -> str:
    """A file in the index's own folder."""
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or not name.isprintable()
        or set(name) & {"/", "\\"}
    ):
        problem = f"{index} says that {shown(tensor)} is in {shown(name)}, which is no file of this folder"
        raise KimiLiteError(f"{problem}.", "Download the index again.")
    return name


def _file_without_index(folder: Path) -> Path:
    """The one file: the only one, or `model.safetensors` where others (a consolidated copy, an adapter) lie there
    too."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".safetensors" and path.is_file())
    if not files:
        have = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise KimiLiteError(
            f"{folder} holds no .safetensors file; it has {have}.", "Name the folder with config.json and weights."
        )
    single = folder / "model.safetensors"
    file = single if single in files else files[0]
    numbered = _NUMBERED.fullmatch(file.name)
    if file != single and (len(files) > 1 or (numbered and int(numbered["count"]) > 1)):
        raise KimiLiteError(
            f"{folder} has {len(files)} .safetensors file{'s' if len(files) > 1 else ''} and no {_INDEX}.",
            "Download the index.",
        )
    return file


def read_header(file: Path) -> list[RawTensor]:
    """The tensors of one file, after checking that the file is as long as its header says. Raises KimiLiteError."""
    try:
        return _read_header(file)
    except OSError as error:
        raise KimiLiteError(f"{file} cannot be read: {error.strerror}.", _DOWNLOAD_HINT) from error


def _read_header(file: Path) -> list[RawTensor]:
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        require_no_pointer(file, start)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise KimiLiteError(
                f"{file} ({file_bytes:,} bytes) ends before its header does, or is no safetensors file.", _DOWNLOAD_HINT
            )
        try:
            entries = json.loads(stream.read(header_bytes))
        except (ValueError, RecursionError) as error:
            problem = f"The header of {file} cannot be read: {''.join(filter(str.isprintable, str(error)))[:200]}"
            raise KimiLiteError(f"{problem}.", _DOWNLOAD_HINT) from error
    if not isinstance(entries, dict):
        raise KimiLiteError(f"The header of {file} cannot be read: it is no JSON object.", _DOWNLOAD_HINT)
    entries.pop("__metadata__", None)
    tensors = [_read_entry(name, entry, file, 8 + header_bytes) for name, entry in entries.items()]
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=8 + header_bytes)
    if end != file_bytes:
        kind = "truncated" if end > file_bytes else "too long"
        raise KimiLiteError(f"{file} is {kind}: need {end:,} bytes, have {file_bytes:,}.", _DOWNLOAD_HINT)
    return tensors


def _read_entry(name: str, entry: object, file: Path, data_start: int) -> RawTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    is_named = name.isprintable() and isinstance(dtype, str) and dtype.isprintable()
    is_sound = is_named and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
    if not is_sound:
        problem = f"The header of {file} cannot be read: {shown(name)} has {shown(entry)}, and needs a dtype, a shape"
        raise KimiLiteError(f"{problem} and two data_offsets.", _DOWNLOAD_HINT)
    begin, end = offsets
    tensor = RawTensor(name, dtype, tuple(shape), file, data_start + begin, end - begin)
    if end < begin or (dtype in STORAGE_DTYPES and end - begin != _stored_bytes(tensor)):
        need = f"{_stored_bytes(tensor):,}" if dtype in STORAGE_DTYPES else "some"
        problem = f"The header of {file} cannot be read: {shown(name)} has {end - begin:,} bytes and needs {need}"
        raise KimiLiteError(f"{problem}.", _DOWNLOAD_HINT)
    return tensor


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _stored_bytes(tensor: RawTensor) -> int:
    return prod(tensor.shape) * np.dtype(STORAGE_DTYPES[tensor.dtype]).itemsize
