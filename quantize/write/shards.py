"""safetensors files as they lie on disk: where each tensor's bytes are, found and checked without reading them.

Every header of a folder is read before any work, so a missing or half-downloaded shard is named in the first second.
The layout is simple (u64 length, JSON, data) and read here rather than by the library, which gives numpy no bfloat16 or
FP8, no sizes in its errors, and needs torch for the rest. Format: https://huggingface.co/docs/safetensors.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError

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
        values = np.fromfile(self.file, dtype, count, offset=offset)
        if len(values) != count:
            raise KimiLiteError(f"{self.file} shrank while it was read: {self.name} is cut off.", _DOWNLOAD_HINT)
        return values.reshape(stop - start, row)


def find_raw_tensors(folder: Path) -> dict[str, RawTensor]:
    """All tensors of a checkpoint by name, from the index's shards or from the only file. Raises KimiLiteError."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {tensor.name: tensor for tensor in read_header(_find_single_file(folder))}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise KimiLiteError(f"{index} is not a safetensors index: {error}.", _DOWNLOAD_HINT) from error
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise KimiLiteError(
            f"{folder} lacks {len(missing)} of its {len(names)} shards: {some}.", "Download the missing files."
        )
    found = {tensor.name: tensor for name in names for tensor in read_header(folder / name)}
    for tensor, file in weight_map.items():
        if tensor not in found or found[tensor].file.name != file:
            raise KimiLiteError(
                f"The index says that {tensor} is in {file}, and it is not.", "Download index and shards anew."
            )
    return {tensor: found[tensor] for tensor in weight_map}


def _find_single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not files:
        have = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise KimiLiteError(
            f"{folder} holds no .safetensors file; it has {have}.", "Name the folder with config.json and weights."
        )
    raise KimiLiteError(
        f"{folder} has {len(files)} .safetensors files and no model.safetensors.index.json.", "Download the index."
    )


def read_header(file: Path) -> list[RawTensor]:
    """The tensors of one file, after checking that the file is as long as its header says."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise KimiLiteError(
                f"{file} is a Git LFS pointer of {file_bytes} bytes, not the weights.", "Run `git lfs pull` there."
            )
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise KimiLiteError(
                f"{file} ({file_bytes:,} bytes) ends before its header does, or is no safetensors file.", _DOWNLOAD_HINT
            )
        try:
            entries = json.loads(stream.read(header_bytes))
            entries.pop("__metadata__", None)
            tensors = [_read_entry(name, entry, file, 8 + header_bytes) for name, entry in entries.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KimiLiteError(f"The header of {file} cannot be read: {error}.", _DOWNLOAD_HINT) from error
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=8 + header_bytes)
    if end != file_bytes:
        kind = "truncated" if end > file_bytes else "too long"
        raise KimiLiteError(f"{file} is {kind}: need {end:,} bytes, have {file_bytes:,}.", _DOWNLOAD_HINT)
    return tensors


def _read_entry(name: str, entry: dict, file: Path, data_start: int) -> RawTensor:
    begin, end = entry["data_offsets"]
    tensor = RawTensor(name, entry["dtype"], tuple(entry["shape"]), file, data_start + begin, end - begin)
    if tensor.dtype in STORAGE_DTYPES:
        need = prod(tensor.shape) * np.dtype(STORAGE_DTYPES[tensor.dtype]).itemsize
        if begin < 0 or tensor.num_bytes != need:
            raise ValueError(f"{name} has {tensor.num_bytes} bytes and needs {need}")
    return tensor
