"""Pictures of what the tools measured, by what the files hold. SVG or PNG, readable on light and dark pages.

    python -m tools.plot speed.svg bench.json                  speed against depth, with the limit and llama.cpp
    python -m tools.plot kernels.svg kernel_bench.txt          GB/s of each type and of a plain read
    python -m tools.plot quality.svg q8.txt q4.txt tq1.txt     file size against divergence from the reference
    python -m tools.plot timeline.svg trace.json               one token, stage by stage

The background is transparent and everything drawn is of middle brightness. Needs matplotlib: pip install
"kimi-lite[tools]".
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.errors import KimiLiteError

INK, _GRID = "#768390", "#76839055"
_OURS, _THEIRS, _BOUND = "#2f81f7", "#db6d28", "#2da44e"
PALETTE = (_OURS, _THEIRS, _BOUND, "#a371f7", "#d4a72c", "#e5534b", "#1b9e9e", "#bf4b8a")
_MAX_STAGES = 10
_SUFFIXES = (".svg", ".png")


def check_plotting(path: Path) -> None:
    """Raise KimiLiteError when a picture cannot be written: before the minutes of measuring, not after."""
    if path.suffix not in _SUFFIXES:
        raise KimiLiteError(f"{path} ends in {path.suffix!r}.", "Pictures are .svg or .png.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise KimiLiteError("Pictures need matplotlib.", 'Say: pip install "kimi-lite[tools]".') from error


def draw(path: Path, documents: Sequence[Mapping]) -> None:
    """Writes the picture of documents of one kind. Raises KimiLiteError for a kind that is unknown, or several."""
    kinds = {_kind(document) for document in documents}
    if len(kinds) != 1:
        raise KimiLiteError(f"The files are of {len(kinds)} kinds.", "Give results of one tool.")
    drawer = _DRAWERS[kinds.pop()]
    save_figure(path, lambda figure: drawer(figure, documents))


def save_figure(path: Path, draw_on: Callable) -> None:
    """Writes what `draw_on` draws on a matplotlib figure, in the colours of all pictures. Raises KimiLiteError."""
    check_plotting(path)
    import matplotlib

    style = {"svg.fonttype": "none", "svg.hashsalt": "kimi-lite", "font.family": "sans-serif", "font.size": 9}
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style | colours | {"grid.color": _GRID, "axes.grid": True, "axes.axisbelow": True}):
        from matplotlib.figure import Figure  # no pyplot: no window, no global state

        figure = Figure(figsize=(8, 3.6), layout="constrained")
        draw_on(figure)
        for axes in figure.axes:
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
        partial = path.with_name(path.name + ".partial")
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(partial, format=path.suffix[1:], transparent=True, dpi=160, metadata=metadata)
        partial.replace(path)


def read_any(path: Path) -> dict:
    """A tool's output, whose last line is JSON, or a trace. Raises KimiLiteError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8").strip().rpartition("\n")[2])
    except (OSError, ValueError) as error:
        raise KimiLiteError(
            f"{path}: {error}.", "Give what bench, kernel_bench or quality printed, or a trace."
        ) from error
    if not isinstance(document, dict) or _kind(document) not in _DRAWERS:
        raise KimiLiteError(f"{path} is of no kind that can be drawn.", f"There are: {', '.join(_DRAWERS)}.")
    return document


def _kind(document: Mapping) -> str:
    return "trace" if "traceEvents" in document else str(document.get("tool"))


def _draw_speed(figure, documents: Sequence[Mapping]) -> None:
    """Prompt and generation speed against depth; a line for each program and number of sequences."""
    results = [result for document in documents for result in document["results"]]
    panels = [kind for kind in ("pp", "tg") if any(result["kind"] == kind for result in results)]
    titles = {"pp": "reading a prompt", "tg": "generating"}
    for kind, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        lines = defaultdict(list)
        for result in (result for result in results if result["kind"] == kind):
            lines[result["program"], result["num_tokens"], result["num_sequences"]].append(result)
        for (program, num_tokens, batch), line in sorted(lines.items()):
            line.sort(key=lambda result: result["depth"])
            colour, marker = (_OURS if program == "kimi-lite" else _THEIRS), ("o" if batch == 1 else "s")
            label = f"{program} {kind}{num_tokens}" + (f" x{batch}" if batch > 1 else "")
            rates, errors = ([result["tok_s"][key] for result in line] for key in ("mean", "sd"))
            depths = [result["depth"] for result in line]
            axes.errorbar(depths, rates, errors, color=colour, marker=marker, markersize=4, capsize=2, label=label)
            if program == "kimi-lite" and line[0]["limit_share"]:
                bounds = [result["tok_s"]["mean"] / result["limit_share"] for result in line]
                axes.plot(
                    depths, bounds, "--", color=_BOUND, marker="_", label="memory's bound" if batch == 1 else None
                )
        axes.set(title=titles[kind], xlabel="tokens of context", ylabel="tokens/s")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, labelcolor=INK)


