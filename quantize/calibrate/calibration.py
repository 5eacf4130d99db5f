"""`--calibrate TEXT`: the inputs that each matrix has on a text, when its turn to be encoded comes.

The source model runs over the text layer by layer (kimi_lite.model.cpu.walk), one layer ahead of the encoder, so that
only one layer's statistics are in memory. What a layer takes is what the layers before it give as they were encoded,
with the kernels and the rounding of activations that the file will be run with: so each layer is fitted to the errors
of those below it. Gate and up of all experts share X^T X of all tokens: with 384 experts few tokens reach each one, and
on the demo model sharing loses nothing. Inputs of down differ by expert and are kept as rows; an expert's X^T X is made
when it is asked for.
"""

import hashlib
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import psutil

from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.host import usable_cores
from kimi_lite.model.cpu.walk import MAX_CHUNK_TOKENS, Inputs, LayerWalk
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.calibrate import blas
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.calibrate.layered import LayeredStore
from kimi_lite.quantize.calibrate.statistics import (
    ImportanceSums,
    OnLayer,
    check_memory,
    cut_text,
    open_walk,
    read_text,
)
from kimi_lite.quantize.calibrate.strength import ALIKE, NUM_TRIED_ROWS, Seen, choose_strength, held_out_chunks
from kimi_lite.quantize.codecs.feedback import Coding
from kimi_lite.quantize.source.model import RowReader
from kimi_lite.quantize.source.names import file_order
from kimi_lite.units import gib

DEFAULT_CHUNKS = 64  # 32,768 tokens: each of 384 experts is chosen about 680 times
_MAX_SHARE = 0.8  # of free memory
_GRAM_BYTES = 16  # of a pair of columns: the sums that are fitted to, and those kept out
_CODING_BYTES = 8 + 24 + 7 * 8  # of a pair of columns while a coding is chosen: their sum, temporaries, seven codings
_SHARED = re.compile(r"\.ffn_(gate|up|gate_up)_exps\.")


@dataclass(slots=True)
class _LayerInputs:
    """What the running layer's matrices saw. `shared`: of tensors whose matrices share their inputs; `pieces`: by chunk
    the rows and starts of the others, and whether the chunk is kept out."""

    shared: dict[str, Seen] = field(default_factory=dict)
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray, bool]]] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)  # tensors that take the same inputs as another

    @property
    def num_bytes(self) -> int:
        shared = sum(seen.fitted.products.nbytes + seen.held_out.products.nbytes for seen in self.shared.values())
        return shared + sum(values.nbytes for pieces in self.pieces.values() for values, _, _ in pieces)


