"""Tokens per second, in llama-bench's language, with the bound printed first. `kimi-lite bench` is this program.

    kimi-lite bench -m model.gguf -p 512 -n 128 -d 0,4096 -r 5
    kimi-lite bench -m model.gguf --compare llama.cpp --sweep -d 0,8192 -p 512 -n 32
    kimi-lite bench -m model.gguf -o json > before.json; ...; kimi-lite bench -m model.gguf --baseline before.json

`pp512` reads a prompt of 512 tokens, `tg128` generates 128, `@ d4096` does so after 4,096 tokens of context. The prompt
is natural text, because random tokens choose other experts; generation is greedy and does not stop. The first run of
each test is shown apart: it finds code, page tables or the page cache cold. The last line on stdout is always one JSON
document (tools/data/bench.schema.json).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware import speed as hardware_speed
from kimi_lite.native.cpu.threads import Team
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.types import Plan
from kimi_lite.plan.view import verdict_line
from kimi_lite.tools.bench.environment import describe_environment, describe_model, drop_page_cache
from kimi_lite.tools.bench.measure import read_stolen_s
from kimi_lite.tools.bench.ours import Ours, Runner
from kimi_lite.tools.bench.plan import BenchTest, Passages, context_needed, load_tokens, plan_tests
from kimi_lite.tools.bench.report import Report, write_csv
from kimi_lite.tools.bench.result import Result, Spread, compare, find_regressions, make_result, num_comparable
from kimi_lite.tools.bench.roofline import RAM, Bandwidth, Ceiling, find_ceilings, measure_bandwidth
from kimi_lite.tools.bench.run import measure_test
from kimi_lite.tools.plot import check_plotting, draw
from kimi_lite.units import parse_size

_REGRESSED = 1  # exit code
_TRACED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Options:
    """What the flags say."""

    model: Path
    tests: tuple[BenchTest, ...]
    num_repeats: int
    load: Options
    is_random: bool
    is_sweep: bool
    compares: bool
    trace: Path | None

    @property
    def traced(self) -> BenchTest:
        """What a trace shows: a few tokens at the greatest depth."""
        return BenchTest("tg", _TRACED_TOKENS, max(test.depth for test in self.tests))


Row = tuple[Result, Result | None, Spread | None]  # ours, llama.cpp's, ratio


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was found, before it is printed or written."""

    plan: Plan
    bandwidth: Bandwidth
    ceilings: Sequence[Ceiling]
    rows: Sequence[Row]
    environment: dict
    model: dict
    stolen_s: float

    @property
    def results(self) -> list[Result]:
        return [result for ours, theirs, _ in self.rows for result in (ours, theirs) if result]


def bench(options: Options, report: Report) -> Measured:
    """Print the bound, measure, print the results."""
    stolen_s = read_stolen_s()
    with ExitStack() as stack:
        tests = [*options.tests, *[options.traced] * bool(options.trace)]
        ours = Ours(options.model, tests, options.load)
        stack.callback(ours.close)
        if options.trace and ours.is_on_gpu:
            problem = "--trace shows the CPU path, and this model runs on a GPU."
            raise KimiLiteError(problem, "Try python -m tools.trace, or --device cpu.")
        num_threads = ours.num_threads
        environment, model = describe_environment(num_threads), describe_model(ours.store, ours.config)
        report.print_machine(environment, model)
        with closing(Team(num_threads)) as team:
            bandwidth = measure_bandwidth(team)
        hardware = hardware_speed.measured(ours.plan.hardware, ram=1e9 * bandwidth.gb_s)
        plan = make_plan(ours.plan.sizes, hardware, ours.plan.limits)
        report.print_plan(plan)
        ceilings = find_ceilings(plan, options.tests)
        report.print_roofline(bandwidth, ceilings)
        runners = {ours.name: ours.run}
        if options.compares:
            llama = _open_llama(ours.store.path, options.tests, num_threads)
            stack.callback(llama.close)
            runners[llama.name] = llama.run
        longest = max(test.context_tokens for test in options.tests)
        passages = Passages(load_tokens(ours.tokenizer, options.is_random, longest))
        rows = _measure(options, runners, passages, num_threads, {c.test: c for c in ceilings}, report)
        if options.trace:
            _trace(ours, options.traced, passages, options.trace, report)
    return Measured(plan, bandwidth, ceilings, rows, environment, model, round(read_stolen_s() - stolen_s, 2))


