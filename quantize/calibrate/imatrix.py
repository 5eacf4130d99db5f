"""llama.cpp's importance matrices: the mean square of each input column of each weight matrix, over a calibration text.

An error in a column costs as much as that column's inputs are large, so encoders weigh squared errors with them. Both
file formats are read: GGUF (`W.in_sum2` and `W.counts`) and the older `.dat`. Experts have a vector each. Formats:
llama.cpp's tools/imatrix.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore

_GGUF_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME_BYTES = 4096
_KINDS_HINT = "Make one with `kimi-lite imatrix` or llama.cpp's llama-imatrix, on the same model."


@dataclass(frozen=True, slots=True)
class Importance:
    """Mean squares by tensor name, float32 (matrices, columns)."""

    path: Path
    vectors: Mapping[str, np.ndarray]

    def find(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """(matrices, row) for a tensor of this shape, or None where the file does not have it. Raises KimiLiteError
        where the file is of another model."""
        found = self.vectors.get(name)
        if found is None or len(shape) < 2:
            return None
        matrices, row = prod(shape[:-2]), shape[-1]
        if found.size == matrices * row:
            return found.reshape(matrices, row)
        if found.size == row:
            return np.broadcast_to(found.reshape(1, row), (matrices, row))
        need = f"need {matrices} x {row:,} values for {name}, have {found.size:,}"
        raise KimiLiteError(f"{self.path} is of another model: {need}.", _KINDS_HINT)


def read_imatrix(path: Path) -> Importance:
    """Raises KimiLiteError where the file is missing, damaged or no importance matrix."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise KimiLiteError(f"There is no file {path}.", _KINDS_HINT)
    with path.open("rb") as file:
        is_gguf = file.read(4) == _GGUF_MAGIC
    vectors = _read_gguf(path) if is_gguf else _read_dat(path)
    for name, values in vectors.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise KimiLiteError(f"{path}: {name} has values that are no mean squares.", _KINDS_HINT)
    if not vectors:
        raise KimiLiteError(f"{path} has no importance vectors.", _KINDS_HINT)
    return Importance(path, vectors)


def _read_gguf(path: Path) -> dict[str, np.ndarray]:
    tensors = {
        name: view.data.view("<f4") for name, view in GGUFStore.open(path).tensors.items() if view.layout.name == "F32"
    }
    vectors = {}
    for name in (name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)):
        sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
        if counts is None or (counts.size > 1 and sums.size % counts.size):
            raise KimiLiteError(f"{path}: {name} has sums without matching counts.", _KINDS_HINT)
        rows = sums.reshape(counts.size, -1)  # (matrices, columns)
        vectors[name] = mean_squares(rows, counts.reshape(-1, 1))
    return vectors


def mean_squares(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums (matrices, columns) over counts (matrices, 1) or (1, 1); ones for an expert that no token of the text
    chose."""
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)


def _read_dat(path: Path) -> dict[str, np.ndarray]:
    """i32 entries; each: i32 length, name, i32 calls, i32 values, float32 values (means times calls); then a
    trailer."""
    content = memoryview(path.read_bytes())
    vectors: dict[str, np.ndarray] = {}
    at = 0

    def take(num_bytes: int) -> memoryview:
        nonlocal at
        if num_bytes < 0 or at + num_bytes > len(content):
            problem = f"ends at byte {len(content):,} and needs {at + num_bytes:,}"
            raise KimiLiteError(f"{path} is no importance matrix or is cut off: it {problem}.", _KINDS_HINT)
        at += num_bytes
        return content[at - num_bytes : at]

    def integer() -> int:
        return struct.unpack("<i", take(4))[0]

    for _ in range(integer()):
        length = integer()
        if not 0 < length <= _MAX_NAME_BYTES:
            raise KimiLiteError(f"{path} is no importance matrix: a name of {length:,} bytes.", _KINDS_HINT)
        name = bytes(take(length)).decode(errors="replace")
        calls, num_values = integer(), integer()
        values = np.frombuffer(take(4 * num_values), "<f4")
        vectors[name] = (values / max(calls, 1) if calls > 0 else np.ones_like(values)).astype(np.float32)
    return vectors
