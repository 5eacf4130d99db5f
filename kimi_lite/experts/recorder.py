"""Records of routing: which experts each token chose, layer by layer. Written with `--record-routing FILE`.

`tools.cache` replays them through cache policies. The file is an .npz of

    ids     int16 (tokens, layers, top_k)   -1: the layer is dense starts  int64 (passes + 1,)             tokens of
    pass i of the model: starts[i] .. starts[i + 1]; a decoding step has one shape   int64 (4,)
    layers, experts, top_k, format (1) name    the model's
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.npz import DAMAGE
from kimi_lite.files import whole_file

_FORMAT = 1
_ROWS = 1024  # tokens of a piece of the growing array


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """What a file holds; see above."""

    name: str
    num_experts: int
    ids: np.ndarray  # int16 (tokens, layers, top_k)
    starts: np.ndarray  # int64 (passes + 1,)

    @property
    def num_layers(self) -> int:
        return self.ids.shape[1]

    @property
    def moe_layers(self) -> np.ndarray:
        """Layers that route, int64."""
        return np.flatnonzero((self.ids >= 0).any(axis=(0, 2)))


class RoutingRecorder:
    """Collects what every pass of the model chose; `close` writes the file."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Raises KimiLiteError at once where nothing can be written later."""
        if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
            raise KimiLiteError(f"--record-routing cannot write {path}.", "Name a file in a folder that exists.")
        if not config.num_moe_layers:
            raise KimiLiteError(
                f"{config.name} has no routed experts: there is nothing to record.", "Leave out --record-routing."
            )
        self._path, self._config = path, config
        self._pieces: list[np.ndarray] = []
        self._starts = [0]
        self._is_closed = False

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    def begin(self, num_tokens: int) -> None:
        """A pass of so many tokens begins."""
        end = self.num_tokens + num_tokens
        while end > _ROWS * len(self._pieces):
            shape = (_ROWS, self._config.num_layers, self._config.num_experts_used)
            self._pieces.append(np.full(shape, -1, np.int16))
        self._starts.append(end)

    def add(self, layer: int, expert_ids: np.ndarray) -> None:
        """What the tokens of this pass chose in one layer: int32 (T, top_k)."""
        first = self._starts[-2]
        assert len(expert_ids) == self.num_tokens - first, (expert_ids.shape, first, self.num_tokens)
        for start in range(first - first % _ROWS, self.num_tokens, _ROWS):
            low, high = max(first, start), min(self.num_tokens, start + _ROWS)
            self._pieces[start // _ROWS][low - start : high - start, layer] = expert_ids[low - first : high - first]

    def drop(self) -> None:
        """Forgets the pass that was begun last: it was cancelled half-way."""
        self._starts.pop()
        for start in range(self.num_tokens - self.num_tokens % _ROWS, _ROWS * len(self._pieces), _ROWS):
            self._pieces[start // _ROWS][max(0, self.num_tokens - start) :] = -1

    def close(self) -> None:
        """Writes the file, whole or not at all. Raises KimiLiteError."""
        if self._is_closed:
            return
        self._is_closed = True
        c = self._config
        whole = (
            np.concatenate(self._pieces)[: self.num_tokens]
            if self._pieces
            else np.empty((0, c.num_layers, c.num_experts_used))
        )
        write_trace(
            self._path, RoutingTrace(c.name, c.num_experts, whole.astype(np.int16), np.array(self._starts, np.int64))
        )


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Writes a trace; an interrupted write leaves no file. Raises KimiLiteError."""
    shape = np.array([trace.num_layers, trace.num_experts, trace.ids.shape[2], _FORMAT], np.int64)
    try:
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, ids=trace.ids, starts=trace.starts, shape=shape, name=np.array(trace.name))
    except OSError as error:
        raise KimiLiteError(
            f"{path} cannot be written: {error.strerror}.", "Free some space or name another file."
        ) from error


def read_trace(path: Path) -> RoutingTrace:
    """Reads and checks a file of `RoutingRecorder`. Raises KimiLiteError."""
    hint = "Record one with: kimi-lite run --record-routing FILE ..."
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            ids, starts, shape, name = file["ids"], file["starts"], file["shape"], str(file["name"])
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or error
        raise KimiLiteError(f"{path} is not a record of routing: {reason}.", hint) from error
    num_layers, num_experts, top_k, version = shape.tolist() if shape.shape == (4,) else (0, 0, 0, 0)
    is_sound = (
        (version, ids.dtype, starts.dtype) == (_FORMAT, np.int16, np.int64)
        and ids.ndim == 3
        and ids.shape[1:] == (num_layers, top_k)
        and starts.ndim == 1
        and len(starts) > 0
        and (np.diff(starts, prepend=0) >= 0).all()
        and starts[-1] == len(ids)
        and (len(ids) == 0 or (ids.min() >= -1 and ids.max() < num_experts))
    )
    if not is_sound:
        raise KimiLiteError(f"{path} is a damaged or foreign record of routing.", hint)
    return RoutingTrace(name, num_experts, ids, starts)