def _draw_kernels(figure, documents: Sequence[Mapping]) -> None:
    """GB/s of each type, the plain read as a line, and the share of it as a label."""
    report = documents[-1]
    types = sorted(report["types"].items(), key=lambda item: item[1]["gb_s"])
    figure.set_size_inches(8, max(2.5, 0.24 * len(types) + 1.2))
    axes = figure.subplots()
    names, rates = [name for name, _ in types], [result["gb_s"] for _, result in types]
    bars = axes.barh(names, rates, color=_OURS, height=0.7)
    axes.bar_label(
        bars,
        [f"{result['bandwidth_share']:.0%}" for _, result in types],
        label_type="center",
        color="white",
        fontsize=8,
    )
    axes.axvline(report["read_gb_s"], color=_BOUND, linestyle="--", label=f"plain read, {report['read_gb_s']:.1f} GB/s")
    theirs = [(name, r["gb_s"] * r["ggml_gweights_s"] / r["gweights_s"]) for name, r in types if r["ggml_gweights_s"]]
    if theirs:
        names, rates = zip(*theirs, strict=True)
        axes.plot(rates, names, "|", color=_THEIRS, markersize=11, markeredgewidth=2.5, label="llama.cpp")
    axes.set(xlabel=f"GB/s of weights, {report['threads']} threads")
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")


def _draw_quality(figure, documents: Sequence[Mapping]) -> None:
    """Divergence from the first reference of each run against the file's size."""
    axes = figure.subplots()
    for document in documents:
        if not document["references"]:
            raise KimiLiteError(
                f"{document['model']['file']} was measured without a reference.", "Use quality --reference."
            )
        kl, gigabytes = document["references"][0]["kl_nats"], document["model"]["file_bytes"] / 1e9
        axes.errorbar(gigabytes, kl["mean"], kl["error"], color=_OURS, marker="o", markersize=5, capsize=2)
        place = (gigabytes, kl["mean"])
        axes.annotate(
            document["model"]["file"].removesuffix(".gguf"), place, (6, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="file, GB", ylabel="KL divergence, nats", yscale="log")
    axes.margins(x=0.15, y=0.15)


def _draw_timeline(figure, documents: Sequence[Mapping]) -> None:
    """The last token of a trace: a row for each of the stages that take longest."""
    spans = [event for event in documents[-1]["traceEvents"] if event["ph"] == "X" and event["cat"] != "layer"]
    begins = [i for i, span in enumerate(spans) if span["name"] == "token_embd"]
    spans = spans[begins[-1] :]
    total = defaultdict(float)
    for span in spans:
        total[span["name"]] += span["dur"]
    stages = sorted(total, key=total.get, reverse=True)[:_MAX_STAGES]
    start, stop = spans[0]["ts"], spans[-1]["ts"] + spans[-1]["dur"]
    axes = figure.subplots()
    for row, stage in enumerate(stages):
        pieces = [((span["ts"] - start) / 1000, span["dur"] / 1000) for span in spans if span["name"] == stage]
        axes.broken_barh(pieces, (row - 0.35, 0.7), facecolor=PALETTE[row % len(PALETTE)])
    labels = [f"{stage}  {total[stage] / (stop - start):.0%}" for stage in stages]
    axes.set(yticks=range(len(stages)), yticklabels=labels, xlabel="ms of one token")
    axes.set_xlim(0, (stop - start) / 1000)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


_DRAWERS: Mapping[str, Callable] = {
    "kimi-lite bench": _draw_speed,
    "kernel_bench": _draw_kernels,
    "quality": _draw_quality,
    "trace": _draw_timeline,
}

app = typer.Typer(
    pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def main(
    picture: Annotated[Path, typer.Argument(help="The .svg or .png to write.")],
    files: Annotated[list[Path], typer.Argument(help="Outputs of one tool.", exists=True, dir_okay=False)],
) -> None:
    """Draw what bench, kernel_bench or quality printed, or a trace."""
    try:
        draw(picture, [read_any(path) for path in files])
    except KimiLiteError as error:
        print(f"plot: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app()