@dataclass(slots=True)
class _Place:
    """Where a matrix's coding is made, by the thread that asks first; others wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    coding: Coding | None = None


def _choose_coding(layout: Layout, seen: Seen, places: np.ndarray, read_rows: RowReader) -> Coding:
    """Tried on the rows at `places`."""
    if not seen.num_inputs:
        return seen.coding(ALIKE)
    rows = np.concatenate([read_rows(int(place), int(place) + 1) for place in places])
    return seen.coding(choose_strength(layout, rows, seen))


class Calibration:
    """A text run through the source model. Tensors must be asked for in the order of layers."""

    def __init__(self, walk: LayerWalk, chunks: Sequence[np.ndarray], wanted: Collection[str], most_bytes: int) -> None:
        """`wanted`: names of the tensors that will be asked for. `most_bytes`: the memory that this may take."""
        self._most_bytes = most_bytes
        self._walk, self._chunks, self._wanted = walk, chunks, frozenset(wanted)
        self._kept_out = held_out_chunks(len(chunks))
        self._open_written: Callable[[], LayeredStore] | None = None
        self._written: LayerWalk | None = None
        self._hidden: list[np.ndarray] = []  # what layer `_done` takes
        self._done = 0  # layers that `_hidden` went through
        self._current, self._layer = _LayerInputs(), -1
        self._lock = threading.Lock()
        self._places: dict[tuple[str, int], _Place] = {}  # by tensor of the running layer, and matrix
        self._most_places = 2 * usable_cores().most_threads + 2  # matrices that are encoded at a time, at most

    def follow(self, open_written: Callable[[], LayeredStore]) -> None:
        """Layers are to take what those before them give as they were written. `open_written`: the file that is being
        written; a layer's bytes are asked for when all its tensors are on disk."""
        self._open_written = open_written

    def coding(self, name: str, layout: Layout, matrix: int, shape: tuple[int, ...], read_rows: RowReader) -> Coding:
        """How matrix (expert or head) `matrix` of a tensor of this shape is coded; `read_rows` reads the tensor's rows.
        Runs the model on to the tensor's layer. May be called by several threads."""
        with self._lock:
            layer = self._walk.config.num_layers if name == "output.weight" else file_order(name)
            if layer != self._layer:
                with blas.all_threads():
                    self._run_to(layer)
            source = self._current.alias.get(name, name)
            shared = self._current.shared.get(source)
            place = self._places.setdefault((name, 0 if shared else matrix), _Place())
            while len(self._places) > self._most_places:
                del self._places[next(iter(self._places))]
        with place.lock:
            if place.coding is None:
                num_rows = prod(shape[:-1]) if shared else shape[-2]  # those that share the inputs
                first = 0 if shared else matrix * num_rows
                places = first + np.unique(np.linspace(0, num_rows - 1, min(NUM_TRIED_ROWS, num_rows)).astype(int))
                try:
                    seen = shared or self._inputs_of_matrix(source, matrix)
                    with blas.all_threads() if shared else nullcontext():  # the others wait for it
                        place.coding = _choose_coding(layout, seen, places, read_rows)
                except KimiLiteError as error:
                    raise KimiLiteError(f"{name}: {error.message}", error.hint) from error
            return place.coding

    def _model(self) -> LayerWalk:
        """What hidden states are made with."""
        if self._written is None and self._open_written:
            written = self._open_written()
            self._written = LayerWalk(written.store, self._walk.config, residency=written, team=self._walk.team)
        return self._written or self._walk

    def _run_to(self, layer: int) -> None:
        """Shows the inputs of this layer's matrices; the number of layers stands for the output matrix."""
        assert layer > self._layer, (layer, self._layer)
        self._current, self._layer = _LayerInputs(), layer
        self._places.clear()
        self._run_written(layer)
        walk = self._walk
        observers = [partial(self._observe, is_held_out=is_held_out) for is_held_out in self._kept_out]
        if layer == walk.config.num_layers:
            for x, observe in zip(self._hidden, observers, strict=True):
                walk.show_output(x, observe)
            return
        with walk.resident(layer):
            for chunk, x, observe in zip(self._chunks, self._hidden, observers, strict=True):
                walk.run_layer(layer, chunk, x.copy(), observe)
        held = sum(x.nbytes for x in self._hidden) + self._current.num_bytes
        assert held <= self._most_bytes, (layer, held, self._most_bytes)

    def _run_written(self, layer: int) -> None:
        """Takes the hidden states through the layers before this one."""
        model = self._model()
        if not self._hidden:
            with model.resident(-1):
                self._hidden = [model.embed(chunk) for chunk in self._chunks]
        for done in range(self._done, layer):
            with model.resident(done):
                for chunk, x in zip(self._chunks, self._hidden, strict=True):
                    model.run_layer(done, chunk, x)
        self._done = layer

    def _inputs_of_matrix(self, name: str, matrix: int) -> Seen:
        pieces = self._current.pieces.get(name, [])
        seen = Seen(pieces[0][0].shape[1] if pieces else 0)
        for values, starts, is_held_out in pieces:
            seen.add(values[starts[matrix] : starts[matrix + 1]], is_held_out)
        return seen

    def _observe(self, inputs: Inputs, is_held_out: bool) -> None:
        names = [name for name in inputs.weights if name in self._wanted]
        if not names:
            return
        first, current = names[0], self._current
        current.alias |= dict.fromkeys(names[1:], first)
        if inputs.starts is None or _SHARED.search(first):
            current.shared.setdefault(first, Seen(inputs.values.shape[1])).add(inputs.values, is_held_out)
        else:
            assert inputs.rows is None, first
            current.pieces.setdefault(first, []).append((inputs.values.copy(), inputs.starts.copy(), is_held_out))


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
        content = read_text(text)
        walk, tokenizer = open_walk(model, on_layer=on_layer, allows_checkpoint=True)
        try:
            chunks = cut_text(content, tokenizer, walk.metadata, text, MAX_CHUNK_TOKENS, max_chunks)
            check_memory(walk.config, chunks)
            digest = hashlib.sha256(np.concatenate(chunks).tobytes()).hexdigest()
            opened = cls(walk, tuple(chunks), f"calibrated on {digest}", text)
        except KimiLiteError:
            walk.close()
            raise
        return opened

    def start(self, wanted: Collection[str]) -> Calibration:
        """The text on its way through the layers, for the tensors of these names."""
        return Calibration(self.walk, self.chunks, wanted, self.num_bytes(wanted))

    def importance(self, path: Path, on_layer: OnLayer | None = None) -> Importance:
        """The mean squares that `kimi-lite imatrix` would write, for the types that take no feedback."""
        report = on_layer or (lambda name, done, total: None)
        sums = ImportanceSums()
        for layer in self.walk.layers(self.chunks, sums.observe):
            sums.finish_layer()
            report(f"importance, layer {layer}", layer + 1, self.walk.config.num_layers + 1)
        return Importance(path, sums.means())

    def check_memory(self, wanted: Collection[str]) -> None:
        """Raises KimiLiteError where the statistics of a layer would not fit."""
        need, have = self.num_bytes(wanted), int(_MAX_SHARE * psutil.virtual_memory().available)
        if need > have:
            raise KimiLiteError(
                f"The largest layer and its statistics need {gib(need)} of memory, and {gib(have)} are free for them.",
                f"Take fewer than {len(self.chunks)} --chunks, or close other programs.",
            )

    def num_bytes(self, wanted: Collection[str]) -> int:
        """Memory that calibrating these tensors takes at most: hidden states, the running layer of a checkpoint, and
        of its tensors X^T X, what is made of it, and the inputs of experts and heads."""
        num_tokens, by_layer = sum(map(len, self.chunks)), defaultdict(list)
        for name in wanted:
            by_layer[file_order(name)].append(name)
        largest = max((self._statistics_bytes(names, num_tokens) for names in by_layer.values()), default=0)
        return 2 * 4 * num_tokens * self.walk.config.hidden_size + self.walk.resident_bytes + largest

    def _statistics_bytes(self, names: Sequence[str], num_tokens: int) -> int:
        """Of one layer. Where matrices have inputs of their own, each thread makes its own codings."""
        c = self.walk.config
        shapes = {name: self.walk.store.tensors[name].shape for name in names}
        own = {name: shape for name, shape in shapes.items() if len(shape) > 2 and not _SHARED.search(name)}
        shared = [shape[-1] for name, shape in shapes.items() if name not in own and ".ffn_up_" not in name]
        rows = sum((c.num_experts_used if "_exps." in name else c.num_heads) * own[name][-1] for name in own)
        codings = [_CODING_BYTES * k**2 for k in shared]
        codings += [usable_cores().most_threads * (_GRAM_BYTES + _CODING_BYTES) * own[name][-1] ** 2 for name in own]
        return _GRAM_BYTES * sum(k**2 for k in shared) + max(codings, default=0) + 4 * num_tokens * rows

    def close(self) -> None:
        self.walk.close()
