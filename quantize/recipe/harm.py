"""`quantize MODEL.gguf TABLE.csv --measure-sensitivity TEXT`: what one coarse type does to each part of a model alone.

A text runs through the model, and with it one variant for each unit: a routed tensor of a layer, the layer's attention,
its other matrices, the embedding, the head. A variant leaves the model's own hidden states at its unit, whose weights
were encoded by the probe, and goes on through the untouched layers next to all others: every layer's weights are read
once, for all of them. What the head makes of the ends gives each one's KL divergence from the model itself. One more
variant of each layer gets a 128th more of what the layer adds: what that costs is the floor of the layer, which any
change has.

Hidden states lie in a file next to the output, a new one for each layer, renamed when it is whole: a killed run goes on
with the layer that it was in. In memory are one unit's weights in the probe's type, the buffers of a pass, and the
head in slices.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite import __version__
from kimi_lite.arch.architecture import layer_of
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.recipe import ATTENTION, EXPERTS, KEPT, choose, group_of
from kimi_lite.arch.tensors import EMBEDDING, file_name, head_name
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore, TensorView
from kimi_lite.hardware.host import usable_cores
from kimi_lite.model.cpu.walk import MAX_CHUNK_TOKENS, LayerWalk
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.calibrate.statistics import OnLayer, cut_text, open_walk, read_text
from kimi_lite.quantize.codecs import find_layout
from kimi_lite.quantize.recipe.sensitivity import Unit, write_sensitivity
from kimi_lite.quantize.source.files import check_outputs
from kimi_lite.quantize.source.gguf_model import open_gguf_model
from kimi_lite.quantize.write.writer import Tensor, check_replaceable, check_space, encode_pieces

DEFAULT_PROBE = "q2_0"  # near what is chosen between, and needs neither an importance matrix nor another package
DEFAULT_CHUNKS = 2
_FLOOR_CHANGE = np.float32(1 / 128)  # of what a layer adds: about what eight bits change
_HEADER_BYTES = 1 << 18  # of a file of states
_SLICE_WEIGHTS = 1 << 26  # of the head as float32
_SLICE_LOGITS = 1 << 24
_GGUF_HINT = "Convert it losslessly first (--recipe q4_0-lossless, or --type bf16), and measure that file."


@dataclass(frozen=True, slots=True)
class _Variant:
    """Tensors (as the model's code calls them) that the probe encodes together, of a layer; none: the layer's floor."""

    layer: int  # -1: the embedding; the number of layers: the head
    tensors: tuple[str, ...]


def measure_sensitivity(
    model: Path,
    text_file: Path,
    output: Path,
    probe: str | None = None,
    max_chunks: int = 0,
    num_threads: int | None = None,
    is_overwriting: bool = False,
    on_layer: OnLayer | None = None,
) -> list[str]:
    """Writes the table `output`; returns lines to tell the user. Raises KimiLiteError before any work where it cannot
    end well."""
    report = on_layer or (lambda name, done, total: None)
    if (model / "config.json").is_file():
        raise KimiLiteError(f"{model} is a checkpoint, and a sensitivity is measured of a GGUF.", _GGUF_HINT)
    check_replaceable(output, is_overwriting)
    layout = find_layout(probe or DEFAULT_PROBE)
    content = read_text(text_file)
    walk, tokenizer = open_walk(model, num_threads, report)
    try:
        check_outputs([output], [*walk.store.shards, text_file])
        chunks = cut_text(content, tokenizer, walk.metadata, text_file, MAX_CHUNK_TOKENS, max_chunks or DEFAULT_CHUNKS)
        units = _Measurement(walk, chunks, layout, output, num_threads).run(report)
    finally:
        walk.close()
    tokens = sum(map(len, chunks))
    what = f"{walk.store.path.name}: KL divergence in nats on {tokens} tokens of {text_file.name}, each unit alone"
    write_sensitivity(output, units, [f"{what} in {layout.name} and what its rows do not fit in the next type"])
    worst = sorted(units, key=lambda unit: -unit.slope)[:3]
    return [
        f"{output}: {len(units)} units, measured with {layout.name} on {tokens:,} tokens",
        "most harm for an error: " + ", ".join(f"{unit.tensors[0]} ({unit.kl:.3g} nats)" for unit in worst),
        f"kimi-lite quantize {model} OUT.gguf --fit this --sensitivity {output}",
    ]


class _Measurement:
    """The variants of a model on their way through it."""

    def __init__(
        self, walk: LayerWalk, chunks: Sequence[np.ndarray], probe: Layout, output: Path, num_threads: int | None
    ) -> None:
        self._walk, self._chunks, self._num_threads = walk, chunks, num_threads
        self._probe = _Probe(walk.store, probe)
        self._variants = _list_variants(walk.store, walk.config)
        ids = hashlib.sha256(np.concatenate(chunks).tobytes()).hexdigest()
        self._files = _StateFiles(output, repr((__version__, self._probe.origin, ids, probe.name)))
        self._errors: dict[str, float] = {}  # of tensors that the probe encoded, relative squares

    def run(self, report: OnLayer) -> list[Unit]:
        """All layers from where an earlier run stopped, then the head. Raises KimiLiteError where the disk is too
        small for the states."""
        num_layers, config = self._walk.config.num_layers, self._walk.config
        shape = (1 + len(self._variants), sum(map(len, self._chunks)), config.hidden_size)
        check_space(self._files.output, 2 * (4 * prod(shape) + _HEADER_BYTES))
        last, states, self._errors = self._files.find()
        if states is None:
            states = self._keep(-1, self._embed())
        for layer in range(last + 1, num_layers):
            report(f"layer {layer}, {len(states)} variants", layer, num_layers + 1)
            states = self._keep(layer, self._run_layer(layer, states))
        report("head", num_layers, num_layers + 1)
        nats = self._diverge(states)
        self._files.remove()
        return self._units(nats)

    def _keep(self, layer: int, states: Iterator[np.ndarray]) -> np.ndarray:
        num_states = 1 + sum(variant.layer <= layer for variant in self._variants)
        tokens = sum(map(len, self._chunks))
        with self._files.next(layer, (num_states, tokens, self._walk.config.hidden_size), self._errors) as file:
            for index, state in enumerate(states):
                file[index] = state
        return self._files.open(layer)

    def _embed(self) -> Iterator[np.ndarray]:
        """Hidden states (T, D) in front of the first layer: the model's own, and with the probe's embedding."""
        yield np.concatenate([self._walk.embed(chunk) for chunk in self._chunks])
        with self._changed((EMBEDDING,)) as walk:
            yield np.concatenate([walk.embed(chunk) for chunk in self._chunks])

    def _run_layer(self, layer: int, states: np.ndarray) -> Iterator[np.ndarray]:
        """All states (T, D) behind a layer, its own variants last."""
        before = states[0]
        after = self._through(self._walk, layer, before)
        yield after
        for state in states[1:]:
            yield self._through(self._walk, layer, state)
        for variant in (each for each in self._variants if each.layer == layer):
            if not variant.tensors:
                yield after + _FLOOR_CHANGE * (after - before)
                continue
            with self._changed(variant.tensors) as walk:
                yield self._through(walk, layer, before)

    def _through(self, walk: LayerWalk, layer: int, state: np.ndarray) -> np.ndarray:
        state, start = np.array(state, np.float32), 0
        for chunk in self._chunks:
            walk.run_layer(layer, chunk, state[start : start + len(chunk)])
            start += len(chunk)
        return state

    @contextmanager
    def _changed(self, tensors: tuple[str, ...]) -> Iterator[LayerWalk]:
        """The model with these tensors as the probe leaves them."""
        views = {name: self._encoded(name) for name in tensors}
        walk = LayerWalk(self._walk.store.replaced(views), self._walk.config, self._num_threads)
        try:
            yield walk
        finally:
            walk.close()

    def _encoded(self, name: str) -> TensorView:
        view, self._errors[name] = self._probe.encode(name)
        return view

    def _diverge(self, states: np.ndarray) -> dict[_Variant, float]:
        """Mean nats of each variant."""
        head = head_name(self._walk.store.tensors)
        own, changed = self._walk.store.tensors[head], self._encoded(head)
        places = {}
        number = 0
        for variant in self._variants:
            if variant.layer < self._walk.config.num_layers:
                number += 1
            is_tied = variant.tensors == (EMBEDDING,) == (head,)
            is_head = variant.layer == self._walk.config.num_layers
            places[variant] = (0 if is_head else number, is_head or is_tied)
        sums = _Sums(places.values(), states.shape[1])
        normed = self._walk.normed_output
        rows = max(1, min(_SLICE_WEIGHTS // own.shape[1], _SLICE_LOGITS // states.shape[1]))
        for start in range(0, own.shape[0], rows):
            matrices = [dequantize(view.data[start : start + rows], view.layout.name).T for view in (own, changed)]
            base = normed(states[0])
            sums.add_base(base @ matrices[0])  # (T, slice)
            for state, is_changed in places.values():
                sums.add((state, is_changed), (normed(states[state]) if state else base) @ matrices[is_changed])
        return {variant: sums.divergence(place) for variant, place in places.items()}

    def _units(self, nats: Mapping[_Variant, float]) -> list[Unit]:
        floors = {variant.layer: nats[variant] for variant in self._variants if not variant.tensors}
        units = []
        for variant in (each for each in self._variants if each.tensors):
            names = tuple(file_name(name, self._walk.config.table) for name in variant.tensors)
            weights = [prod(self._walk.store.tensors[name].shape) for name in variant.tensors]
            error = np.average([self._errors[name] for name in variant.tensors], weights=weights)
            if error > 0:  # else the source has the probe's type
                floor = floors.get(max(variant.layer, 0), 0.0)
                units.append(Unit(names, self._probe.layout.name.lower(), float(error), floor, nats[variant]))
        return units


def _list_variants(store: GGUFStore, config: ModelConfig) -> list[_Variant]:
    """The embedding, then each layer's floor, attention, other matrices and routed tensors, then the head."""
    variants = [_Variant(-1, (EMBEDDING,))]
    for layer in range(config.num_layers):
        groups = {
            name: group_of(name, view.shape)
            for name, view in store.tensors.items()
            if layer_of(name) == layer and len(view.shape) > 1
        }
        attention = tuple(name for name, group in groups.items() if group == ATTENTION)
        others = tuple(name for name, group in groups.items() if group not in (ATTENTION, EXPERTS, KEPT))
        routed = [(name,) for name, group in groups.items() if group == EXPERTS]
        variants.append(_Variant(layer, ()))
        variants += [_Variant(layer, tensors) for tensors in (attention, others, *routed) if tensors]
    head = head_name(store.tensors)
    return variants if head == EMBEDDING else [*variants, _Variant(config.num_layers, (head,))]


class _Probe:
    """Encodes tensors of a file in a coarse type."""

    def __init__(self, store: GGUFStore, layout: Layout) -> None:
        self.layout = layout
        self._store = store
        model = open_gguf_model(store.path)
        self.origin = model.origin
        self._sources = {tensor.role: tensor for tensor in model.tensors}

    def encode(self, name: str) -> tuple[TensorView, float]:
        """The tensor as the type leaves it, or the next type that its rows fit, and the relative squared error."""
        source, view = self._sources[name], self._store.tensors[name]
        layout = choose(name, source.shape, self.layout).layout
        data = np.empty((source.num_weights // source.shape[-1], layout.row_bytes(source.shape[-1])), np.uint8)
        tensor = Tensor(name, source.shape, layout, source.open_rows)
        done, errors, squares = 0, 0.0, 0.0
        with ThreadPoolExecutor(usable_cores().most_threads) as pool:
            for piece in encode_pieces(tensor, pool, is_measured=True):
                data[done : done + len(piece.rows)] = piece.rows
                done += len(piece.rows)
                errors, squares = errors + piece.error_squares, squares + piece.weight_squares
        shape = (*source.shape[:-1], data.shape[1])
        return TensorView(name, layout, source.shape, data.reshape(shape), view.shard, 0), (
            errors / squares if squares else 0.0
        )


class _Sums:
    """Divergences of logits that come in slices of the vocabulary, as sums under a running maximum."""

    def __init__(self, places: Sequence[tuple[int, bool]], num_tokens: int) -> None:
        self._top = np.full(num_tokens, -np.inf)  # of the model's own logits
        self._sum = np.zeros(num_tokens)  # of e^(a - top)
        self._base = np.zeros((0, 0), np.float32)
        self._probs = np.zeros((0, 0), np.float32)
        self._crossed = {place: np.zeros(num_tokens) for place in places}  # of e^(a - top) (a - b)
        self._log_sums = {place: np.full(num_tokens, -np.inf) for place in places}  # of e^b

    def add_base(self, logits: np.ndarray) -> None:
        """float32 (T, slice), of the model itself; `add` then takes the same slice of every variant."""
        top = np.maximum(self._top, logits.max(axis=1))
        scale = np.exp(self._top - top)
        self._base, self._probs = logits, np.exp(logits - top[:, None].astype(np.float32))
        self._sum = self._sum * scale + self._probs.sum(axis=1, dtype=np.float64)
        for crossed in self._crossed.values():
            crossed *= scale
        self._top = top

    def add(self, place: tuple[int, bool], logits: np.ndarray) -> None:
        self._crossed[place] += (self._probs * (self._base - logits)).sum(axis=1, dtype=np.float64)
        top = logits.max(axis=1, keepdims=True)
        here = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
        self._log_sums[place] = np.logaddexp(self._log_sums[place], here)

    def divergence(self, place: tuple[int, bool]) -> float:
        """Mean nats over the tokens."""
        own = self._top + np.log(self._sum)
        return max(0.0, float((self._crossed[place] / self._sum - own + self._log_sums[place]).mean()))


class _StateFiles:
    """`OUTPUT.layer-007`: all states behind layer 7, float32 (states, T, D), behind a header of one JSON line."""

    def __init__(self, output: Path, origin: str) -> None:
        self.output = output
        self._origin = hashlib.sha256(origin.encode()).hexdigest()

    def find(self) -> tuple[int, np.ndarray | None, dict[str, float]]:
        """The last layer that an earlier run of the same work finished, its states, and the probe's errors so far."""
        for path in sorted(self.output.parent.glob(f"{self.output.name}.layer-*[0-9]"), reverse=True):
            with path.open("rb") as file:
                header = json.loads(file.read(_HEADER_BYTES).split(b"\n")[0])
            if header["origin"] == self._origin:
                return header["layer"], self._map(path, tuple(header["shape"])), header["errors"]
            path.unlink()
        return -1, None, {}

    @contextmanager
    def next(self, layer: int, shape: tuple[int, ...], errors: Mapping[str, float]) -> Iterator[np.ndarray]:
        """A file to fill; when the block ends it stands in the place of the one before."""
        path = self._path(layer)
        partial = path.with_name(f"{path.name}.partial")
        try:
            states = np.memmap(partial, np.float32, "w+", _HEADER_BYTES, shape)
            yield states
            states.flush()
            header = {"origin": self._origin, "layer": layer, "shape": shape, "errors": dict(errors)}
            with partial.open("r+b") as file:
                file.write(json.dumps(header).encode() + b"\n")
                assert file.tell() <= _HEADER_BYTES, file.tell()
                os.fsync(file.fileno())
        except OSError as error:
            raise KimiLiteError(f"Writing {partial} failed: {error.strerror or error}.", "Free some space.") from error
        partial.replace(path)
        self._path(layer - 1).unlink(missing_ok=True)

    def open(self, layer: int) -> np.ndarray:
        path = self._path(layer)
        with path.open("rb") as file:
            return self._map(path, tuple(json.loads(file.readline())["shape"]))

    def remove(self) -> None:
        for path in self.output.parent.glob(f"{self.output.name}.layer-*"):
            path.unlink()

    def _path(self, layer: int) -> Path:
        return self.output.with_name(f"{self.output.name}.layer-{layer + 1:04d}")

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
        return np.memmap(path, np.float32, "r", _HEADER_BYTES, shape)
