"""Size, perplexity and divergence of one model in many types: our quantizer and ggml's at the same type and size.

    python -m tools.texts texts
    python -m tools.quality.table -m demo-bf16.gguf --calibrate texts/calibration.txt --types tq1_0,iq1_m,q2_k

Routed experts get the type, the rest Q8_0. Each type is encoded by ggml's own code and by ours, without and with an
importance matrix, and with `--calibrate`'s error feedback; where ours is ggml's code (K and IQ types), one row stands
for both. Measured on the first chunks of kimi_lite/engine/emma.txt and on held-out text of seven kinds, as by
`tools.quality`; the calibration text must be another. One Markdown table, then JSON as the last line. Files are written
to a temporary folder and deleted.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from kimi_lite.arch.recipe import OWN_TYPES
from kimi_lite.engine.scoring import (
    FIRST_SCORED,
    TEXT,
    Divergence,
    Losses,
    OurLogits,
    chunks_of,
    log_softmax,
    score_text,
)
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.calibrate.calibration import CalibrationText
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.codecs import ggml
from kimi_lite.quantize.codecs.feedback import FEEDBACK_TYPES
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe.choose import find_recipe
from kimi_lite.quantize.recipe.plan import PlannedTensor, plan_conversion
from kimi_lite.quantize.source.model import RowReader
from kimi_lite.quantize.write.writer import Tensor, write_gguf
from kimi_lite.tools.quality.kinds import chunks_of_kinds, mean_divergence, place_kinds, score_kinds
from kimi_lite.tools.quality.runs import StoredLogits, hash_ids, save_rows

_TYPES = "tq1_0,iq1_s,iq1_m,tq2_0,iq2_xxs,q2_0,q2_k,q3_k,q4_0,q4_k"
_NO_GGML = frozenset({"Q2_0", "LITE2_128"})  # the packaged library is older; the other is ours


@dataclass(frozen=True, slots=True)
class Row:
    """One way of encoding. `encoder`: ggml, or ours; `help`: what it knew of the inputs."""

    type: str
    encoder: str
    help: str
    expert_bits: float  # a weight of the routed experts
    num_bytes: int
    perplexity: float
    perplexity_ratio: float  # to the source's
    kl_nats: float
    kl_error: float
    held_out_kl_nats: float  # the mean over kinds of text
    top1: float


class Scores(NamedTuple):
    """Of a file: its losses and their divergence on the novel, and the mean divergence over kinds of text."""

    losses: Losses
    divergence: Divergence
    held_out_kl_nats: float


class Examiner:
    """Scores files of one model; the source's own logits are computed once and kept in `stored` (.safetensors)."""

    def __init__(self, source: Path, stored: Path, num_chunks: int) -> None:
        self._stored = stored
        with closing(OurLogits(source)) as logits:
            ids = logits.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
            self._chunks = list(chunks_of(ids, logits.bos_id, num_chunks))
            self._num_chunks, by_kind = len(self._chunks), chunks_of_kinds(logits)
            self._kinds = place_kinds(by_kind, self._num_chunks)
            self._chunks += [chunk for each in by_kind.values() for chunk in each]
            if stored.is_file():
                have = StoredLogits(stored, len(self._chunks), hash_ids(self._chunks)).source
                if have != logits.name:
                    raise KimiLiteError(f"{stored} is of {have} and not of {logits.name}.", "Name other results.")
            else:
                scored = (logits.logits(chunk[:-1], FIRST_SCORED) for chunk in self._chunks)
                rows = [log_softmax(each).astype(np.float16) for each in scored]
                save_rows(stored, rows, logits.name, hash_ids(self._chunks))

    def score(self, path: Path) -> Scores:
        with closing(OurLogits(path)) as logits:
            reference = StoredLogits(self._stored, len(self._chunks), hash_ids(self._chunks))
            own, ((losses, divergence),) = score_text(logits, [reference], self._chunks, lambda rows: None)
        held_out = mean_divergence(score_kinds(self._kinds, own, [(losses, divergence)]))
        return Scores(own.of_chunks(0, self._num_chunks), divergence.of_chunks(0, self._num_chunks), held_out)