def _open_llama(path: Path, tests: Sequence[BenchTest], num_threads: int):
    from kimi_lite.tools.bench.llama import Llama

    return Llama(path, num_threads, context_needed(tests), max(test.num_sequences for test in tests))


def _measure(
    options: Options,
    runners: Mapping[str, Runner],
    passages: Passages,
    num_threads: int,
    ceilings: Mapping[BenchTest, Ceiling],
    report: Report,
) -> list[Row]:
    """A line for each test as soon as it is known."""
    rows = []
    report.begin_results()
    for test in options.tests:
        samples = measure_test(test, runners, passages, options.num_repeats, num_threads)
        results = [make_result(test, name, each, ceilings.get(test)) for name, each in samples.items()]
        report.print_result(results[0])
        ratio = compare(*samples.values()) if len(samples) > 1 else None
        rows.append((results[0], results[1] if len(results) > 1 else None, ratio))
    report.end_results([row[0] for row in rows])
    if options.is_sweep:
        report.print_sweep([row[0] for row in rows])
    if options.compares:
        report.print_comparison(rows)
    return rows


def _trace(ours: Ours, test: BenchTest, passages: Passages, path: Path, report: Report) -> None:
    """Writes the timeline and prints where the time goes."""
    from kimi_lite.tools.trace.trace import Tracer, stage_table, write_chrome_trace

    tracer = Tracer(ours.transformer)
    prompts = passages.prompts(test)
    ours.run(test, prompts)  # the prefix is in the cache from now on
    with tracer.attached():
        ours.run(test, prompts)
    spans = tracer.spans()
    num_passes = sum(span.stage == "output" for span in spans)
    write_chrome_trace(path, spans)
    report.say(f"\nwhere the time of a token goes, {test.name}; timeline in {path} (chrome://tracing, ui.perfetto.dev)")
    for line in stage_table(spans, num_passes):
        report.say(line)


def make_document(options: Options, measured: Measured) -> dict:
    """The JSON document; see tools/data/bench.schema.json."""
    return {
        "tool": "kimi-lite bench",
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": measured.environment,
        "model": measured.model,
        "plan": verdict_line(measured.plan),
        "memory_plan": measured.plan.to_json(),
        "text": "random" if options.is_random else "emma.txt",
        "num_repeats": options.num_repeats,
        "bandwidth": {
            "gb_s": {RAM: measured.bandwidth.gb_s},
            "is_noisy": measured.bandwidth.is_noisy,
            "stolen_share": measured.bandwidth.stolen_share,
        },
        "ceilings": [
            {
                "test": ceiling.test.name,
                "bytes_by_place": dict(ceiling.bytes_by_place),
                "resident_bytes": ceiling.resident_bytes,
                "expert_bytes": ceiling.expert_bytes,
                "cache_bytes": ceiling.cache_bytes,
                "tok_s": ceiling.tok_s,
            }
            for ceiling in measured.ceilings
        ],
        "results": [result.to_json() for result in measured.results],
        "comparison": [
            {"test": ours.test.name, "other": theirs.program, "ratio": ratio_json(ratio)}
            for ours, theirs, ratio in measured.rows
            if theirs and ratio
        ],
        "stolen_s": measured.stolen_s,
    }


def rounded(value):
    """The document with six significant digits: the line is long enough."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def ratio_json(ratio: Spread) -> dict:
    return {"mean": ratio.mean, "sd": ratio.sd, "samples": list(ratio.samples)}


def read_document(path: Path) -> dict:
    """The last line of what `bench` printed. Raises KimiLiteError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8").strip().rpartition("\n")[2])
    except (OSError, ValueError) as error:
        raise KimiLiteError(f"{path}: {error}.", "Give a file with what `kimi-lite bench` printed.") from error
    if not isinstance(document, dict) or (document.get("tool"), document.get("schema")) != ("kimi-lite bench", 1):
        raise KimiLiteError(f"{path} does not end in the JSON of kimi-lite bench.", "Give a file with what it printed.")
    return document


