"""`--calibrate TEXT`: the inputs that each matrix has on a text, when its turn to be encoded comes.

The source model runs over the text layer by layer (kimi_lite.model.cpu.walk), one layer ahead of the encoder, so that
only one layer's statistics are in memory. Gate and up of all experts share X^T X of all tokens: with 384 experts few
tokens reach each one, and on the demo model sharing loses nothing. Inputs of down differ by expert and are kept as
rows; an expert's X^T X is made when it is asked for.
"""

import hashlib
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from kimi_lite.errors import KimiLiteError
from kimi_lite.model.cpu.walk import MAX_CHUNK_TOKENS, Inputs, LayerWalk
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.calibrate.statistics import (
    ImportanceSums,
    OnLayer,
    check_memory,
    cut_text,
    open_walk,
    read_text,
)
from kimi_lite.quantize.codecs.feedback import Curvature
from kimi_lite.quantize.source.names import file_order
from kimi_lite.units import gib

DEFAULT_CHUNKS = 64  # 32,768 tokens: each of 384 experts is chosen about 680 times
_MAX_SHARE = 0.8  # of free memory
_SHARED = re.compile(r"\.ffn_(gate|up|gate_up)_exps\.")
_GGUF_HINT = (
    "Convert it losslessly first (--recipe q4_0-lossless, or --type bf16), then quantize that file with --calibrate."
)


@dataclass(slots=True)
class _Gram:
    """X^T X, float64 sums of float32 products, over `num_inputs` rows."""

    products: np.ndarray  # (k, k)
    num_inputs: int = 0

    def add(self, values: np.ndarray) -> None:
        self.products += values.T @ values
        self.num_inputs += len(values)


@dataclass(slots=True)
class _LayerInputs:
    """What the running layer's matrices saw. `grams`: of tensors whose matrices share their inputs; `pieces`: by chunk
    the rows and starts of the others."""

    grams: dict[str, _Gram] = field(default_factory=dict)
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)  # tensors that take the same inputs as another


class Calibration:
    """A text run through the source model. Tensors must be asked for in the order of layers."""

    def __init__(self, walk: LayerWalk, chunks: Sequence[np.ndarray], wanted: Collection[str]) -> None:
        """`wanted`: names of the tensors whose curvature will be asked for."""
        self._wanted = frozenset(wanted)
        self._num_layers = walk.config.num_layers
        self._current = _LayerInputs()
        self._layers: Iterator[int] = walk.layers(chunks, self._observe)
        self._layer = -1
        self._lock = threading.Lock()
        self._made: tuple[tuple[str, int], Curvature | None] | None = None

    def curvature(self, name: str, matrix: int) -> Curvature | None:
        """Of matrix (expert or head) `matrix` of a tensor; None where the text gave it no inputs. Runs the model on to
        the tensor's layer. May be called by several threads."""
        with self._lock:
            layer = self._num_layers if name == "output.weight" else file_order(name)
            assert layer >= self._layer, (name, self._layer)
            while self._layer < layer:
                self._current = _LayerInputs()
                self._layer = next(self._layers)
            source = self._current.alias.get(name, name)
            key = (source, 0 if source in self._current.grams else matrix)
            if self._made is None or self._made[0] != key:
                self._made = (key, self._make(*key))
            return self._made[1]

    def _make(self, name: str, matrix: int) -> Curvature | None:
        gram = self._current.grams.get(name)
        if gram is None:
            rows = [
                values[starts[matrix] : starts[matrix + 1]] for values, starts in self._current.pieces.get(name, [])
            ]
            if not sum(map(len, rows)):
                return None
            gram = _Gram(np.zeros((rows[0].shape[1], rows[0].shape[1])))
            gram.add(np.concatenate(rows))
        try:
            return Curvature.of(gram.products, gram.num_inputs)
        except KimiLiteError as error:
            raise KimiLiteError(f"{name}: {error.message}", error.hint) from error

    def _observe(self, inputs: Inputs) -> None:
        names = [name for name in inputs.weights if name in self._wanted]
        if not names:
            return
        first, current = names[0], self._current
        current.alias |= dict.fromkeys(names[1:], first)
        if inputs.starts is None or _SHARED.search(first):
            gram = current.grams.setdefault(first, _Gram(np.zeros((inputs.values.shape[1],) * 2)))
            gram.add(inputs.values)
        else:
            assert inputs.rows is None, first
            current.pieces.setdefault(first, []).append((inputs.values.copy(), inputs.starts.copy()))


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A model and the chunks of a text for it. `label` changes with anything that changes the result."""

    walk: LayerWalk
    chunks: tuple[np.ndarray, ...]
    label: str
    text: Path

    @classmethod
    def open(cls, model: Path, text: Path, max_chunks: int, on_layer: OnLayer | None = None) -> "CalibrationText":
        """Raises KimiLiteError where the source cannot be run, or the text is missing or too short."""
        if model.is_dir() and (model / "config.json").is_file():
            raise KimiLiteError(f"--calibrate runs the model, and {model} is a checkpoint, not GGUF.", _GGUF_HINT)
        content = read_text(text)
        walk, tokenizer = open_walk(model, on_layer=on_layer)
        try:
            chunks = cut_text(content, tokenizer, walk.metadata, text, MAX_CHUNK_TOKENS, max_chunks)
            check_memory(walk.config, chunks)
            digest = hashlib.sha256(np.concatenate(chunks).tobytes()).hexdigest()
            opened = cls(walk, tuple(chunks), f"calibrated on {digest}", text)
            opened.check_memory()
        except KimiLiteError:
            walk.close()
            raise
        return opened

    def start(self, wanted: Collection[str]) -> Calibration:
        """The text on its way through the layers, for the tensors of these names."""
        return Calibration(self.walk, self.chunks, wanted)

    def importance(self, path: Path, on_layer: OnLayer | None = None) -> Importance:
        """The mean squares that `kimi-lite imatrix` would write, for the types that take no feedback."""
        report = on_layer or (lambda name, done, total: None)
        sums = ImportanceSums()
        for layer in self.walk.layers(self.chunks, sums.observe):
            sums.finish_layer()
            report(f"importance, layer {layer}", layer + 1, self.walk.config.num_layers + 1)
        return Importance(path, sums.means())

    def check_memory(self) -> None:
        """Raises KimiLiteError where the statistics of a layer would not fit."""
        need, have = self.num_bytes, int(_MAX_SHARE * psutil.virtual_memory().available)
        if need > have:
            raise KimiLiteError(
                f"The largest layer's statistics need {gib(need)} of memory, and {gib(have)} are free for them.",
                f"Take fewer than {len(self.chunks)} --chunks, or close other programs.",
            )

    @property
    def num_bytes(self) -> int:
        """Memory that the largest layer's statistics take: hidden states, the experts' inputs, X^T X and its
        factors."""
        c, num_tokens = self.walk.config, sum(map(len, self.chunks))
        inputs = max(c.hidden_size, c.num_heads * c.v_head_dim, c.feed_forward_size)
        expert_inputs = num_tokens * c.num_experts_used * c.expert_feed_forward_size
        return 4 * num_tokens * c.hidden_size + 4 * expert_inputs + (8 + 3 * 8 + 2 * 4) * inputs**2

    def close(self) -> None:
        self.walk.close()
