"""The tests of `tools.bench` against a server that speaks OpenAI's chat API: `kimi-lite bench --endpoint URL`.

    kimi-lite bench --endpoint http://127.0.0.1:8000 -p 512 -n 128 -b 1,2,4,8,16,32

`pp512 x8` sends eight prompts of about 512 tokens at once that no cache knows; `again512 x8` sends such prompts once
more; `tg128 x8` has eight answers of 128 tokens streamed. Time is the client's: from sending the request to the first
piece of the answer, and between pieces, so queues, templates and the network are part of it. Tokens are counted by the
server (`usage`); where it does not count, a piece is taken for a token and a prompt's length is estimated, and the
result says so. A request that fails is counted and its reason told; rates are of those that did not.
"""

import asyncio
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Literal
from uuid import uuid4

import numpy as np

from kimi_lite.apps.remote.answer import AnswerReader
from kimi_lite.apps.remote.deltas import DeltaReader
from kimi_lite.apps.remote.dialect import COMPLETIONS, Dialect
from kimi_lite.apps.remote.endpoint import Refused, key_of
from kimi_lite.apps.remote.http_async import AsyncServer
from kimi_lite.apps.remote.models import MODELS, context_length_of, models_of, no_models, only_model
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.scoring import TEXT
from kimi_lite.engine.types import SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench.environment import describe_environment
from kimi_lite.tools.bench.measure import read_stolen_s
from kimi_lite.tools.bench.ours import Run
from kimi_lite.tools.bench.plan import BenchTest
from kimi_lite.tools.bench.result import Spread
from kimi_lite.tools.bench.run import Samples, measure_test

DEFAULT_BATCHES = "1,2,4,8,16,32"
CHARACTERS_PER_TOKEN = 4.4  # of English prose, where the server does not count
_CALIBRATION = (400, 4000)  # characters of the two prompts that tell how long a token is
_STORY = "Go on with this story at length, in the same style. Do not stop.\n\n"
_LEAST_PROMPT = 32  # tokens before an answer
_NAME = "endpoint"

Kind = Literal["pp", "again", "tg"]


@dataclass(frozen=True, slots=True)
class EndpointTest(BenchTest):
    """`again`: a prompt of `num_tokens` that was just asked. `depth`: tokens before an answer."""

    kind: Kind


