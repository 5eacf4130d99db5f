"""How much memory a conversion takes: what `--max-ram` allows, and the peak that was reached."""

import time
from collections.abc import Sequence

import psutil

from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.host import usable_cores
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.write.writer import OnProgress, Tensor, piece_weights
from kimi_lite.units import MIB, gib_apart

_PROGRAM_BYTES = 400_000_000  # Python, Numba and what they have compiled
_PIECE_BYTES = 24  # a weight on its way: as it is stored, float32, codes, temporaries of decoding and encoding
_SAMPLED_EVERY_S = 0.1


class PeakMemory:
    """The largest memory of this process while it is watched, without pages of mapped files: the system takes those
    back."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._process = psutil.Process()
        self._sampled_s = 0.0

    def watching(self, on_progress: OnProgress | None) -> OnProgress:
        """The same callback, with a look at the memory now and then."""

        def report(name: str, done: int, total: int) -> None:
            now_s = time.monotonic()
            if now_s - self._sampled_s > _SAMPLED_EVERY_S:
                self._sampled_s = now_s
                self.sample()
            if on_progress:
                on_progress(name, done, total)

        self.sample()
        return report

    def sample(self) -> None:
        memory = self._process.memory_info()
        self.num_bytes = max(self.num_bytes, memory.rss - getattr(memory, "shared", 0))


def pieces_ahead(
    tensors: Sequence[Tensor],
    importance: Importance | None,
    calibration_bytes: int,
    max_ram_bytes: int | None,
) -> int | None:
    """How many pieces of weights may be in memory at a time; None: enough to keep all cores busy. Raises KimiLiteError
    where the limit is too small for one."""
    if max_ram_bytes is None:
        return None
    piece = _PIECE_BYTES * max(max(piece_weights(tensor), tensor.shape[-1]) for tensor in tensors)
    fixed = _PROGRAM_BYTES + (sum(vector.nbytes for vector in importance.vectors.values()) if importance else 0)
    fixed += calibration_bytes
    if fixed + 2 * piece > max_ram_bytes:
        need, have = gib_apart(fixed + 2 * piece, max_ram_bytes)
        less = ", or fewer --chunks" if calibration_bytes else ""
        raise KimiLiteError(
            f"--max-ram is {have}; this conversion needs {need}.",
            f"Try --max-ram {-(-(fixed + 2 * piece) // MIB)}M{less}.",
        )
    return min(2 * usable_cores().most_threads, (max_ram_bytes - fixed) // piece - 1)
