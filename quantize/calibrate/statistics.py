"""`kimi-lite imatrix`: what llama.cpp's llama-imatrix measures, with our own forward pass, in the same GGUF file.

For every weight matrix the sum of the squares of each input column over a text, and how many inputs there were; experts
and heads have vectors of their own. The model runs layer by layer (kimi_lite.model.cpu.walk), so it may be larger than
memory. The file is what `quantize --imatrix` and llama.cpp's quantizer read. Format: llama.cpp/tools/imatrix.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil

from kimi_lite import files
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import checked_model, file_name, open_model
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value, ValueType, text, u32
from kimi_lite.gguf.shards import find_shards
from kimi_lite.model.cpu.walk import MAX_CHUNK_TOKENS, Inputs, LayerWalk
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.calibrate.imatrix import mean_squares
from kimi_lite.quantize.calibrate.layered import checkpoint_layers
from kimi_lite.quantize.source.files import check_outputs
from kimi_lite.quantize.source.hf_model import open_hf_model
from kimi_lite.quantize.source.open import is_checkpoint
from kimi_lite.quantize.write.writer import Tensor, check_output, write_gguf
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.units import gib

OnLayer = Callable[[str, int, int], None]  # (what is being done, layers done, layers in all)
_MAX_SHARE = 0.5  # of free memory, for the hidden states of the text


class ImportanceSums:
    """Sums of squares and counts by tensor name. Float64 while a layer runs, float32 afterwards."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}  # (matrices, columns)
        self.counts: dict[str, np.ndarray] = {}  # (matrices,), or (1,) where all matrices had the same number of inputs
        self._names: set[str] = set()  # of the running layer

    def observe(self, inputs: Inputs) -> None:
        squares = np.square(inputs.values, dtype=np.float64)
        starts = inputs.starts
        if starts is None:
            sums, counts = squares.sum(axis=0)[None], np.array([inputs.num_tokens])
        else:
            rows = np.arange(starts[-1]) if inputs.rows is None else inputs.rows
            sums = np.stack([squares[rows[first:last]].sum(axis=0) for first, last in pairwise(starts)])
            counts = np.array([inputs.num_tokens]) if inputs.num_tokens else np.diff(starts)
        for name in inputs.weights:
            self._names.add(name)
            if name in self.sums:
                self.sums[name] += sums
                self.counts[name] += counts
            else:
                self.sums[name], self.counts[name] = sums.copy(), counts.astype(np.int64)

    def means(self) -> dict[str, np.ndarray]:
        """Mean squares by tensor name, as a file of these sums is read."""
        return {name: mean_squares(sums, self.counts[name][:, None]) for name, sums in self.sums.items()}

    def named(self, config: ModelConfig) -> "ImportanceSums":
        """The same under the names that files of the architecture have."""
        renamed = ImportanceSums()
        renamed.sums = {file_name(name, config.table): sums for name, sums in self.sums.items()}
        renamed.counts = {file_name(name, config.table): counts for name, counts in self.counts.items()}
        return renamed

    def finish_layer(self) -> None:
        """Halves the memory of what will not grow any more."""
        for name in self._names:
            self.sums[name] = self.sums[name].astype(np.float32)
        self._names.clear()


def open_walk(
    model: Path, num_threads: int | None = None, on_layer: OnLayer | None = None, allows_checkpoint: bool = False
) -> tuple[LayerWalk, Tokenizer]:
    """A GGUF file; or, for callers that let the walk say which layer runs, a checkpoint's folder, whose layers are read
    one after another. Raises KimiLiteError where it is damaged or no model that runs here."""
    report = on_layer or (lambda name, done, total: None)
    is_layered = allows_checkpoint and is_checkpoint(model)
    layered = checkpoint_layers(open_hf_model(model), model) if is_layered else None
    store, config = checked_model(layered.store) if layered else open_model(model)
    walk = LayerWalk(store, config, num_threads, lambda done, total: report("preparing kernels", done, total), layered)
    return walk, Tokenizer.from_metadata(store.metadata)


