"""What a swarm gains on one machine: agents at once against one after the other, and experts read per token.

    python -m tools.bench.swarm agents                    # the demo, 8 agents
    python -m tools.make.slice slice.gguf --layers 1+2
    python -m tools.bench.swarm experts -m slice.gguf     # 1, 2, 4, 8 agents

`agents` runs a swarm with a fixed plan: all agents have a context in common and a task of their own, and say so many
tokens. Two things can make it faster than one agent after the other, and each is switched off by itself: agents at once
(a batch) or in turn, and prompts that begin alike (their pages are shared) or apart (a few words before them are
different). The four are timed in turns; disturbed turns are dropped, as in `tools.bench.run`.

`experts` decodes with 1, 2, 4, 8 sequences and records which experts each token chose. A step reads the union of its
tokens' choices, so a token costs less the more of them agree. Next to what was read stands what to expect: if every
token chose as one alone does, but independently of the others; and if all experts were chosen alike.
"""

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kimi_lite.apps.swarm.backend import Backend, ChatSettings, Message, OnProgress, Reply
from kimi_lite.apps.swarm.events import Emitter
from kimi_lite.apps.swarm.local import LocalBackend
from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.apps.swarm.replay import Replay
from kimi_lite.apps.swarm.run import Assignment, SwarmRun
from kimi_lite.apps.swarm.settings import SwarmSettings
from kimi_lite.apps.swarm.toolshed import Toolshed
from kimi_lite.arch.costs import expected_expert_share
from kimi_lite.arch.tensors import open_model
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.scoring import TEXT
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.recorder import RoutingTrace, read_trace
from kimi_lite.options import Options
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.tools.bench.bench import with_model
from kimi_lite.tools.bench.environment import describe_environment
from kimi_lite.tools.bench.ours import Run
from kimi_lite.tools.bench.plan import BenchTest
from kimi_lite.tools.bench.report import spread
from kimi_lite.tools.bench.result import Spread
from kimi_lite.tools.bench.run import Samples, measure_test

_SUBJECTS = ("Emma", "Mr. Knightley", "Harriet", "Miss Bates", "Mr. Elton", "Jane", "Frank Churchill", "the father")
_TEMPLATE_CHARACTERS = 2400  # system prompts of the swarm, the template, the task
_MOST_CHARACTERS = 16  # of a token, in the mean
_PROMPT_TOKENS = 32  # of `experts`
_DRAWS = 400  # of tokens that choose independently


@dataclass(frozen=True, slots=True)
class Mode:
    """How a swarm is run. `in turn, apart` is what one agent after the other costs where nothing is kept."""

    is_at_once: bool
    is_shared: bool

    @property
    def name(self) -> str:
        return f"{'at once' if self.is_at_once else 'in turn'}, {'shared' if self.is_shared else 'apart'}"


MODES = tuple(Mode(is_at_once, is_shared) for is_at_once in (False, True) for is_shared in (False, True))
SLOWEST, FASTEST = MODES[0].name, MODES[-1].name


