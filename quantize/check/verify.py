"""Reads back what was written: every tensor's SHA-256 against the log, and its relative error against the source.

python -m quantize SRC DST.gguf --recipe tq1_0 --verify
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore, TensorView
from kimi_lite.hardware.host import usable_cores
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.quantize.convert import open_model
from kimi_lite.quantize.source.model import RowReader, SourceTensor
from kimi_lite.quantize.write.job import log_path
from kimi_lite.quantize.write.journal import Entry, read_log
from kimi_lite.quantize.write.writer import OnProgress
from kimi_lite.units import gib

_PIECE_WEIGHTS = 1 << 20
_SHARD_SUFFIX = "-00001-of-"


@dataclass(frozen=True, slots=True)
class Verification:
    """Relative RMS errors by tensor, over every weight."""

    errors: dict[str, float]
    num_bytes: int

    @property
    def summary(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        return (
            f"verified {len(self.errors)} tensors, {gib(self.num_bytes)}: all checksums equal; "
            f"largest relative error {self.errors[worst]:.4f} ({worst})"
        )


def verify_lines(src: Path, path: Path, on_progress: OnProgress | None = None) -> list[str]:
    """What `--verify` prints: bytes and errors, then what the loss does to the model's words. Raises KimiLiteError."""
    from kimi_lite.quantize.check.comparison import compare_models

    return [verify(src, path, on_progress).summary, compare_models(src, path, on_progress)]


def verify(src: Path, path: Path, on_progress: OnProgress | None = None) -> Verification:
    """Compares the model at `path` (file or first shard) with its log and with the source. Raises KimiLiteError where a
    byte changed, a tensor is missing, or a kept tensor is not the source's."""
    report = on_progress or (lambda name, done, total: None)
    store, model = GGUFStore.open(path), open_model(src)
    stem = path.name.split(_SHARD_SUFFIX)[0]
    log = read_log(log_path(path.with_name(stem)))
    errors: dict[str, float] = {}
    done_bytes = 0
    with ThreadPoolExecutor(usable_cores().most_threads) as pool:
        for source in model.tensors:
            view = store.tensor(source.name)
            _check_bytes(view, log.get(source.name), path)
            errors[source.name] = _measure(source, view, pool)
            if errors[source.name] > 0 and view.layout.name in source.exact:
                raise KimiLiteError(f"{path}: {source.name} was to be kept as it is, and differs.", "Convert it again.")
            done_bytes += view.num_bytes
            report(f"verifying {source.name}", done_bytes, store.total_bytes)
    return Verification(errors, done_bytes)


def _check_bytes(view: TensorView, entry: Entry | None, path: Path) -> None:
    found = hashlib.sha256(view.data.reshape(-1)).hexdigest()
    if entry is None or found != entry.sha256:
        logged = entry.sha256 if entry else "nothing"
        raise KimiLiteError(f"{path}: {view.name} has SHA-256 {found}, and its log says {logged}.", "Convert it again.")


def _measure(source: SourceTensor, view: TensorView, pool: ThreadPoolExecutor) -> float:
    """The relative RMS error over all weights."""
    read_rows = source.open_rows()
    data = view.data.reshape(-1, view.data.shape[-1])
    error_squares = weight_squares = 0.0
    for error, weight in _compare(read_rows, data, view, pool):
        error_squares += error
        weight_squares += weight
    return (error_squares / weight_squares) ** 0.5 if weight_squares else float(error_squares > 0)


def _compare(
    read_rows: RowReader, data: np.ndarray, view: TensorView, pool: ThreadPoolExecutor
) -> Iterator[tuple[float, float]]:
    """(sum of squared errors, sum of squared weights) of each piece."""
    step = max(1, _PIECE_WEIGHTS // view.shape[-1])

    def compare(start: int) -> tuple[float, float]:
        stop = min(start + step, len(data))
        weights = read_rows(start, stop)
        error = dequantize(data[start:stop], view.layout.name) - weights
        return float(np.vdot(error, error)), float(np.vdot(weights, weights))

    pending: deque[Future] = deque()
    for start in range(0, len(data), step):
        pending.append(pool.submit(compare, start))
        if len(pending) > 2 * usable_cores().most_threads:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
