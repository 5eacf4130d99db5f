"""llama.cpp's importance matrices: the mean square of each input column of each weight matrix, over a calibration text.

An error in a column costs as much as that column's inputs are large, so encoders weigh squared errors with them. Both
file formats are read: GGUF (`W.in_sum2` and `W.counts`) and the older `.dat`. Experts have a vector each. Formats:
llama.cpp/tools/imatrix.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.quantize.codecs.importance import fill_unknown, is_known

_GGUF_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME_BYTES = 4096
_KINDS_HINT = "Make one with `kimi-lite imatrix` or llama.cpp's llama-imatrix, on the same model."


@dataclass(frozen=True, slots=True)
class Importance:
    """Mean squares by tensor name, float32 (matrices, columns), as the file has them: what is not finite or not above
    zero is unknown."""

    path: Path
    vectors: Mapping[str, np.ndarray]

    def find(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """(matrices, row) for a tensor of this shape, all above zero; None where the file does not have it. Raises
        KimiLiteError where the file is of another model."""
        found = self._find(name, shape)
        return None if found is None else fill_unknown(found)

    def notes(self, wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """What was asked for and cannot be used, of the tensors (names and shapes) that the matrix is wanted for."""
        if not wanted:
            yield f"{self.path} is not used: no type here weighs errors"
            return
        found = {name: self._find(name, shape) for name, shape in wanted.items()}
        if missing := [name for name, values in found.items() if values is None]:
            what = f"has nothing for {len(missing)} tensors ({_some(missing)})"
            yield f"{self.path} {what}: all their columns count alike"
        known = {name: is_known(values) for name, values in found.items() if values is not None}
        unreached = {name: int((~columns.any(axis=1)).sum()) for name, columns in known.items()}
        if whole := [name for name, count in unreached.items() if count]:
            num_matrices = sum(len(known[name]) for name in whole)
            yield (
                f"{self.path} does not say anything about {sum(unreached.values())} of {num_matrices} matrices "
                f"({_some(whole)}): all their columns count alike"
            )
        partly = [name for name, columns in known.items() if (columns.any(axis=1) & ~columns.all(axis=1)).any()]
        if partly:
            yield (
                f"{self.path} has zeros or no numbers for some columns of {len(partly)} tensors ({_some(partly)}): "
                f"they count as the mean of the others"
            )

    def _find(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
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
    if not vectors:
        raise KimiLiteError(f"{path} has no importance vectors.", _KINDS_HINT)
    if not any(is_known(values).any() for values in vectors.values()):
        raise KimiLiteError(f"{path}: all its values are zeros or no mean squares.", _KINDS_HINT)
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
    """Sums (matrices, columns) over counts (matrices, 1) or (1, 1); zeros, which say "unknown", for an expert that no
    token of the text chose."""
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), 0).astype(np.float32)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


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
        vectors[name] = mean_squares(values[None], np.array([[calls]]))
    return vectors
