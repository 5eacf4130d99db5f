"""Whole experts, wherever they lie: from a slot in RAM that holds one, else from the model's file.

What brings experts into VRAM reads here: promotions (`experts.vram`) and prompt streams (`experts.stream`). The file is
read by system calls, never through the mapping: no page faults, a disk that fails is an error and not a signal, and
cold files come at the disk's speed. Where all experts fit into RAM they come through the page cache, which holds them;
where they do not (`experts.ram`), past it, as it would hold a second copy of what the slots were made for.
"""

import threading

import numpy as np

from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.memory import aligned_memory
from kimi_lite.experts.ram import RamSlots
from kimi_lite.experts.reader import ShardReader, read_failure


class _Scratch(threading.local):
    """A thread's own memory, to which the disk can write."""

    memory = np.empty(0, np.uint8)


class ExpertStore:
    """The routed experts of a model. `ram`: slots in RAM for experts that come from the disk, None where the page cache
    has all; `close` ends their threads. Reading is for any thread."""

    def __init__(self, index: ExpertIndex, ram: RamSlots | None = None) -> None:
        self.index, self.ram = index, ram
        self._reader = ShardReader(index.shards) if ram is None else ram.reader
        self.num_ram_reads = self.num_file_reads = 0  # experts
        self.ram_bytes = self.file_bytes = 0
        self._lock = threading.Lock()  # of the counts
        self._scratch = _Scratch()

    def read(self, layer: int, expert: int) -> np.ndarray:
        """uint8 (vram_slot_bytes of the layer,): the expert as a slot in VRAM holds it. Raises as `read_into`."""
        slot = np.zeros(self.index.layers[layer].vram_slot_bytes, np.uint8)
        self.read_into(layer, expert, slot)
        return slot

    def read_into(self, layer: int, expert: int, slot: np.ndarray) -> None:
        """The same into `slot` (uint8, at least so many bytes). Raises KimiLiteError where the disk fails."""
        for part, matrix in enumerate(self.index.layers[layer].matrices):
            target = slot[matrix.offset : matrix.end]
            if self._from_ram(layer, expert, part, target):
                continue
            if self._reader.is_direct:
                np.copyto(target, self._from_file(layer, expert, part, self._thread_memory()))
            else:
                self._from_file(layer, expert, part, target, is_exact=True)

    def read_part(self, layer: int, expert: int, part: int, place: np.ndarray) -> np.ndarray:
        """Gate, up or down (part 0, 1 or 2), uint8 (num_bytes,), somewhere in `place` (uint8, on a border of 4096
        bytes, at least `index.piece_bytes`), with no copy in between. Raises KimiLiteError where the disk fails."""
        target = place[: self.index.layers[layer].matrices[part].num_bytes]
        if self._from_ram(layer, expert, part, target):
            return target
        return self._from_file(layer, expert, part, place)

    def moved(self, layer: int, expert: int, is_in_vram: bool) -> None:
        """Where memory does not hold all experts, those in VRAM need no copy in it. For the thread that runs the
        model."""
        if self.ram is not None:
            (self.ram.release if is_in_vram else self.ram.restore)(layer, expert)

    def counters(self) -> dict[str, float]:
        """What was read here since the store was made, and what the slots in RAM did."""
        own = {
            "expert_reads_from_ram": self.num_ram_reads,
            "expert_reads_from_file": self.num_file_reads,
            "expert_bytes_from_ram": self.ram_bytes,
            "expert_bytes_from_file": self.file_bytes,
        }
        return own | (self.ram.counters() if self.ram is not None else {})

    def close(self) -> None:
        if self.ram is None:
            self._reader.close()
        else:
            self.ram.close()

    def _from_ram(self, layer: int, expert: int, part: int, target: np.ndarray) -> bool:
        if self.ram is None or not self.ram.copy_part(layer, expert, part, target):
            return False
        with self._lock:
            self.num_ram_reads += part == 0
            self.ram_bytes += target.nbytes
        return True

    def _from_file(self, layer: int, expert: int, part: int, place: np.ndarray, is_exact: bool = False) -> np.ndarray:
        """Its bytes, a part of `place`, with `is_exact` all of it."""
        matrix = self.index.layers[layer].matrices[part]
        run = matrix.run(expert)
        try:
            if is_exact:
                self._reader.read_exactly(run, place)
            data = place if is_exact else self._reader.read(run, place)
        except OSError as error:
            raise read_failure(layer, expert, matrix.shard, error) from error
        with self._lock:
            self.num_file_reads += part == 0
            self.file_bytes += data.nbytes
        return data

    def _thread_memory(self) -> np.ndarray:
        """This thread's, for one matrix."""
        if not len(self._scratch.memory):
            self._scratch.memory = aligned_memory(self.index.piece_bytes)
        return self._scratch.memory
