"""`kimi-lite bench`: flags and what is written; measuring is in `tools.bench.bench`, imported when it begins."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kimi_lite.commandline.flags import with_options
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import require_writable
from kimi_lite.options import Options, Situation, unused_options

if TYPE_CHECKING:
    from kimi_lite.tools.bench.bench import Measured
    from kimi_lite.tools.bench.report import Report

_REGRESSED = 1  # exit code
_OTHERS = "llama.cpp", "ik_llama"  # programs to compare with


@with_options("bench")
def bench(
    options: Options,
    prompt: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt tokens, comma-separated; 0: none.")] = "512",
    generate: Annotated[str, typer.Option("-n", "--n-gen", help="Generated tokens, comma-separated; 0: none.")] = "128",
    depth: Annotated[str, typer.Option("-d", "--n-depth", help="Tokens of context before the clock starts.")] = "0",
    batch: Annotated[
        str | None,
        typer.Option(
            "-b", "-npl", "--sequences", help="Sequences at once, comma-separated. Default: 1; with --endpoint 1 to 32."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("-r", "--repetitions", help="Undisturbed warm runs.", min=1)] = 5,
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="The results on stdout.")
    ] = "md",
    sweep: Annotated[bool, typer.Option("--sweep", help="From the first depth to the last in steps of -p.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Random tokens instead of text.")] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Ask the system to forget the file before it is opened.")
    ] = False,
    compare_with: Annotated[
        str | None,
        typer.Option("--compare", help="llama.cpp, ik_llama or both, comma-separated: the same in turns."),
    ] = None,
    ik_library: Annotated[
        Path | None,
        typer.Option(
            "--ik-library",
            help="libllama.so of ik_llama.cpp built for this CPU; the wheel's has AVX2 code.",
            exists=True,
            dir_okay=False,
            resolve_path=True,
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a timeline by layer and stage.", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw speed against depth (.svg or .png).", dir_okay=False)
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="An earlier output: say which ratio fell, and exit with 1.", dir_okay=False),
    ] = None,
) -> None:
    """Measure tokens per second, next to the limit that memory bandwidth sets."""
    from kimi_lite.tools.bench.plan import plan_tests

    if options.endpoint:
        local = {"--sweep": sweep, "--random": random, "--cold": cold, "--compare": compare_with, "--trace": trace}
        _require_remote(local | {"--plot": plot, "--baseline": baseline, "--routing-trace": options.routing_trace})
        _bench_endpoint(options, (prompt, generate, depth, batch), repeats, output)
        return
    batch = batch or "1"
    tests = plan_tests(prompt, generate, depth, batch, sweep)
    for path, what in (
        (trace, "The timeline"),
        (plot, "The drawing"),
        (options.routing_trace, "The record of routing"),
    ):
        if path:
            require_writable(path, what)
    others = _parse_others(compare_with or "")
    if ik_library and "ik_llama" not in others:
        raise KimiLiteError("--ik-library is for a comparison.", "Add --compare ik_llama.")
    if "llama.cpp" in others:
        from kimi_lite.tools.bench.llama import import_llama_cpp

        import_llama_cpp()
    if plot:
        from kimi_lite.tools.plot import check_plotting

        check_plotting(plot)
    from kimi_lite.tools.bench import bench as work
    from kimi_lite.tools.bench.report import Report

    before = work.read_document(baseline) if baseline else None
    report = Report(sys.stdout if output == "md" else sys.stderr)
    job = work.Job(work.with_model(options), tuple(tests), repeats, random, sweep, others, ik_library, trace)
    if cold:
        work.forget_file(job, report)
    measured = work.bench(job, report)
    document = work.rounded(work.make_document(job, measured))
    if plot:
        from kimi_lite.tools.plot import draw

        draw(plot, [document])
    regressions = _check_baseline(before, document, report) if before else []
    _write(output, measured, document)
    if regressions:
        raise typer.Exit(_REGRESSED)


def _parse_others(text: str) -> tuple[str, ...]:
    """Names of other programs, each once."""
    others = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in others:
        if name not in _OTHERS:
            raise KimiLiteError(f"--compare does not know {name}.", f"It knows {' and '.join(_OTHERS)}.")
    return others


def _require_remote(local: Mapping[str, object]) -> None:
    """Refuses flags that only a model of our own can follow."""
    given = [flag for flag, value in local.items() if value]
    if given:
        raise KimiLiteError(f"{given[0]} measures a model in this process, not an endpoint.", f"Leave {given[0]} out.")


def _bench_endpoint(options: Options, tests: tuple[str, str, str, str | None], repeats: int, output: str) -> None:
    from kimi_lite.tools.bench import endpoint as work
    from kimi_lite.tools.bench.bench import rounded
    from kimi_lite.tools.bench.plan import plan_tests
    from kimi_lite.tools.bench.report import ENDPOINT_CSV_FIELDS, Report, write_csv

    prompt, generate, depth, batch = tests
    planned = plan_tests(prompt, generate, depth, batch or work.DEFAULT_BATCHES, is_sweep=False)
    report = Report(sys.stdout if output == "md" else sys.stderr)
    for line in unused_options(options, Situation(is_endpoint=True)):
        report.say(line)
    job = work.EndpointJob(options.endpoint, options.api_key, options.model, work.with_again(planned), repeats)
    measured = work.bench_endpoint(job, report)
    document = rounded(work.make_endpoint_document(job, measured))
    if output == "csv":
        write_csv(measured.results, sys.stdout, ENDPOINT_CSV_FIELDS)
        return
    _write_json(output, document)


def _check_baseline(before: dict, document: dict, report: "Report") -> list[str]:
    """Prints and returns what fell."""
    from kimi_lite.tools.bench.result import find_regressions, num_comparable

    found = find_regressions(before, document)
    report.say()
    for sentence in found:
        report.say(f"regression: {sentence}")
    if not found:
        report.say(
            f"no regression in {num_comparable(before, document)} ratios against {before['environment']['commit']}"
        )
    return found


def _write(output: str, measured: "Measured", document: dict) -> None:
    """The chosen form. The document ends JSON, and Markdown where that goes into a file: `--baseline` reads it."""
    if output == "csv":
        from kimi_lite.tools.bench.report import write_csv

        write_csv(measured.results, sys.stdout)
        return
    _write_json(output, document)


def _write_json(output: str, document: dict) -> None:
    if output == "jsonl":
        for result in document["results"]:
            print(json.dumps(result))
    if output != "md" or not sys.stdout.isatty():
        print(json.dumps(document))


app = typer.Typer(
    pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)
app.command()(bench)