@dataclass(frozen=True, slots=True)
class EndpointJob:
    """What is to be measured."""

    endpoint: str
    api_key: str | None
    model: str | None  # None: the only one there is
    tests: tuple[EndpointTest, ...]
    num_repeats: int


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that was answered. Times in seconds since its round began."""

    first_s: float  # the first piece came
    last_s: float
    gaps_s: tuple[float, ...]  # between pieces
    prompt_tokens: int  # 0: the server does not count
    cached_tokens: int
    generated_tokens: int  # as many as pieces where the server does not count
    is_counted: bool


@dataclass(frozen=True, slots=True)
class Round(Run):
    """One repeat: requests that were sent together."""

    asked: tuple[Asked, ...] = ()
    errors: tuple[str, ...] = ()  # of those that failed


@dataclass(frozen=True, slots=True)
class EndpointResult:
    """One test. Rates are tokens/s; what no request tells is None."""

    test: EndpointTest
    tok_s: Spread | None  # of all requests together, warm; None for `again`, and where all failed
    each_tok_s: float | None  # of one request among them, median
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    gap_p50_s: float | None
    gap_p99_s: float | None
    prompt_tokens: float | None  # of a request, mean
    cached_share: float | None  # of the prompts' tokens, as the server says
    generated_tokens: float | None  # of a request, mean
    num_requests: int
    num_errors: int
    num_dropped: int  # repeats
    is_noisy: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"test": self.test.name, **asdict(self.test)}


@dataclass(slots=True)
class EndpointMeasured:
    """Everything that was found."""

    url: str
    model: str
    context_length: int | None
    is_counted: bool  # by the server
    left_out: tuple[str, ...]  # fields that it does not know
    results: list[EndpointResult] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # of all requests, the first round's too
    stolen_s: float = 0.0


def with_again(tests: Sequence[BenchTest]) -> tuple[EndpointTest, ...]:
    """The tests of a plan, and after each prompt the same prompt again."""
    found = []
    for test in tests:
        kinds = ("pp", "again") if test.kind == "pp" else ("tg",)
        found += [EndpointTest(kind, test.num_tokens, test.depth, test.num_sequences) for kind in kinds]
    return tuple(found)


def bench_endpoint(job: EndpointJob, report: Any) -> EndpointMeasured:
    """Reach the server, measure, print each result as soon as it is known. `report`: `tools.bench.report.Report`.

    Raises KimiLiteError where the server cannot be reached, or answers nothing at all.
    """
    stolen_s = read_stolen_s()
    with Client(job) as client:
        measured = EndpointMeasured(
            client.server.url, client.dialect.model, client.context_length, client.is_counted, ()
        )
        report.print_endpoint(measured)
        texts = Texts(client.characters_per_token, client.template_tokens)
        report.begin_endpoint_results()
        for test in job.tests:
            (samples,) = measure_test(test, {_NAME: client.run}, texts, job.num_repeats, num_threads=1).values()
            result = make_endpoint_result(test, samples)
            measured.results.append(result)
            measured.errors.update(error for each in (samples.first, *samples.warm) for error in each.run.errors)
            report.print_endpoint_result(result)
        measured.left_out = tuple(sorted(client.dialect.left_out))
    measured.stolen_s = round(read_stolen_s() - stolen_s, 2)
    report.end_endpoint_results(measured)
    if all(result.num_errors == result.num_requests for result in measured.results):
        raise KimiLiteError(
            f"{measured.url} answered none of {sum(measured.errors.values())} requests: "
            f"{measured.errors.most_common(1)[0][0]}",
            "Look at the server's log.",
        )
    return measured


class Texts:
    """Prompts of about so many tokens. None begins like another, of this run or of an earlier one: the first words are
    chance."""

    def __init__(self, characters_per_token: float, template_tokens: float) -> None:
        self._per_token, self._template_tokens = characters_per_token, template_tokens
        self._text = " ".join(TEXT.read_text(encoding="utf-8").split())
        self._chance = random.Random(os.urandom(16))
        self._starts = itertools.count(self._chance.randrange(len(self._text)), 7919)

    def prompts(self, test: EndpointTest) -> list[str]:
        """One for each request of the test."""
        if test.kind != "tg":
            return [self._prompt(test.num_tokens) for _ in range(test.num_sequences)]
        return [_STORY + self._prompt(max(_LEAST_PROMPT, test.depth)) for _ in range(test.num_sequences)]

    def _prompt(self, num_tokens: int) -> str:
        num_characters = max(1, round((num_tokens - self._template_tokens) * self._per_token))
        start = next(self._starts) % len(self._text)
        whole = f"{self._chance.randrange(10**9):,}: {self._text[start:]} {self._text}"
        return (whole * (1 + num_characters // len(whole)))[:num_characters]


class Client:
    """A server that is asked. Its own event loop runs while it is."""

    def __init__(self, job: EndpointJob) -> None:
        self._runner = asyncio.Runner()
        self.server = AsyncServer(job.endpoint, key_of(job.endpoint, job.api_key))
        try:
            models = self._runner.run(self._models(is_needed=job.model is None))
            name = job.model or only_model(self.server.url, models)
            self.context_length = context_length_of(models.get(name, {}))
            self._require_context(job.tests)
            self.dialect = Dialect(self.server.url, name, {"ignore_eos": True})
            self._calibrate()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self.server.close())
        self._runner.close()

    def run(self, test: EndpointTest, prompts: Sequence[str]) -> Round:
        """The requests of one repeat, all at once."""
        num_tokens = test.num_tokens if test.kind == "tg" else 1
        if test.kind == "again":
            self._runner.run(self._ask_all(prompts, num_tokens))
        began_s, answers = self._runner.run(self._ask_all(prompts, num_tokens))
        asked = tuple(answer for answer in answers if isinstance(answer, Asked))
        errors = tuple(answer.message for answer in answers if isinstance(answer, KimiLiteError))
        seconds, counted = _timed(test, asked, self.characters_per_token, prompts)
        gaps_s = tuple(gap for answer in asked for gap in answer.gaps_s)
        first_s = max((answer.first_s for answer in asked), default=0.0)
        return Round(seconds or time.perf_counter() - began_s, counted, first_s, gaps_s, {}, asked=asked, errors=errors)

    async def _models(self, is_needed: bool) -> Any:
        try:
            return models_of(await self.server.get(MODELS))
        except Refused as error:
            return no_models(error, is_needed)

    def _require_context(self, tests: Sequence[EndpointTest]) -> None:
        longest = max(test.context_tokens for test in tests)
        if self.context_length is not None and longest > self.context_length:
            raise KimiLiteError(
                f"The longest test needs {longest:,} tokens of context; the server has {self.context_length:,}.",
                "Use a smaller -d, -p or -n.",
            )

    def _calibrate(self) -> None:
        """How many characters a token has, and how many tokens the template adds; whether the server counts at all."""
        text = TEXT.read_text(encoding="utf-8")
        counts = []
        for num_characters in _CALIBRATION:
            _, (answer,) = self._runner.run(self._ask_all([text[:num_characters]], 1))
            if isinstance(answer, KimiLiteError):
                raise answer
            counts.append(answer.prompt_tokens)
        self.is_counted = counts[1] > counts[0] > 0
        per_token = (_CALIBRATION[1] - _CALIBRATION[0]) / (counts[1] - counts[0]) if self.is_counted else 0.0
        self.characters_per_token = per_token or CHARACTERS_PER_TOKEN
        self.template_tokens = max(0.0, counts[0] - _CALIBRATION[0] / per_token) if per_token else 0.0

    async def _ask_all(self, prompts: Sequence[str], num_tokens: int) -> tuple[float, list[Asked | KimiLiteError]]:
        began_s = time.perf_counter()
        return began_s, await asyncio.gather(*(self._ask(prompt, num_tokens, began_s) for prompt in prompts))

    async def _ask(self, prompt: str, num_tokens: int, began_s: float) -> Asked | KimiLiteError:
        settings = AnswerSettings(temperature=0, sampling=SamplingParams(max_tokens=num_tokens))
        while True:
            body = self.dialect.body([{"role": "user", "content": prompt}], settings)
            try:
                return await self._answer(body, began_s)
            except Refused as error:
                try:
                    self.dialect.do_without(error, settings, body)
                except Refused:
                    return error
            except KimiLiteError as error:
                return error

    async def _answer(self, body: dict[str, Any], began_s: float) -> Asked:
        deltas, arrivals_s = DeltaReader(uuid4().hex), []
        reader = AnswerReader(self.server, deltas)
        async with aclosing(self.server.post(COMPLETIONS, body)) as pieces:
            async for content_type, data in pieces:
                before = deltas.num_deltas
                for _ in reader.feed(content_type, data):
                    pass
                arrivals_s += [time.perf_counter() - began_s] * (deltas.num_deltas - before)
                if reader.is_done:
                    break
        *_, last = reader.finish()
        arrivals_s = arrivals_s or [time.perf_counter() - began_s]  # a server that does not stream, or says nothing
        stats = last.stats
        return Asked(
            arrivals_s[0],
            arrivals_s[-1],
            tuple(b - a for a, b in pairwise(arrivals_s)),
            stats.prompt_tokens,
            stats.cached_tokens,
            stats.generated_tokens,
            deltas.is_counted,
        )


def _timed(
    test: EndpointTest, asked: Sequence[Asked], characters_per_token: float, prompts: Sequence[str]
) -> tuple[float, int]:
    """(seconds, tokens) of a repeat: prompts until the last one is read; answers from the first piece of the first one
    to the last piece of the last one, but for their first tokens, which came with the prompts."""
    if not asked:
        return 0.0, 0
    if test.kind == "tg":
        seconds = max(answer.last_s for answer in asked) - min(answer.first_s for answer in asked)
        return seconds, sum(max(0, answer.generated_tokens - 1) for answer in asked)
    estimated = round(sum(map(len, prompts)) / len(prompts) / characters_per_token)
    counted = sum((answer.prompt_tokens or estimated) - answer.cached_tokens for answer in asked)
    return max(answer.first_s for answer in asked), counted


def make_endpoint_result(test: EndpointTest, samples: Samples) -> EndpointResult:
    """The numbers of one test, made of its warm repeats."""
    rounds = [sample.run for sample in samples.warm]
    asked = [answer for each in rounds for answer in each.asked]
    num_errors = sum(len(each.errors) for each in rounds)
    rates = [each.tok_s for each in rounds if each.asked and each.num_tokens > 0]
    gaps_s = [gap for answer in asked for gap in answer.gaps_s] if test.kind == "tg" else []
    prompt_tokens = sum(answer.prompt_tokens for answer in asked)
    cached = sum(answer.cached_tokens for answer in asked)
    return EndpointResult(
        test=test,
        tok_s=Spread.of(rates) if rates and test.kind != "again" else None,
        each_tok_s=_median([rate for answer in asked if (rate := _own_rate(test, answer)) is not None]),
        ttft_p50_s=_percentile([answer.first_s for answer in asked], 50),
        ttft_p99_s=_percentile([answer.first_s for answer in asked], 99),
        gap_p50_s=_percentile(gaps_s, 50),
        gap_p99_s=_percentile(gaps_s, 99),
        prompt_tokens=prompt_tokens / len(asked) if prompt_tokens else None,
        cached_share=cached / prompt_tokens if prompt_tokens else None,
        generated_tokens=sum(answer.generated_tokens for answer in asked) / len(asked) if asked else None,
        num_requests=len(asked) + num_errors,
        num_errors=num_errors,
        num_dropped=samples.num_dropped,
        is_noisy=samples.is_noisy,
    )


def _own_rate(test: EndpointTest, answer: Asked) -> float | None:
    """Of one request among the others; None where it has none."""
    if test.kind == "tg":
        seconds = answer.last_s - answer.first_s
        return (answer.generated_tokens - 1) / seconds if seconds > 0 and answer.generated_tokens > 1 else None
    fresh = answer.prompt_tokens - answer.cached_tokens
    return fresh / answer.first_s if test.kind == "pp" and fresh > 0 else None


def _median(values: Sequence[float]) -> float | None:
    return _percentile(values, 50)


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def make_endpoint_document(job: EndpointJob, measured: EndpointMeasured) -> dict[str, Any]:
    """The JSON document; see tools/data/bench_endpoint.schema.json."""
    return {
        "tool": "kimi-lite bench --endpoint",
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "client": describe_environment(1),
        "endpoint": measured.url,
        "model": measured.model,
        "context_length": measured.context_length,
        "is_counted": measured.is_counted,
        "left_out": list(measured.left_out),
        "num_repeats": job.num_repeats,
        "results": [result.to_json() for result in measured.results],
        "errors": dict(measured.errors),
        "stolen_s": measured.stolen_s,
    }
