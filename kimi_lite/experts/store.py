"""Whole experts, wherever they lie: from a slot in RAM that holds one, else from the model's file.

What brings experts into VRAM reads here: promotions (`experts.vram`) and prompt streams (`experts.stream`). Where all
experts fit into RAM the file is mapped and read in place; where they do not (`experts.ram`), it is read past the page
cache, which would hold a second copy of what the slots were made for.
"""

import threading

import numpy as np

from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.memory import aligned_memory
from kimi_lite.experts.ram import RamSlots


class _Scratch(threading.local):
    """A thread's own memory, to which the disk can write."""

    memory = np.empty(0, np.uint8)


class ExpertStore:
    """The routed experts of a model. `ram`: slots in RAM for experts that come from the disk, None where all are
    mapped; `close` ends their threads. Reading is for any thread."""

    def __init__(self, index: ExpertIndex, ram: RamSlots | None = None) -> None:
        self.index, self.ram = index, ram
        self.num_ram_reads = self.num_file_reads = 0
        self._lock = threading.Lock()  # of the counts
        self._scratch = _Scratch()

    def read(self, layer: int, expert: int) -> np.ndarray:
        """uint8 (vram_slot_bytes of the layer,): the expert as a slot in VRAM holds it. Raises as `read_into`."""
        slot = np.zeros(self.index.layers[layer].vram_slot_bytes, np.uint8)
        self.read_into(layer, expert, slot)
        return slot

    def read_into(self, layer: int, expert: int, slot: np.ndarray) -> None:
        """The same into `slot` (uint8, at least so many bytes). Raises KimiLiteError where the disk fails."""
        matrices = self.index.layers[layer].matrices
        targets = [slot[matrix.offset : matrix.end] for matrix in matrices]
        is_in_ram = self.ram is not None and self.ram.copy_into(layer, expert, targets)
        if not is_in_ram:
            for target, data in zip(targets, self._from_file(layer, expert), strict=True):
                np.copyto(target, data)
        with self._lock:
            self.num_ram_reads += is_in_ram
            self.num_file_reads += not is_in_ram

    def counters(self) -> dict[str, float]:
        """What was read here since the store was made, and what the slots in RAM did."""
        own = {"expert_reads_from_ram": self.num_ram_reads, "expert_reads_from_file": self.num_file_reads}
        return own | (self.ram.counters() if self.ram is not None else {})

    def close(self) -> None:
        if self.ram is not None:
            self.ram.close()

    def _from_file(self, layer: int, expert: int) -> list[np.ndarray]:
        """The bytes of gate, up and down, valid until this thread reads again."""
        found = self.index.layers[layer]
        if self.ram is None:
            return [matrix.data[expert].reshape(-1) for matrix in found.matrices]
        reads = found.reads(expert, self._thread_memory(found.ram_slot_bytes))
        try:
            self.ram.reader.read(reads)
        except OSError as error:
            raise self.ram.failure(layer, expert, error) from error
        return [run.inside(target) for run, target in reads]

    def _thread_memory(self, num_bytes: int) -> np.ndarray:
        if len(self._scratch.memory) < num_bytes:
            self._scratch.memory = aligned_memory(max(self.index.ram_pools))
        return self._scratch.memory
