"""A store of experts and a device whose copies end when the test says so: for `VramSlots` and `PromptStream` without a
GPU."""

import threading
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.memory import BLOCK_BYTES

SLOT_BYTES = 256
_BORDERS = 0, 96, 160, SLOT_BYTES
PARTS = [SimpleNamespace(offset=a, end=b, num_bytes=b - a) for a, b in pairwise(_BORDERS)]


class NumberedExperts:
    """A store of experts whose bytes say who they are. `fail_on`: the expert that cannot be read."""

    def __init__(self, num_layers: int = 3, num_experts: int = 8, first_layer: int = 1) -> None:
        layers = {
            layer: SimpleNamespace(vram_slot_bytes=SLOT_BYTES, matrices=PARTS)
            for layer in range(first_layer, num_layers)
        }
        self.index = SimpleNamespace(
            layers=layers,
            num_layers=num_layers,
            num_experts=num_experts,
            vram_slot_bytes=SLOT_BYTES,
            piece_bytes=2 * BLOCK_BYTES,
        )
        self.num_layers, self.num_experts = num_layers, num_experts
        self.fail_on: tuple[int, int] | None = None

    def moved(self, layer: int, expert: int, is_in_vram: bool) -> None:
        """All experts stay in RAM."""

    def read_into(self, layer: int, expert: int, slot: np.ndarray) -> None:
        for part, matrix in enumerate(PARTS):
            slot[matrix.offset : matrix.end] = self.read_part(layer, expert, part, np.empty(SLOT_BYTES, np.uint8))

    def read_part(self, layer: int, expert: int, part: int, place: np.ndarray) -> np.ndarray:
        """Somewhere in the place, as a disk's blocks have it."""
        if (layer, expert) == self.fail_on:
            raise KimiLiteError("a broken disk", "Replace it.")
        matrix = PARTS[part]
        data = place[expert : expert + matrix.num_bytes]
        data[:] = self.bytes_of(layer, expert)[matrix.offset : matrix.end]
        return data

    def bytes_of(self, layer: int, expert: int) -> np.ndarray:
        return np.random.default_rng(layer * self.num_experts + expert).integers(0, 256, SLOT_BYTES, np.uint8)


class SlowEvent:
    """Happens when the test says so, or when it is waited for."""

    def __init__(self, device: "SlowDevice") -> None:
        self._device, self.has_happened = device, False

    def query(self) -> bool:
        return self.has_happened

    def synchronize(self) -> None:
        self._device.complete(self)


class SlowDevice(GpuStreams):
    """A CPU device whose copy stream runs late: what is copied inside `copying` arrives when its event happens, in
    order."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self._lock = threading.RLock()
        self._late: list[tuple[torch.Tensor, torch.Tensor] | SlowEvent] = []
        self._thread_state = threading.local()

    @contextmanager
    def copying(self):
        self._thread_state.is_copying = True
        try:
            yield
        finally:
            self._thread_state.is_copying = False

    def event(self) -> SlowEvent:
        event = SlowEvent(self)
        if getattr(self._thread_state, "is_copying", False):
            with self._lock:
                self._late.append(event)
        else:
            event.has_happened = True
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._lock:
            self._late.append((target, source))

    def finish(self, event: SlowEvent, num_tokens: int = 1, meanwhile: object = None) -> None:
        self.complete(event)

    def complete(self, until: SlowEvent | None = None) -> None:
        """Everything asked for so far happens, or all up to an event."""
        with self._lock:
            while self._late and not (until is not None and until.has_happened):
                item = self._late.pop(0)
                if isinstance(item, SlowEvent):
                    item.has_happened = True
                else:
                    item[0].copy_(item[1])