def cut_text(
    content: str, tokenizer: Tokenizer, metadata: dict, file: Path, chunk_tokens: int, max_chunks: int
) -> list[np.ndarray]:
    """Token ids in chunks of `chunk_tokens`, each begun with the model's first token where it has one; what does not
    fill a chunk is left out. Raises KimiLiteError for a text that is too short."""
    says_so = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
    first = [metadata["tokenizer.ggml.bos_token_id"]] if says_so and "tokenizer.ggml.bos_token_id" in metadata else []
    ids = tokenizer.encode(content)
    step = chunk_tokens - len(first)
    if len(ids) < step:
        raise KimiLiteError(
            f"{file} has {len(ids):,} tokens; one chunk of {chunk_tokens} needs {step:,}.",
            "Give a longer text: a hundred chunks of varied prose, code and dialogue are usual.",
        )
    num_chunks = min(len(ids) // step, max_chunks or len(ids))
    return [np.array([*first, *ids[i * step : (i + 1) * step]], np.int32) for i in range(num_chunks)]


def check_memory(config: ModelConfig, chunks: Sequence[np.ndarray]) -> None:
    """Raises KimiLiteError where the hidden states of all chunks would not fit."""
    num_tokens = sum(map(len, chunks))
    need, have = 4 * num_tokens * config.hidden_size, int(_MAX_SHARE * psutil.virtual_memory().available)
    if need > have:
        raise KimiLiteError(
            f"The hidden states of {num_tokens:,} tokens need {gib(need)}, and half of the free memory is {gib(have)}.",
            f"Take fewer chunks: --chunks {max(1, len(chunks) * have // need)}.",
        )


def collect_importance(
    model: Path,
    text_file: Path,
    output: Path,
    max_chunks: int = 0,
    chunk_tokens: int = MAX_CHUNK_TOKENS,
    num_threads: int | None = None,
    is_overwriting: bool = False,
    on_layer: OnLayer | None = None,
) -> list[str]:
    """Measures and writes `output`; returns lines to tell the user. Raises KimiLiteError before any work where it
    cannot end well."""
    report = on_layer or (lambda name, done, total: None)
    check_output(output, 0, is_overwriting)
    sources = open_hf_model(model).files if is_checkpoint(model) else ()
    check_outputs([output], [*([file.path for file in sources] or find_shards(model)), text_file])
    content = read_text(text_file)
    if not 1 < chunk_tokens <= MAX_CHUNK_TOKENS:
        raise KimiLiteError(
            f"Chunks of {chunk_tokens} tokens are wanted.", f"From 2 to {MAX_CHUNK_TOKENS} are possible."
        )
    walk, tokenizer = open_walk(model, num_threads, report, allows_checkpoint=True)
    try:
        chunks = cut_text(content, tokenizer, walk.metadata, text_file, chunk_tokens, max_chunks)
        check_memory(walk.config, chunks)
        sums = ImportanceSums()
        for layer in walk.layers(chunks, sums.observe):
            sums.finish_layer()
            report(f"layer {layer}", layer + 1, walk.config.num_layers + 1)
        num_bytes = write_imatrix(
            output, sums.named(walk.config), text_file.name, len(chunks), chunk_tokens, is_overwriting
        )
    finally:
        walk.close()
    return [_summary(output, sums, len(chunks), chunk_tokens, num_bytes), *_warnings(sums)]


def read_text(file: Path) -> str:
    if not file.is_file():
        raise KimiLiteError(
            f"There is no file {file}.", "Name a text, such as a few hundred kilobytes of what you will ask about."
        )
    return files.read_text(file, "The text", max_bytes=files.MAX_CORPUS_BYTES)


def write_imatrix(
    path: Path, sums: ImportanceSums, dataset: str, num_chunks: int, chunk_tokens: int, is_overwriting: bool
) -> int:
    """Writes llama.cpp's file: `W.in_sum2` (matrices, columns) and `W.counts` (matrices, 1). Returns its bytes."""
    tensors = []
    for name, values in sums.sums.items():
        tensors += [_tensor(f"{name}.in_sum2", values), _tensor(f"{name}.counts", sums.counts[name][:, None])]
    metadata: dict[str, Value] = {
        "general.architecture": text("imatrix"),
        "general.type": text("imatrix"),
        "imatrix.datasets": Value([dataset], ValueType.ARRAY, ValueType.STRING),
        "imatrix.chunk_count": u32(num_chunks),
        "imatrix.chunk_size": u32(chunk_tokens),
    }
    return write_gguf(path, metadata, tensors, is_overwriting=is_overwriting)


def _tensor(name: str, values: np.ndarray) -> Tensor:
    rows = np.ascontiguousarray(values, np.float32)
    return Tensor(name, rows.shape, BY_NAME["F32"], lambda: lambda start, stop: rows[start:stop])


def _summary(output: Path, sums: ImportanceSums, num_chunks: int, chunk_tokens: int, num_bytes: int) -> str:
    size = f"{num_bytes / 1e6:,.1f} MB"
    return f"{output}: {len(sums.sums)} tensors from {num_chunks} chunks of {chunk_tokens} tokens, {size}"


def _warnings(sums: ImportanceSums) -> list[str]:
    """Experts that the text did not reach: their weights will be encoded as if all columns counted alike."""
    unseen = {
        name: int((counts == 0).sum())
        for name, counts in sums.counts.items()
        if "_exps." in name and (counts == 0).any()
    }
    if not unseen:
        return []
    worst = max(unseen, key=lambda name: unseen[name])
    return [
        f"note: in {len(unseen)} tensors some experts were chosen by no token, most in {worst} ({unseen[worst]} of "
        f"{len(sums.counts[worst])}); a longer text reaches more"
    ]
