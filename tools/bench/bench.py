"""Tokens per second, in llama-bench's language, with the bound printed first. `kimi-lite bench` is this program.

    kimi-lite bench -m model.gguf -p 512 -n 128 -d 0,4096 -r 5
    kimi-lite bench -m model.gguf --compare llama.cpp --sweep -d 0,8192 -p 512 -n 32
    kimi-lite bench -m model.gguf --compare ik_llama -p 32,128,512,2048 -n 64 -npl 1,2,4,8
    kimi-lite bench -m model.gguf -o json > before.json; ...; kimi-lite bench -m model.gguf --baseline before.json

`pp512` reads a prompt of 512 tokens, `tg128` generates 128, `@ d4096` does so after 4,096 tokens of context. The prompt
is natural text, because random tokens choose other experts; generation is greedy and does not stop. The first run of
each test is shown apart: it finds code, page tables or the page cache cold. JSON (`-o json`, `jsonl`, and Markdown that
is not for a terminal) ends in one document (tools/data/bench.schema.json).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kimi_lite.apps.model_path import find_model
from kimi_lite.apps.progress import LoadProgress
from kimi_lite.engine.planning import situation_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware import speed as hardware_speed
from kimi_lite.native.cpu.placement import place_threads
from kimi_lite.native.cpu.threads import Team
from kimi_lite.options import Options, unused_options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.types import Plan
from kimi_lite.plan.view import verdict_line
from kimi_lite.terminal import Console
from kimi_lite.tools.bench.environment import describe_environment, describe_model, drop_page_cache
from kimi_lite.tools.bench.measure import read_stolen_s
from kimi_lite.tools.bench.ours import Ours, Runner
from kimi_lite.tools.bench.plan import BenchTest, Passages, context_needed, load_tokens
from kimi_lite.tools.bench.report import Report
from kimi_lite.tools.bench.result import Result, Spread, compare, make_result
from kimi_lite.tools.bench.roofline import RAM, Bandwidth, Limit, find_limits, measure_bandwidth
from kimi_lite.tools.bench.run import measure_test

if TYPE_CHECKING:
    from kimi_lite.tools.bench.ik_llama import IkLlama
    from kimi_lite.tools.bench.llama import Llama

OURS = Ours.name
_IMAGES = 3  # at most: K2.5's tower takes seconds
_TRACED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured."""

    options: Options  # of the model
    tests: tuple[BenchTest, ...]
    num_repeats: int
    is_random: bool
    is_sweep: bool
    others: tuple[str, ...]  # programs to compare with: llama.cpp, ik_llama
    ik_library: Path | None
    trace: Path | None

    @property
    def traced(self) -> BenchTest:
        """What a trace shows: a few tokens at the greatest depth."""
        return BenchTest("tg", _TRACED_TOKENS, max(test.depth for test in self.tests))


