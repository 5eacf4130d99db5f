"""The vision tower of an open model: from the patches of an image, or of a few frames, to what the model reads.

    tower = VisionTower.open(Path("mmproj-kimi-k2.5.gguf"))
    features = tower.encode(patches)                          # float32 (tokens, D), one row for each placeholder

Opening reads the header alone. Weights are packed and kernels compiled when the first item is encoded, and dropped by
`close`; on a GPU they lie in RAM and go up layer by layer, or stay there (`--vision gpu`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from kimi_lite.arch.moonvit import MoonViT, VisionFile, read_vision_file
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.disk import model_key
from kimi_lite.model.vision.patches import PATCH, EncodingStopped, Grid, Patches
from kimi_lite.model.vision.weights import VisionWeights

OnProgress = Callable[[str, int, int], None]


class _Backend(Protocol):
    """What computes: `cpu.CpuTower` or `gpu.GpuTower`."""

    @property
    def num_bytes(self) -> int: ...

    def encode(self, patches: Patches, should_stop: Callable[[], bool], report: OnProgress) -> np.ndarray: ...

    def close(self) -> None: ...


class VisionTower:
    """One item at a time; not for several threads at once."""

    def __init__(self, store: GGUFStore, file: VisionFile, device: str, stays: bool, num_threads: int | None) -> None:
        self._store, self._file = store, file
        self._device, self._stays, self._num_threads = device, stays, num_threads
        self._backend: _Backend | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        hidden_size: int | None = None,
        device: str = "cpu",
        stays_on_device: bool = False,
        num_threads: int | None = None,
    ) -> "VisionTower":
        """hidden_size: of the model that will read the features. device: "cpu", or torch's name of a GPU;
        stays_on_device: weights lie there once they were used. Raises KimiLiteError where the file is no MoonViT, a
        tensor is missing or of another shape, or the projector ends in another width than the model's.
        """
        store = GGUFStore.open(path)
        file = read_vision_file(store)
        tower = file.tower
        if hidden_size is not None and tower.text_hidden != hidden_size:
            raise KimiLiteError(
                f"{store.path} makes features of {tower.text_hidden:,} values, and the model reads {hidden_size:,}: it "
                f"belongs to another model.",
                "Name the model's own vision file with --mmproj, or go without: --vision off.",
            )
        if tower.hidden % 16 or tower.patch != PATCH:
            raise KimiLiteError(
                f"{store.path}: patches of {tower.patch} pixels with {tower.hidden} values each; the tower's kernels "
                f"take patches of {PATCH} pixels and a multiple of 16 values."
            )
        return cls(store, file, device, stays_on_device, num_threads)

    @property
    def sizes(self) -> MoonViT:
        return self._file.tower

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def key(self) -> str:
        """The same only where features are: of this file, computed the same way."""
        return model_key(self._store, "vision", self.is_on_cpu)

    @property
    def is_on_cpu(self) -> bool:
        return self._device == "cpu"

    @property
    def is_int8(self) -> bool:
        """Whether the CPU multiplies its matrices in int8."""
        return VisionWeights(self._store, self._file).has_quantized

    @property
    def file_bytes(self) -> int:
        """Of its weights, in the file."""
        return self._store.total_bytes

    def encode(
        self,
        patches: Patches,
        on_progress: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> np.ndarray:
        """Features of one item: float32 (h / 2 * w / 2, D), row-major over (h, w), whatever the number of frames.

        on_progress(what is being done, units done, units in all): the first call packs and compiles. Raises
        EncodingStopped between layers when `should_stop()` becomes true, KimiLiteError where a GPU's memory ends.
        """
        grid, sizes = Grid(*patches.grid), self.sizes
        assert patches.pixels.shape == (grid.num_patches, 3, sizes.patch, sizes.patch), (patches.pixels.shape, grid)
        assert patches.pixels.dtype == np.uint8, patches.pixels.dtype
        assert grid.h % sizes.merge == grid.w % sizes.merge == 0 and grid.num_patches > 0, grid
        if grid.t > sizes.max_frames:
            raise KimiLiteError(f"{self.path} takes {sizes.max_frames} frame(s) at a time, and {grid.t} were given.")
        report = on_progress or (lambda stage, done, total: None)
        if self._backend is None:
            self._backend = self._load(report)
        try:
            return self._backend.encode(patches, should_stop or (lambda: False), report)
        except InterruptedError:
            raise EncodingStopped from None

    def _load(self, report: OnProgress) -> _Backend:
        weights = VisionWeights(self._store, self._file)
        if self._device != "cpu":
            from kimi_lite.model.vision.gpu import GpuTower

            return GpuTower(weights, self._file, self._device, self._stays, report)
        from kimi_lite.model.vision.cpu import CpuTower

        return CpuTower(weights, self._file, self._num_threads, report)

    def close(self) -> None:
        """Drops the weights and ends the threads. A second call does nothing."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._store.close()
