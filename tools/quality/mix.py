"""Types chosen by measured harm against one type for all experts, in files of the same size.

    kimi-lite quantize demo-bf16.gguf demo.csv --measure-sensitivity text.txt
    python -m tools.quality.mix -m demo-bf16.gguf --sensitivity demo.csv --results mix.jsonl --picture mix.svg

For each type three files: its recipe (experts in the type, the rest Q8_0; `all-q4_k`: everything in it); experts in the
types that `--size` chooses by the table, the rest Q8_0; and all matrices chosen so. The second and third are no larger
than the first; of `all-q4_k` there is no second. KL
divergence from the model on the first chunks of the text that `tools.quality` scores. A line of JSON for each file is
kept in `--results`: what is there already is not measured again. A Markdown table comes last.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kimi_lite.arch.recipe import Recipe
from kimi_lite.engine.scoring import TEXT, OurLogits, chunks_of, log_softmax, score_text
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.calibrate.imatrix import Importance, read_imatrix
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe.budget import fit_size
from kimi_lite.quantize.recipe.choose import find_recipe, uniform_recipe
from kimi_lite.quantize.recipe.sensitivity import Sensitivity, read_sensitivity
from kimi_lite.tools.plot import PALETTE, check_plotting, save_figure
from kimi_lite.tools.quality.runs import StoredLogits, hash_ids, save_rows

_EVERYWHERE = "all-"
_TYPES = "tq1_0,q2_0,q2_k,iq3_xxs,q3_k,all-q4_k"  # what needs no importance matrix
UNIFORM, EXPERTS, ALL = "one type", "experts mixed", "all mixed"


@dataclass(frozen=True, slots=True)
class Row:
    """A file. `type`: whose recipe's size it has."""

    type: str
    kind: str
    num_bytes: int
    kl_nats: float
    kl_error: float
    predicted_nats: float | None


class Mixes:
    """Makes the files and measures them; the model's own logits are kept next to the results."""

    def __init__(
        self, model: Path, table: Sensitivity, importance: Importance | None, results: Path, num_chunks: int
    ) -> None:
        self._path, self._importance, self._results = model, importance, results
        self._tables = {ALL: table, EXPERTS: _of_experts(table)}
        self._reference = results.with_suffix(".safetensors")
        self._chunks: list[np.ndarray] = []
        self._num_chunks = num_chunks

    def rows(self, type_name: str, done: Mapping[tuple[str, str], Row]) -> list[Row]:
        """Of which those not `done` are made and kept."""
        rows = []
        recipe = _recipe_of(type_name, self._importance is not None)
        for kind in (UNIFORM, ALL) if type_name.startswith(_EVERYWHERE) else (UNIFORM, EXPERTS, ALL):
            row = done.get((type_name, kind)) or self._measure(type_name, kind, recipe, rows[0] if rows else None)
            rows.append(row)
        return rows

    def _measure(self, type_name: str, kind: str, recipe: Recipe, uniform: Row | None) -> Row:
        model, predicted = open_model(self._path), None
        if uniform:
            fit = fit_size(model, uniform.num_bytes, self._importance, self._tables[kind])
            recipe, predicted = fit.recipe, fit.predicted
        with tempfile.TemporaryDirectory(dir=self._results.parent) as folder:
            path = convert(model, Path(folder) / "mix.gguf", recipe, importance=self._importance).path
            num_bytes = path.stat().st_size
            nats, error = self._diverge(path)
        row = Row(type_name, kind, num_bytes, nats, error, predicted)
        with self._results.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        return row

    def _diverge(self, path: Path) -> tuple[float, float]:
        """Mean nats and their standard error."""
        with closing(OurLogits(path)) as logits:
            ids = logits.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
            chunks = list(chunks_of(ids, logits.bos_id, self._num_chunks))
            if not self._reference.is_file():
                self._save_reference(chunks)
            reference = StoredLogits(self._reference, len(chunks), hash_ids(chunks))
            _, ((_, divergence),) = score_text(logits, [reference], chunks, lambda rows: None)
        found = divergence.to_json()["kl_nats"]
        return found["mean"], found["error"]

    def _save_reference(self, chunks: Sequence[np.ndarray]) -> None:
        with closing(OurLogits(self._path)) as logits:
            rows = [log_softmax(logits.logits(chunk[:-1], 256)).astype(np.float16) for chunk in chunks]
            save_rows(self._reference, rows, logits.name, hash_ids(chunks))


