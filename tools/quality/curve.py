"""How much text calibration needs: the divergence of files against the chunks that they were calibrated on.

    python -m tools.texts texts
    python -m tools.quality.curve -m demo-bf16.gguf --calibrate texts/calibration.txt --results curve.jsonl \\
        --files tq1_0:calibrate,iq1_m:imatrix --calibration-chunks 8,24,96 --picture curve.svg

Routed experts get the type, the rest Q8_0. A file is `TYPE:KNOWS`: `imatrix`, encoded by the importance of columns,
`calibrate`, with error feedback from layer to layer. Scored are the novel and the held-out text of seven kinds that
`tools.quality` scores; no kind of the mixture is a novel. A line of JSON for each file is kept in `--results`: what is
there already is not measured again, and the model's own logits are kept next to it. A Markdown table comes last.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.engine.scoring import Estimate
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.calibrate.calibration import CalibrationText
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe
from kimi_lite.tools.plot import PALETTE, check_plotting, save_figure
from kimi_lite.tools.quality.table import Examiner

IMATRIX, CALIBRATE = "imatrix", "calibrate"
_FILES = "tq1_0:calibrate,iq1_m:imatrix,tq1_0:imatrix,iq1_m:calibrate"


@dataclass(frozen=True, slots=True)
class Point:
    """A file, by the chunks of 512 tokens that it was calibrated on. KL in nats: `novel` with its standard error, and
    the mean over held-out kinds."""

    type: str
    knows: str
    num_chunks: int
    num_bytes: int
    novel: float
    novel_error: float
    held_out: float


def measure(model: Path, text: Path, num_chunks: int, file: str, examiner: Examiner, folder: Path) -> Point:
    """`file`: TYPE:KNOWS. Raises KimiLiteError."""
    type_name, _, knows = file.partition(":")
    if knows not in (IMATRIX, CALIBRATE):
        raise KimiLiteError(f"{file!r} names no file.", f"Say TYPE:{IMATRIX} or TYPE:{CALIBRATE}.")
    recipe = find_recipe(type_name, has_importance=True)
    with closing(CalibrationText.open(model, text, num_chunks)) as calibration:
        help = {"importance": calibration.importance(model)} if knows == IMATRIX else {"calibration": calibration}
        path = convert(model, folder / "curve.gguf", recipe, is_overwriting=True, **help).path
    scores = examiner.score(path)
    novel = Estimate.of(scores.divergence.kl_nats)
    num_bytes = path.stat().st_size
    return Point(type_name, knows, num_chunks, num_bytes, novel.mean, novel.error, scores.held_out_kl_nats)


def read_points(results: Path) -> list[Point]:
    """Of a file that may not be there."""
    return [Point(**json.loads(line)) for line in results.read_text().splitlines()] if results.is_file() else []


def table_lines(points: Sequence[Point]) -> list[str]:
    """Markdown: a line a file; for each number of chunks the divergence on held-out kinds / on the novel."""
    counts = sorted({point.num_chunks for point in points})
    lines = ["| experts | knows | MB | " + " | ".join(f"{count} chunks" for count in counts) + " |"]
    lines.append("|---|---|" + "--:|" * (1 + len(counts)))
    files = {(point.type, point.knows): point.num_bytes for point in points}
    for (type_name, knows), num_bytes in sorted(files.items(), key=lambda item: (item[1], item[0])):
        found = {p.num_chunks: p for p in points if (p.type, p.knows) == (type_name, knows)}
        cells = [f"{p.held_out:.3f} / {p.novel:.3f}" if (p := found.get(count)) else "" for count in counts]
        lines.append(f"| {type_name.upper()} | {knows} | {num_bytes / 1e6:.1f} | {' | '.join(cells)} |")
    return lines


def draw(path: Path, points: Sequence[Point]) -> None:
    """Divergence against chunks: held-out kinds as lines, the novel dashed."""

    def on(figure) -> None:
        axes = figure.add_subplot()
        files = sorted({(point.type, point.knows) for point in points})
        for index, (type_name, knows) in enumerate(files):
            found = sorted(
                (p.num_chunks, p.held_out, p.novel) for p in points if (p.type, p.knows) == (type_name, knows)
            )
            counts, held_out, novel = zip(*found, strict=True)
            colour, label = PALETTE[index % len(PALETTE)], f"{type_name.upper()}, {knows}"
            axes.plot(counts, held_out, "o-", color=colour, label=f"{label}: seven held-out kinds")
            axes.plot(counts, novel, "o--", color=colour, alpha=0.7, label=f"{label}: a novel")
        axes.set(xlabel="chunks of 512 tokens for calibration", ylabel="KL divergence, nats", xscale="log")
        counts = sorted({point.num_chunks for point in points})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    save_figure(path, on)


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="The unquantized model, GGUF.")],
    calibrate: Annotated[Path, typer.Option(help="Text for importance and error feedback.", exists=True)],
    results: Annotated[Path, typer.Option(help="Where each file's line is kept.")],
    files: Annotated[str, typer.Option(help="TYPE:KNOWS, by commas; KNOWS is imatrix or calibrate.")] = _FILES,
    calibration_chunks: Annotated[str, typer.Option(help="Chunks of the calibration text, by commas.")] = "8,24,96",
    chunks: Annotated[int, typer.Option(help="Chunks of 512 tokens of the novel that are scored.", min=1)] = 8,
    picture: Annotated[Path | None, typer.Option(help="The curves, .svg or .png.")] = None,
) -> None:
    """Measure what more calibration text brings."""
    try:
        if picture:
            check_plotting(picture)
        done = {(f"{point.type}:{point.knows}", point.num_chunks) for point in read_points(results)}
        wanted = [(file.strip(), int(count)) for file in files.split(",") for count in calibration_chunks.split(",")]
        with tempfile.TemporaryDirectory(dir=results.parent) as folder:
            missing = [each for each in wanted if each not in done]
            examiner = Examiner(model, results.with_suffix(".safetensors"), chunks) if missing else None
            for file, count in missing:
                point = measure(model, calibrate, count, file, examiner, Path(folder))
                with results.open("a") as lines:
                    lines.write(json.dumps(asdict(point)) + "\n")
        points = read_points(results)
        print("\n".join(table_lines(points)))
        if picture:
            draw(picture, points)
    except KimiLiteError as error:
        print(f"curve: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
