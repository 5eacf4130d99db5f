"""A Hugging Face folder as a model to be converted: which of its weights make which GGUF tensor, checked before any is
read.
"""

from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.arch.tensors import file_name
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.source.files import FileState
from kimi_lite.quantize.source.metadata import model_metadata
from kimi_lite.quantize.source.model import RowReader, SourceModel, SourceTensor
from kimi_lite.quantize.source.names import TensorSource, list_sources
from kimi_lite.quantize.source.open import Checkpoint
from kimi_lite.quantize.source.repack import check_scales, held_by, kept_type, repack_rows
from kimi_lite.quantize.source.tokenizer import TOKENIZER_FILES, tokenizer_metadata

_INCOMPLETE_HINT = "Check that config.json belongs to these weights and that all files are there."
_EXACT = {"f16": ("F16", "F32"), "bf16": ("BF16", "F32")}  # types that hold every value, by how it is stored; else F32


def open_hf_model(folder: Path) -> SourceModel:
    """Raises KimiLiteError where files are missing or damaged, or do not belong together."""
    names = ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES)
    states = [FileState.of(folder / name) for name in names if (folder / name).is_file()]
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config.config
    is_tied = checkpoint.config.fields.get("tie_word_embeddings") is True
    sources = list(list_sources(config, checkpoint.weights, is_tied))
    _check_sources(checkpoint, sources)

    @cache
    def tokenizer() -> dict[str, Value]:
        return tokenizer_metadata(folder, checkpoint.config.fields)

    return SourceModel(
        tensors=tuple(_source_tensor(checkpoint, source) for source in sources),
        make_metadata=lambda layout: model_metadata(config, layout) | tokenizer(),
        notes=checkpoint.notes,
        files=(*states, *map(FileState.of, checkpoint.files)),
    )


def _check_sources(checkpoint: Checkpoint, sources: list[TensorSource]) -> None:
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
            if not weight.shape or weight.shape[-1] != row:
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
        problem = f"{checkpoint.folder} has {len(unknown)} weights that this architecture lacks: {some}"
        raise KimiLiteError(
            f"{problem}: without them the rest may mean something else, so they are not left out.", _INCOMPLETE_HINT
        )


def _source_tensor(checkpoint: Checkpoint, source: TensorSource) -> SourceTensor:
    weights = [checkpoint.weights[part.weight] for part in source.parts]
    kinds = {weight.kind for weight in weights}
    kept = kept_type(weights)
    held = held_by(weights, kept)
    exact = set.intersection(*({*_EXACT.get(kind, ("F32",))} for kind in kinds)) | held

    def open_encoded(layout: Layout) -> RowReader | None:
        if layout.name not in held:
            return None
        try:
            check_scales(weights, layout.name)
        except KimiLiteError as error:
            raise KimiLiteError(f"{source.name}: {error.message}", error.hint.replace("NAME", source.name)) from error

        def read_part(index: int, start: int, stop: int) -> np.ndarray:
            first = source.parts[index].start
            return repack_rows(weights[index], layout.name, first + start, first + stop)

        return _joined(source, read_part)

    def read_part(index: int, start: int, stop: int) -> np.ndarray:
        part, weight = source.parts[index], weights[index]
        if part.is_transposed:
            return np.ascontiguousarray(weight.read_rows(part.start, part.stop)[:, start:stop].T)
        return weight.read_rows(part.start + start, part.start + stop)

    return SourceTensor(
        name=file_name(source.name, checkpoint.config.config.table),
        role=source.name,
        shape=source.shape,
        stored="+".join(sorted(kinds)),
        exact=frozenset(exact),
        open_rows=lambda: _joined(source, read_part),
        open_encoded=open_encoded,
        codes=kept,
    )


def _joined(source: TensorSource, read_part) -> RowReader:
    """Reads rows of the GGUF tensor from its parts, which all give the same number of rows. `read_part(index, start,
    stop)`: rows of one part."""
    rows_of_part = prod(source.shape[:-1]) // len(source.parts)

    def read_rows(start: int, stop: int) -> np.ndarray:
        pieces = []
        for index in range(start // rows_of_part, -(-stop // rows_of_part)):
            first = index * rows_of_part
            pieces.append(read_part(index, max(start - first, 0), min(stop - first, rows_of_part)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return read_rows