@dataclass(frozen=True, slots=True)
class SwarmRound(Run):
    """One run of the swarm."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    cpu_s: float = 0.0  # of this process: with one thread, what it takes on a machine that does nothing else


class Marked:
    """A backend whose prompts begin with a mark, one for the run or one for each agent: nothing is in the cache from
    an earlier run, and agents share no page where they are to have none in common."""

    def __init__(self, backend: Backend, mark: int, is_shared: bool) -> None:
        self._backend, self._mark, self._is_shared = backend, mark, is_shared

    @property
    def name(self) -> str:
        return self._backend.name

    @property
    def identity(self) -> str:
        return self._backend.identity

    @property
    def can_call(self) -> bool:
        return self._backend.can_call

    async def open(self) -> None:
        """It is open."""

    async def close(self) -> None:
        """Its owner closes it."""

    async def chat(
        self, messages: Sequence[Message], tools: Sequence[Message], settings: ChatSettings, on_progress: OnProgress
    ) -> Reply:
        number = 0 if self._is_shared else 1 + int(settings.agent_id.removeprefix("a"))
        first, *rest = messages
        marked = {**first, "content": f"[{10_000 * self._mark + number:09d}] {first['content']}"}
        return await self._backend.chat([marked, *rest], tools, settings, on_progress)


class SwarmBench:
    """A loaded model and a plan for so many agents."""

    def __init__(self, options: Options, num_agents: int, context_tokens: int, num_tokens: int) -> None:
        self.num_agents, self._num_tokens = num_agents, num_tokens
        text = " ".join(TEXT.read_text(encoding="utf-8").split())
        tokenizer = Tokenizer.from_metadata(open_model(options.model)[0].metadata)
        context = tokenizer.decode(tokenizer.encode(text[: _MOST_CHARACTERS * context_tokens])[:context_tokens])
        need = context_tokens + len(tokenizer.encode(text[:_TEMPLATE_CHARACTERS])) + num_tokens
        options = replace(options, context_length=need, num_sequences=num_agents, prefix_folder=None)
        self._plan = plan_for(num_agents, context)
        self._runner = asyncio.Runner()
        self._engine = load(options.model, options)
        self.num_threads = self._engine.plan.num_threads
        self._backend = LocalBackend(lambda on_loading: self._engine)
        self._runner.run(self._backend.open())
        self._marks = itertools.count(1)

    @property
    def name(self) -> str:
        return self._backend.name

    def close(self) -> None:
        self._runner.run(self._backend.close())
        self._runner.close()

    def run(self, mode: Mode) -> SwarmRound:
        """One run of the swarm, from its first question to its last answer."""
        with tempfile.TemporaryDirectory() as folder:
            return self._runner.run(self._run(mode, Path(folder)))

    async def _run(self, mode: Mode, folder: Path) -> SwarmRound:
        settings = SwarmSettings(max_parallel=self.num_agents if mode.is_at_once else 1)
        sampling = SamplingParams(max_tokens=self._num_tokens, ignore_eos=True, seed=1)
        answer = AnswerSettings(is_thinking=False, temperature=1.0, sampling=sampling)
        emitter, began_cpu_s = Emitter([]), time.process_time()
        toolshed = Toolshed(emitter, folder, self._plan.permissions, None, None)
        try:
            assignment = Assignment("bench", "", settings, answer, self._plan.permissions, self._plan)
            backend = Marked(self._backend, next(self._marks), mode.is_shared)
            ended = await SwarmRun(assignment, backend, toolshed, emitter, Replay()).run()
        finally:
            toolshed.close()
        totals = ended.totals
        if totals.usage.generated_tokens < self.num_agents:
            raise KimiLiteError(f"The swarm ended with {ended.outcome}: {ended.reason or ended.answer[:200]}")
        usage = totals.usage
        cpu_s = time.process_time() - began_cpu_s
        return SwarmRound(
            seconds=totals.seconds,
            num_tokens=usage.generated_tokens,
            first_token_s=0.0,
            gaps_s=(),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            cpu_s=cpu_s,
        )


def plan_for(num_agents: int, context: str) -> Plan:
    """One stage of agents that have a text in common, and no tools."""
    subjects = itertools.islice(itertools.cycle(_SUBJECTS), num_agents)
    tasks = [
        {"agent": "reader", "prompt": f"{i + 1}. Write what the text says of {subject}."}
        for i, subject in enumerate(subjects)
    ]
    agents = {"reader": {"system_prompt": "You read closely.", "tools": []}}
    document = {"context": context, "synthesis": False, "agents": agents, "stages": [{"tasks": tasks}]}
    return Plan.from_document(document, "of tools.bench.swarm")


def compare_modes(bench: SwarmBench, num_repeats: int, num_tokens: int) -> dict[str, Samples]:
    """Every mode, in turns; stderr says each one's seconds as it ends."""

    def run(mode: Mode) -> SwarmRound:
        done = bench.run(mode)
        said = f"{done.seconds:.2f} s, CPU {done.cpu_s:.2f} s, {done.cached_tokens:,} cached"
        print(f"{mode.name}: {said}", file=sys.stderr, flush=True)
        return done

    runners = {mode.name: lambda test, prompts, mode=mode: run(mode) for mode in MODES}
    test = BenchTest("tg", num_tokens, num_sequences=bench.num_agents)
    return measure_test(test, runners, _Nothing(), num_repeats, bench.num_threads)


class _Nothing:
    """Where `measure_test` asks for prompts: the plan has its own."""

    def prompts(self, test: BenchTest) -> list[Any]:
        return []


def speed_ups(samples: Mapping[str, Samples]) -> dict[str, Spread]:
    """Of each mode over one agent after the other with nothing in common, turn by turn."""
    seconds = {name: np.array([sample.run.seconds for sample in each.warm]) for name, each in samples.items()}
    return {name: Spread.of(seconds[SLOWEST] / each) for name, each in seconds.items()}