app = typer.Typer(
    pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def main(
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="GGUF file, first shard or folder. Default: demo.")
    ] = None,
    prompt: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt tokens, comma-separated; 0: none.")] = "512",
    generate: Annotated[str, typer.Option("-n", "--n-gen", help="Generated tokens, comma-separated; 0: none.")] = "128",
    depth: Annotated[str, typer.Option("-d", "--n-depth", help="Tokens of context before the clock starts.")] = "0",
    batch: Annotated[str, typer.Option("-b", "--sequences", help="Sequences at once, comma-separated.")] = "1",
    repeats: Annotated[int, typer.Option("-r", "--repetitions", help="Undisturbed warm runs.", min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", help="CPU threads. Default: all cores.", min=1)
    ] = None,
    kv_dtype: Annotated[
        Literal["f16", "bf16", "q8", "f32"], typer.Option("--kv-dtype", help="Numbers in the cache.")
    ] = "f16",
    ram: Annotated[
        str | None, typer.Option("--ram", help="Memory it may take; experts beyond it stay on disk.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda or cpu. Default: the GPU where one can be used.")
    ] = None,
    vram: Annotated[str | None, typer.Option("--vram", help="VRAM it may take, never exceeded.")] = None,
    record_routing: Annotated[
        Path | None, typer.Option("--record-routing", help="Write which experts were chosen.")
    ] = None,
    cache_bias: Annotated[
        float, typer.Option("--cache-bias", help="Prefer experts in RAM among near-equals.", min=0)
    ] = 0.0,
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="The results on stdout.")
    ] = "md",
    sweep: Annotated[bool, typer.Option("--sweep", help="From the first depth to the last in steps of -p.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Random tokens instead of text.")] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Ask the system to forget the file before it is opened.")
    ] = False,
    compare_with: Annotated[
        Literal["llama.cpp"] | None, typer.Option("--compare", help="The same through llama-cpp-python, in turns.")
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
    """Measure tokens per second: roofline, prompt and generation speed, llama.cpp beside it."""
    tests = plan_tests(prompt, generate, depth, batch, sweep)
    if compare_with:
        from kimi_lite.tools.bench.llama import import_llama_cpp

        import_llama_cpp()
    if plot:
        check_plotting(plot)
    before = read_document(baseline) if baseline else None
    report = Report(sys.stdout if output == "md" else sys.stderr)
    path = model or _demo_path()
    if cold and not drop_page_cache(GGUFStore.open(path).shards):
        report.say("this system cannot be asked to forget files: first runs may not be cold")
    load = Options(
        num_threads=threads,
        kv_dtype=kv_dtype,
        ram_bytes=parse_size(ram, "--ram") if ram else None,
        device=device,
        vram_bytes=parse_size(vram, "--vram") if vram else None,
        routing_trace=record_routing,
        cache_bias=cache_bias,
    )
    options = Options(path, tuple(tests), repeats, load, random, sweep, compare_with is not None, trace)
    measured = bench(options, report)
    document = rounded(make_document(options, measured))
    if plot:
        draw(plot, [document])
    regressions = _check_baseline(before, document, report) if before else []
    _write(output, measured, document)
    if regressions:
        raise typer.Exit(_REGRESSED)


def _check_baseline(before: dict, document: dict, report: Report) -> list[str]:
    """Prints and returns what fell."""
    found = find_regressions(before, document)
    report.say()
    for sentence in found:
        report.say(f"regression: {sentence}")
    if not found:
        report.say(
            f"no regression in {num_comparable(before, document)} ratios against {before['environment']['commit']}"
        )
    return found


def _write(output: str, measured: Measured, document: dict) -> None:
    """The chosen form, then the document as the last line."""
    if output == "csv":
        write_csv(measured.results, sys.stdout)
    if output == "jsonl":
        for result in document["results"]:
            print(json.dumps(result))
    print(json.dumps(document))


def _demo_path() -> Path:
    from kimi_lite.demo.build import ensure_demo_model

    return ensure_demo_model()