class Table:
    """Encodes and measures."""

    def __init__(self, source: Path, folder: Path, calibration: CalibrationText, num_chunks: int) -> None:
        self._source, self._folder, self._calibration = source, folder, calibration
        self.importance = calibration.importance(source)
        self._examiner = Examiner(source, folder / "source.safetensors", num_chunks)

    def rows(self, type_name: str) -> Iterator[Row]:
        """All ways of encoding one type."""
        layout_name = type_name.upper()
        helps = {"-": None, "imatrix": self.importance}
        for label, importance in helps.items():
            try:
                find_recipe(type_name, importance is not None)
                is_same = layout_name not in OWN_TYPES or layout_name == "Q8_0"
                if layout_name not in _NO_GGML:
                    yield self._row(
                        type_name, "both" if is_same else "ggml", label, self._write_ggml(type_name, importance)
                    )
                if not is_same:
                    yield self._row(type_name, "ours", label, self._write_ours(type_name, importance))
            except KimiLiteError as error:
                print(f"{type_name}, {label}: {error}", file=sys.stderr)
        if layout_name in FEEDBACK_TYPES:
            yield self._row(type_name, "ours", "calibrate", self._write_ours(type_name, None, self._calibration))

    def _write_ours(
        self, type_name: str, importance: Importance | None, calibration: CalibrationText | None = None
    ) -> Path:
        recipe = find_recipe(type_name, importance is not None or calibration is not None)
        options = {"importance": importance, "calibration": calibration, "is_overwriting": True}
        return convert(self._source, self._folder / "table.gguf", recipe, **options).path

    def _write_ggml(self, type_name: str, importance: Importance | None) -> Path:
        """The same file with the experts encoded by ggml's library, whatever encoder ours would take."""
        model = open_model(self._source)
        plan = plan_conversion(model, find_recipe(type_name, importance is not None))
        tensors = [_encoded_by_ggml(planned, importance) for planned in plan.tensors]
        path = self._folder / "table.gguf"
        write_gguf(path, model.make_metadata(plan.main_layout), tensors, is_overwriting=True)
        return path

    def _row(self, type_name: str, encoder: str, label: str, path: Path) -> Row:
        own, divergence, held_out = self._examiner.score(path)
        found = divergence.to_json()
        bits = find_recipe(type_name, True).experts.bits_per_weight
        kl, same = found["kl_nats"], found["top1_agreement"]["mean"]
        ratio, size = found["perplexity_ratio"]["mean"], path.stat().st_size
        return Row(
            type_name,
            encoder,
            label,
            bits,
            size,
            own.perplexity.mean,
            ratio,
            kl["mean"],
            kl["error"],
            held_out,
            same,
        )


def _encoded_by_ggml(planned: PlannedTensor, importance: Importance | None) -> Tensor:
    source, layout = planned.source, planned.layout
    vectors = importance.find(source.name, source.shape) if importance else None
    is_expert = source.name.endswith("_exps.weight") and not planned.is_exact

    if not is_expert:
        encoded = source.open_encoded(layout)
        open_rows = source.open_rows if encoded is None else lambda: encoded
        return Tensor(source.name, source.shape, layout, open_rows, is_encoded=encoded is not None)

    def open_encoded() -> RowReader:
        read_rows = source.open_rows()
        return lambda start, stop: _encode(read_rows, start, stop)

    def _encode(read_rows: RowReader, start: int, stop: int) -> np.ndarray:
        vector = None if vectors is None else vectors[start // source.shape[-2]]
        return ggml.encode(layout, read_rows(start, stop), vector)

    return Tensor(source.name, source.shape, layout, open_encoded, is_encoded=True)


def print_row(row: Row) -> None:
    print(
        f"| {row.type.upper()} | {row.expert_bits:.4g} | {row.encoder} | {row.help} | {row.num_bytes / 1e6:.1f} | "
        f"{row.perplexity:.2f} | {row.perplexity_ratio:.3f} | {row.kl_nats:.4f} ± {row.kl_error:.4f} | "
        f"{row.held_out_kl_nats:.4f} | {row.top1:.1%} |",
        flush=True,
    )


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="The unquantized model, GGUF.")],
    calibrate: Annotated[Path, typer.Option(help="Text for importance and error feedback.", exists=True)],
    types: Annotated[str, typer.Option(help="Types, by commas.")] = _TYPES,
    chunks: Annotated[int, typer.Option(help="Chunks of 512 tokens that are scored.", min=1)] = 8,
    calibration_chunks: Annotated[int, typer.Option(help="Chunks of the calibration text.", min=1)] = 16,
) -> None:
    """Measure what every type and encoder costs."""
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(CalibrationText.open(model, calibrate, calibration_chunks)) as calibration,
        ):
            table = Table(model, Path(folder), calibration, chunks)
            print(
                "| type | bits | encoder | knows | MB | perplexity | ratio | KL (nats) | held-out kinds | same best |\n"
                + "|---" * 10
                + "|"
            )
            rows = []
            for type_name in types.split(","):
                for row in table.rows(type_name.strip()):
                    rows.append(row)
                    print_row(row)
    except KimiLiteError as error:
        print(f"quality_table: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        json.dumps({"tool": "quality_table", "schema": 1, "model": model.name, "rows": [asdict(row) for row in rows]})
    )


if __name__ == "__main__":
    typer.run(main)