# Experts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpertsRead:
    """With so many sequences in each step. Experts are per layer and token."""

    num_sequences: int
    experts_per_token: float  # measured: the union of each step over its tokens
    predicted: float  # tokens that choose as one alone does, independently
    uniform: float  # tokens that choose any expert alike, independently
    tok_s: float  # of all sequences
    num_steps: int


def read_experts(options: Options, counts: Sequence[int], num_tokens: int) -> list[ExpertsRead]:
    """Decodes with each number of sequences; the record of routing says what was read."""
    _, config = open_model(options.model)
    if not config.num_moe_layers:
        raise KimiLiteError(f"{config.name} has no routed experts.", "Name another model with -m.")
    if num_tokens <= max(counts):  # the first comes with the prompt
        raise KimiLiteError(
            f"The prediction for {max(counts)} sequences draws from {num_tokens} tokens of one sequence alone.",
            f"Give -n more than {max(counts)}.",
        )
    context = _PROMPT_TOKENS + num_tokens + 1
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "routing.npz"
        found = replace(
            options, context_length=context, num_sequences=max(counts), prefix_folder=None, routing_trace=record
        )
        with _opened(found) as engine:
            rates = {count: _decode(engine, count, num_tokens) for count in counts}
        trace = read_trace(record)
    alone = _steps(trace, 1)
    return [
        ExpertsRead(
            count,
            measured_union(trace, count) / count,
            predicted_union(trace, alone, count) / count,
            expected_expert_share(config, count) * config.num_experts / count,
            rates[count],
            len(_steps(trace, count)),
        )
        for count in counts
    ]


@contextmanager
def _opened(options: Options) -> Iterator[Engine]:
    engine = load(options.model, options)
    try:
        yield engine
    finally:
        engine.close()


def _decode(engine: Engine, count: int, num_tokens: int) -> float:
    """Tokens/s of so many sequences, each with a prompt of its own. Sampled: a model of random weights that is greedy
    says one word for ever."""
    rng = np.random.default_rng(count)
    vocab = min(engine.plan.sizes.config.vocab_size, engine.tokenizer.vocab_size)
    requests = [
        Request(
            f"{count} {i}",
            tuple(rng.integers(0, vocab, _PROMPT_TOKENS).tolist()),
            SamplingParams(temperature=1.0, seed=100 * count + i, max_tokens=num_tokens, ignore_eos=True),
            is_plain=True,
        )
        for i in range(count)
    ]
    arrivals_s: dict[str, list[float]] = {request.id: [] for request in requests}
    for token in engine.generate(requests):
        if token.id is not None:
            arrivals_s[token.request_id].append(time.perf_counter())
    begin_s = max(times[0] for times in arrivals_s.values())
    end_s = min(times[-1] for times in arrivals_s.values())
    together = sum(begin_s < moment <= end_s for times in arrivals_s.values() for moment in times)
    return together / (end_s - begin_s) if end_s > begin_s else 0.0


def _steps(trace: RoutingTrace, num_tokens: int) -> np.ndarray:
    """The passes of so many tokens: int64 (steps, num_tokens), places in the trace."""
    begins = trace.starts[:-1][np.diff(trace.starts) == num_tokens]
    return begins[:, None] + np.arange(num_tokens)


def measured_union(trace: RoutingTrace, num_tokens: int) -> float:
    """Different experts of a step of so many tokens, mean over steps and layers."""
    return _mean_union(trace, _steps(trace, num_tokens))


def predicted_union(trace: RoutingTrace, alone: np.ndarray, num_tokens: int) -> float:
    """The same for different tokens that were recorded alone, drawn independently. `alone`: their places, (tokens, 1),
    at least as many."""
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(alone[:, 0], num_tokens, replace=False) for _ in range(_DRAWS)])
    return _mean_union(trace, drawn)


def _mean_union(trace: RoutingTrace, places: np.ndarray) -> float:
    """places: (steps, tokens)"""
    chosen = trace.ids[places][:, :, trace.moe_layers]  # (steps, tokens, layers, top_k)
    steps, _, layers, _ = chosen.shape
    is_read = np.zeros((steps, layers, trace.num_experts), bool)
    step, layer = np.ogrid[:steps, :layers]
    for token in np.moveaxis(chosen, 1, 0):  # (steps, layers, top_k)
        is_read[step[..., None], layer[..., None], token] = True
    return float(is_read.sum(-1).mean())


