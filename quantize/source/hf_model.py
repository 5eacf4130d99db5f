"""A Hugging Face folder as a model to be converted: which of its weights make which GGUF tensor, checked before any is
read.
"""

from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.codecs import int2, int4
from kimi_lite.quantize.source.metadata import model_metadata
from kimi_lite.quantize.source.model import SourceModel, SourceTensor, describe_files
from kimi_lite.quantize.source.names import Source, list_sources
from kimi_lite.quantize.source.open import Checkpoint
from kimi_lite.quantize.source.stored import Fp8Weight, Int2Weight, Int4Weight, PlainWeight, StoredWeight
from kimi_lite.quantize.source.tokenizer import tokenizer_metadata
from kimi_lite.quantize.write.writer import RowReader, Value

_INCOMPLETE_HINT = "Check that config.json belongs to these weights and that all files are there."
_EXACT = {"f16": ("F16", "F32"), "bf16": ("BF16", "F32")}  # types that hold every value, by how it is stored; else F32
_KEPT = {"Q4_0": int4, "Q2_0": int2}  # types that hold the very codes
_Repack = Callable[[StoredWeight, int, int], np.ndarray]


def open_hf_model(folder: Path) -> SourceModel:
    """Raises KimiLiteError where files are missing or damaged, or do not belong together."""
    checkpoint = Checkpoint.open(folder)
    sources = list(list_sources(checkpoint.config, {name: weight.shape for name, weight in checkpoint.weights.items()}))
    _check_sources(checkpoint, sources)
    name = str(checkpoint.config.get("_name_or_path") or folder.resolve().name)

    @cache
    def tokenizer() -> dict[str, Value]:
        return tokenizer_metadata(folder, checkpoint.config)

    files = sorted({*folder.glob("*.safetensors"), *folder.glob("*.json")})
    return SourceModel(
        tensors=tuple(_source_tensor(checkpoint, source) for source in sources),
        make_metadata=lambda layout: model_metadata(checkpoint.config, name, layout) | tokenizer(),
        notes=checkpoint.notes,
        origin=describe_files(files),
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


def _source_tensor(checkpoint: Checkpoint, source: Source) -> SourceTensor:
    weights = [checkpoint.weights[part.weight] for part in source.parts]
    kinds = {_stored_as(weight) for weight in weights}
    kept = next((name for name, codec in _KEPT.items() if all(map(codec.can_repack, weights))), None)
    exact = set.intersection(*({*_EXACT.get(kind, ("F32",))} for kind in kinds)) | ({kept} if kept else set())

    def open_rows(layout: Layout) -> RowReader:
        return _row_reader(source, weights, _KEPT[kept].repack_rows if layout.name == kept else None)

    return SourceTensor(source.name, source.shape, "+".join(sorted(kinds)), frozenset(exact), open_rows)


def _stored_as(weight: StoredWeight) -> str:
    match weight:
        case PlainWeight():
            return weight.raw.dtype.lower()
        case Int4Weight():
            return "int4"
        case Int2Weight():
            return "int2"
        case Fp8Weight():
            return "fp8"
    raise AssertionError(type(weight))


def _row_reader(source: Source, weights: list[StoredWeight], repack: _Repack | None) -> RowReader:
    """Reads rows of the GGUF tensor from its parts, which all give the same number of rows; encoded already where codes
    can be kept, by `repack`."""
    rows_of_part = prod(source.shape[:-1]) // len(source.parts)

    def read_part(index: int, start: int, stop: int) -> np.ndarray:
        part, weight = source.parts[index], weights[index]
        if part.is_transposed:
            return np.ascontiguousarray(weight.read_rows(part.start, part.stop)[:, start:stop].T)
        if repack:
            return repack(weight, part.start + start, part.start + stop)
        return weight.read_rows(part.start + start, part.start + stop)

    def read_rows(start: int, stop: int) -> np.ndarray:
        pieces = []
        for index in range(start // rows_of_part, -(-stop // rows_of_part)):
            first = index * rows_of_part
            pieces.append(read_part(index, max(start - first, 0), min(stop - first, rows_of_part)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return read_rows