def _recipe_of(name: str, has_importance: bool) -> Recipe:
    if name.startswith(_EVERYWHERE):
        return uniform_recipe(name.removeprefix(_EVERYWHERE), has_importance)
    return find_recipe(name, has_importance)


def _of_experts(table: Sensitivity) -> Sensitivity:
    return Sensitivity(table.label, tuple(unit for unit in table.units if "_exps." in unit.tensors[0]))


def read_rows(results: Path) -> list[Row]:
    """Of a file that may not be there."""
    return [Row(**json.loads(line)) for line in results.read_text().splitlines()] if results.is_file() else []


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line a type, each kind's divergence."""
    found = {(row.type, row.kind): row for row in rows}
    lines = ["| size of | MB | one type | experts mixed | all mixed |", "|---|--:|--:|--:|--:|"]
    for row in sorted((row for row in rows if row.kind == UNIFORM), key=lambda row: row.num_bytes):
        cells = [found.get((row.type, kind)) for kind in (UNIFORM, EXPERTS, ALL)]
        nats = " | ".join(f"{cell.kl_nats:.3f} ± {cell.kl_error:.3f}" if cell else "" for cell in cells)
        lines.append(f"| {row.type.upper()} | {row.num_bytes / 1e6:.1f} | {nats} |")
    return lines


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Divergence against size, a curve for each kind."""

    def on(figure) -> None:
        axes = figure.add_subplot()
        for colour, kind in zip(PALETTE, (UNIFORM, EXPERTS, ALL), strict=False):
            points = sorted((row.num_bytes / 1e6, row.kl_nats, row.type) for row in rows if row.kind == kind)
            joined = [point for point in points if kind != UNIFORM or not point[2].startswith(_EVERYWHERE)]
            axes.plot([size for size, _, _ in joined], [nats for _, nats, _ in joined], color=colour, label=kind)
            for size, nats, name in points:
                axes.plot(size, nats, "o", color=colour)
                if kind == UNIFORM:
                    axes.annotate(name.upper(), (size, nats), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="file, MB", ylabel="KL divergence, nats", yscale="log")
        axes.legend(frameon=False)

    save_figure(path, on)


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="The unquantized model, GGUF.")],
    sensitivity: Annotated[Path, typer.Option(help="Its table of sensitivities.")],
    results: Annotated[Path, typer.Option(help="Where each file's line is kept.")],
    types: Annotated[str, typer.Option(help="Types, by commas.")] = _TYPES,
    imatrix: Annotated[Path | None, typer.Option(help="Importance for all files; IQ1 and IQ2 types need one.")] = None,
    picture: Annotated[Path | None, typer.Option(help="The curves, .svg or .png.")] = None,
    chunks: Annotated[int, typer.Option(help="Chunks of 512 tokens that are scored.", min=1)] = 8,
) -> None:
    """Compare mixes with one type for all experts."""
    try:
        if picture:
            check_plotting(picture)
        importance = read_imatrix(imatrix) if imatrix else None
        mixes = Mixes(model, read_sensitivity(sensitivity), importance, results, chunks)
        for type_name in types.split(","):
            mixes.rows(type_name.strip(), {(row.type, row.kind): row for row in read_rows(results)})
        rows = read_rows(results)
        print("\n".join(table_lines(rows)))
        if picture:
            draw(picture, rows)
    except KimiLiteError as error:
        print(f"mix: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