# The command line ----------------------------------------------------------------------------------------------------

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
_Model = Annotated[str | None, typer.Option("-m", "--model", help="GGUF file or first shard. Default: the demo.")]
_Threads = Annotated[int | None, typer.Option("-t", min=1)]


@app.command()
def agents(
    model: _Model = None,
    count: Annotated[int, typer.Option("--agents", help="Agents of the plan.", min=2)] = 8,
    context: Annotated[int, typer.Option(help="Tokens that all agents have in common.", min=1)] = 768,
    tokens: Annotated[int, typer.Option("-n", help="Tokens that each agent says.", min=2)] = 96,
    repeats: Annotated[int, typer.Option("-r", help="Undisturbed warm turns.", min=1)] = 5,
    threads: _Threads = None,
) -> None:
    """Agents at once against one after the other, with and without pages in common."""
    bench = SwarmBench(with_model(Options(model=model, num_threads=threads)), count, context, tokens)
    try:
        samples = compare_modes(bench, repeats, tokens)
        name, used_threads = bench.name, bench.num_threads
    finally:
        bench.close()
    gains = speed_ups(samples)
    print(f"{name}, {used_threads} threads: {count} agents of {tokens} tokens, {context:,} of context in common\n")
    print("| agents, prompts   |            s |  CPU s |  tok/s | prompt tokens read | x in turn, apart |")
    print("|-------------------|-------------:|-------:|-------:|-------------------:|-----------------:|")
    for mode, each in samples.items():
        rounds = [sample.run for sample in each.warm]
        seconds = Spread.of([one.seconds for one in rounds])
        rate = np.mean([one.num_tokens / one.seconds for one in rounds])
        read = np.mean([one.prompt_tokens - one.cached_tokens for one in rounds])
        cpu = f"{np.mean([one.cpu_s for one in rounds]):6.2f}"
        gain = f"{spread(gains[mode]):>16}"
        print(f"| {mode:<17} | {spread(seconds):>12} | {cpu} | {rate:6.1f} | {read:18,.0f} | {gain} |")
    first = samples[SLOWEST]
    if first.num_dropped:
        print(f"{first.num_dropped} disturbed turns were dropped")
    if first.is_noisy:
        print("too few turns were undisturbed: the least disturbed ones were kept")
    _print_document("agents", used_threads, {
        "model": name, "agents": count, "context_tokens": context, "num_tokens": tokens,
        "modes": {mode: [sample.run.seconds for sample in each.warm] for mode, each in samples.items()},
        "cpu_s": {mode: [sample.run.cpu_s for sample in each.warm] for mode, each in samples.items()},
        "speed_up": {mode: {"mean": gain.mean, "sd": gain.sd} for mode, gain in gains.items()},
        "num_dropped": first.num_dropped, "is_noisy": first.is_noisy,
    })  # fmt: skip


@app.command()
def experts(
    model: _Model = None,
    counts: Annotated[str, typer.Option("-b", help="Sequences at once, comma-separated; 1 is among them.")] = "1,2,4,8",
    tokens: Annotated[int, typer.Option("-n", help="Tokens of each sequence.", min=2)] = 64,
    threads: _Threads = None,
) -> None:
    """Experts read per token, next to what routing predicts."""
    wanted = sorted({1, *(int(part) for part in counts.split(","))})
    options = with_model(Options(model=model, num_threads=threads))
    rows = read_experts(options, wanted, tokens)
    print("| agents | experts a token and layer | of one alone | predicted | if uniform | tok/s |")
    print("|-------:|--------------------------:|-------------:|----------:|-----------:|------:|")
    for row in rows:
        share = row.experts_per_token / rows[0].experts_per_token
        print(
            f"| {row.num_sequences:>6} | {row.experts_per_token:>25.2f} | {share:>12.0%} | {row.predicted:>9.2f} "
            f"| {row.uniform:>10.2f} | {row.tok_s:>5.1f} |"
        )
    _print_document("experts", threads or 0, {"model": Path(options.model).name, "rows": [asdict(row) for row in rows]})


def _print_document(what: str, num_threads: int, found: Mapping[str, Any]) -> None:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    environment = describe_environment(max(1, num_threads))
    print(json.dumps({"tool": f"swarm {what}", "schema": 1, "date": date, "environment": environment, **found}))


if __name__ == "__main__":
    try:
        app()
    except KimiLiteError as error:
        print(f"swarm: {error}", file=sys.stderr)
        sys.exit(2)