class Row(NamedTuple):
    """A test: our result, and each other program's with the ratio of our speed to it."""

    ours: Result
    others: Sequence[tuple[Result, Spread]]


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was found, before it is printed or written."""

    plan: Plan
    bandwidth: Bandwidth
    limits: Sequence[Limit]
    rows: Sequence[Row]
    environment: dict
    model: dict
    stolen_s: float
    others: Mapping[str, str]  # programs compared with, and what they are: version, code
    image: dict | None = None  # by the vision tower

    @property
    def results(self) -> list[Result]:
        return [result for row in self.rows for result in (row.ours, *(theirs for theirs, _ in row.others))]


def bench(job: Job, report: Report) -> Measured:
    """Print the bound, measure, print the results."""
    stolen_s = read_stolen_s()
    with ExitStack() as stack:
        tests = [*job.tests, *[job.traced] * bool(job.trace)]
        ours = Ours(tests, job.options)
        stack.callback(ours.close)
        if job.trace and ours.is_on_gpu:
            problem = "--trace shows the CPU path, and this model runs on a GPU."
            raise KimiLiteError(problem, "Try python -m tools.trace, or --device cpu.")
        for line in unused_options(job.options, situation_of(ours.plan, job.options)):
            report.say(line)
        num_threads = ours.num_threads
        environment, model = describe_environment(num_threads), describe_model(ours.store, ours.config)
        report.print_machine(environment, model)
        groups = place_threads(num_threads) if job.options.numa != "off" else ()
        with closing(Team(num_threads, groups)) as team:
            bandwidth = measure_bandwidth(team)
        hardware = hardware_speed.measured(ours.plan.hardware, ram=1e9 * bandwidth.gb_s)
        plan = make_plan(ours.plan.sizes, hardware, ours.plan.limits)
        report.print_plan(plan)
        limits = find_limits(plan, job.tests)
        report.print_roofline(bandwidth, limits)
        runners, described = {ours.name: ours.run}, {}
        for name in job.others:
            other = _open_other(name, job, ours.store.path, num_threads)
            stack.callback(other.close)
            runners[other.name] = other.run
            described[other.name] = other.description
            report.say(f"other  {other.description}")
        longest = max(test.context_tokens for test in job.tests)
        passages = Passages(load_tokens(ours.tokenizer, job.is_random, longest))
        rows = _measure(job, runners, passages, num_threads, {c.test: c for c in limits}, report)
        image = _measure_image(ours, job.num_repeats, report)
        if job.trace:
            _trace(ours, job.traced, passages, job.trace, report)
    stolen_s = round(read_stolen_s() - stolen_s, 2)
    return Measured(plan, bandwidth, limits, rows, environment, model, stolen_s, described, image)


def _measure_image(ours: Ours, num_repeats: int, report: Report) -> dict | None:
    """What the vision tower takes for a screenshot, where the model has one."""
    if ours.engine.vision is None:
        return None
    from kimi_lite.tools.bench.vision import SCREENSHOT, time_image

    seconds, bound_s = time_image(ours.engine.vision.tower, SCREENSHOT, ours.num_threads, min(num_repeats, _IMAGES))
    share = f", {100 * bound_s / seconds:.0f} % of what the arithmetic allows" if bound_s else ""
    report.say(f"image 1024 x 768, {SCREENSHOT.num_tokens():,} tokens: {seconds:.2f} s{share}")
    return {"tokens": SCREENSHOT.num_tokens(), "seconds": seconds, "bound_s": bound_s}


def _open_other(name: str, job: Job, path: Path, num_threads: int) -> "Llama | IkLlama":
    sizes = num_threads, context_needed(job.tests), max(test.num_sequences for test in job.tests)
    if name == "llama.cpp":
        from kimi_lite.tools.bench.llama import Llama

        return Llama(path, *sizes)
    from kimi_lite.tools.bench.ik_llama import IkLlama

    return IkLlama(path, *sizes, library=job.ik_library)


def _measure(
    job: Job,
    runners: Mapping[str, Runner],
    passages: Passages,
    num_threads: int,
    limits: Mapping[BenchTest, Limit],
    report: Report,
) -> list[Row]:
    """A line for each test as soon as it is known."""
    rows = []
    report.begin_results()
    for test in job.tests:
        samples = measure_test(test, runners, passages, job.num_repeats, num_threads)
        ours, *others = (make_result(test, name, each, limits.get(test)) for name, each in samples.items())
        report.print_result(ours)
        rows.append(Row(ours, [(result, compare(samples[OURS], samples[result.program])) for result in others]))
    report.end_results([row.ours for row in rows])
    if job.is_sweep:
        report.print_sweep([row.ours for row in rows])
    for others in zip(*(row.others for row in rows), strict=True):
        report.print_comparison([(row.ours, *other) for row, other in zip(rows, others, strict=True)])
    return rows


def _trace(ours: Ours, test: BenchTest, passages: Passages, path: Path, report: Report) -> None:
    """Writes the timeline and prints where the time goes."""
    from kimi_lite.tools.trace.trace import Tracer, stage_table, write_chrome_trace

    tracer = Tracer(ours.engine.model)
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


def make_document(job: Job, measured: Measured) -> dict:
    """The JSON document; see tools/data/bench.schema.json."""
    return {
        "tool": "kimi-lite bench",
        "schema": 2,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": measured.environment,
        "model": measured.model,
        "plan": verdict_line(measured.plan),
        "memory_plan": measured.plan.to_json(),
        "text": "random" if job.is_random else "emma.txt",
        "num_repeats": job.num_repeats,
        "others": dict(measured.others),
        "image": measured.image,
        "bandwidth": {
            "gb_s": {RAM: measured.bandwidth.gb_s},
            "is_noisy": measured.bandwidth.is_noisy,
            "stolen_share": measured.bandwidth.stolen_share,
        },
        "limits": [
            {
                "test": limit.test.name,
                "bytes_by_place": dict(limit.bytes_by_place),
                "resident_bytes": limit.resident_bytes,
                "expert_bytes": limit.expert_bytes,
                "cache_bytes": limit.cache_bytes,
                "expected_tok_s": limit.expected_tok_s,
                "limit_tok_s": limit.limit_tok_s,
            }
            for limit in measured.limits
        ],
        "results": [result.to_json() for result in measured.results],
        "comparison": [
            {"test": row.ours.test.name, "other": theirs.program, "ratio": ratio_json(ratio)}
            for row in measured.rows
            for theirs, ratio in row.others
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
    if not isinstance(document, dict) or (document.get("tool"), document.get("schema")) != ("kimi-lite bench", 2):
        raise KimiLiteError(f"{path} does not end in the JSON of kimi-lite bench.", "Give a file with what it printed.")
    return document


def with_model(options: Options) -> Options:
    """With the path of the model that is named, or of the demo."""
    with LoadProgress(Console(stderr=True)) as progress:
        return replace(options, model=str(find_model(options, progress)))


def forget_file(job: Job, report: Report) -> None:
    """Ask the system to forget the model's pages."""
    if not drop_page_cache(GGUFStore.open(job.options.model).shards):
        report.say("this system cannot be asked to forget files: first runs may not be cold")
