"""A Hugging Face folder to one GGUF file, streamed: a few megabytes of weights are in memory at a time.

    report = convert(Path("Kimi-K2.5"), Path("kimi-k2.5-bf16.gguf"), "bf16")

Called by `python -m quantize` and `kimi-lite quantize`. Everything that can be wrong is found before the first byte is written.
"""

import time
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from native.layouts import Layout
from quantize.codecs import find_layout, int4
from quantize.metadata import model_metadata
from quantize.names import Source, list_sources
from quantize.recipe import choose
from quantize.source import Checkpoint
from quantize.stored import StoredWeight
from quantize.tokenizer import tokenizer_metadata
from quantize.writer import OnProgress, RowReader, Tensor, check_output, write_gguf

_INCOMPLETE_HINT = "Check that config.json belongs to these weights and that all files are there."


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was written. `notes` say what was left out and which tensors did not get the chosen type, and why."""

    path: Path
    num_bytes: int
    num_tensors: int
    num_weights: int
    tensors_by_type: dict[str, int]
    notes: tuple[str, ...]
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_weights


def convert(
    src: Path, dst: Path, type_name: str, on_progress: OnProgress | None = None, is_overwriting: bool = False
) -> ConvertReport:
    """Writes the checkpoint folder `src` as the GGUF file `dst`, matrices in `type_name` ("f32", "f16", "bf16", "q8_0"; other
    types need the `ggml` extra). `on_progress(tensor, bytes done, bytes in all)`. Raises KimiLiteError."""
    start_s = time.perf_counter()
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    layout = find_layout(type_name)
    checkpoint = Checkpoint.open(src)
    sources = list(list_sources(checkpoint.config, {name: weight.shape for name, weight in checkpoint.weights.items()}))
    _check_sources(checkpoint, sources)
    choices = {source.name: choose(source.name, source.shape, layout) for source in sources}
    tensors = [_plan_tensor(checkpoint, source, choices[source.name].layout) for source in sources]
    check_output(dst, sum(tensor.num_bytes for tensor in tensors), is_overwriting)
    name = str(checkpoint.config.get("_name_or_path") or src.resolve().name)
    metadata = model_metadata(checkpoint.config, name, layout) | tokenizer_metadata(src, checkpoint.config)
    num_bytes = write_gguf(dst, metadata, tensors, on_progress, is_overwriting)
    return ConvertReport(
        path=dst,
        num_bytes=num_bytes,
        num_tensors=len(tensors),
        num_weights=sum(tensor.num_weights for tensor in tensors),
        tensors_by_type=dict(Counter(tensor.layout.name for tensor in tensors)),
        notes=(*checkpoint.notes, *(choice.reason for choice in choices.values() if choice.reason)),
        seconds=time.perf_counter() - start_s,
    )


def _check_sources(checkpoint: Checkpoint, sources: list[Source]) -> None:
    """Every weight that is needed is there in the right shape, and every weight that is there is needed."""
    needed_rows: dict[str, int] = {}
    for source in sources:
        for part in source.parts:
            weight = checkpoint.weights.get(part.weight)
            if weight is None:
                raise KimiLiteError(
                    f"{checkpoint.folder} has no {part.weight}, from which {source.name} is made.", _INCOMPLETE_HINT
                )
            row = source.shape[-2] if part.is_transposed else source.shape[-1]
            if weight.shape[-1] != row:
                have = f"have {list(weight.shape)}"
                raise KimiLiteError(f"{part.weight}: need rows of {row} for {source.name}, {have}.", _INCOMPLETE_HINT)
            needed_rows[part.weight] = max(needed_rows.get(part.weight, 0), part.stop)
    for name, rows in needed_rows.items():
        shape = checkpoint.weights[name].shape
        if prod(shape[:-1]) != rows:
            raise KimiLiteError(f"{name}: need {rows} rows by config.json, have {list(shape)}.", _INCOMPLETE_HINT)
    unknown = [name for name in checkpoint.weights if name not in needed_rows]
    if unknown:
        some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise KimiLiteError(
            f"{checkpoint.folder} has {len(unknown)} weights that this architecture lacks: {some}.", _INCOMPLETE_HINT
        )


def _plan_tensor(checkpoint: Checkpoint, source: Source, layout: Layout) -> Tensor:
    weights = [checkpoint.weights[part.weight] for part in source.parts]
    is_exact_int4 = layout.name == "Q4_0" and all(map(int4.can_repack, weights))
    return Tensor(source.name, source.shape, layout, lambda: _row_reader(source, weights, is_exact_int4))


def _row_reader(source: Source, weights: list[StoredWeight], is_exact_int4: bool) -> RowReader:
    """Reads rows of the GGUF tensor from its parts, which all give the same number of rows; encoded already where INT4 codes
    can be kept."""
    rows_of_part = prod(source.shape[:-1]) // len(source.parts)

    def read_part(index: int, start: int, stop: int) -> np.ndarray:
        part, weight = source.parts[index], weights[index]
        if part.is_transposed:
            return np.ascontiguousarray(weight.read_rows(part.start, part.stop)[:, start:stop].T)
        if is_exact_int4:
            return int4.repack_rows(weight, part.start + start, part.start + stop)
        return weight.read_rows(part.start + start, part.start + stop)

    def read_rows(start: int, stop: int) -> np.ndarray:
        pieces = []
        for index in range(start // rows_of_part, -(-stop // rows_of_part)):
            first = index * rows_of_part
            pieces.append(read_part(index, max(start - first, 0), min(stop - first, rows_of_part)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return read_rows
