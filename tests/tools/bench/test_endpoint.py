"""kimi-lite bench --endpoint: its figures from known times, against our own server, and against poor ones."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from kimi_lite.tools.bench import command
from kimi_lite.tools.bench.endpoint import Asked, EndpointTest, Round, Texts, make_endpoint_result, with_again
from kimi_lite.tools.bench.plan import plan_tests
from kimi_lite.tools.bench.run import Sample, Samples
from tests.apps.fake_openai import Answer, FakeOpenAI, sse
from tests.apps.server.running import running, speaking

DATA = Path(command.__file__).parents[1] / "data"
STORY = "Once upon a time there was a model that had no end. " * 20


def run_bench(endpoint: str, *arguments: str):
    result = CliRunner().invoke(command.app, ["--endpoint", endpoint, "-r", "1", *arguments])
    return result


def document_of(result) -> dict:
    document = json.loads(result.stdout.strip().rpartition("\n")[2])
    jsonschema.validate(document, json.loads((DATA / "bench_endpoint.schema.json").read_text()))
    environment = json.loads((DATA / "bench.schema.json").read_text())["properties"]["environment"]
    jsonschema.validate(document["client"], environment)
    return document


def of_test(document: dict, name: str) -> dict:
    return next(result for result in document["results"] if result["test"] == name)


# Figures -------------------------------------------------------------------------------------------------------------


def asked(first_s: float, last_s: float, generated: int = 5, prompt: int = 100, cached: int = 0) -> Asked:
    gaps = generated - 1
    return Asked(first_s, last_s, ((last_s - first_s) / gaps,) * gaps, prompt, cached, generated, True)


def samples(*rounds: Round) -> Samples:
    kept = tuple(Sample(each, 0.0, 0) for each in rounds)
    return Samples(kept[0], kept, 0, False)


def test_the_rates_of_answers_are_of_all_and_of_each() -> None:
    test = EndpointTest("tg", 5, num_sequences=2)
    one = Round(2.0, 8, 2.0, (0.25,) * 4 + (0.5,) * 4, asked=(asked(1.0, 2.0), asked(2.0, 4.0)))
    result = make_endpoint_result(test, samples(one, one))
    assert (result.tok_s.mean, result.each_tok_s) == (4.0, 3.0)  # 8 tokens in 2 s; 4 a second and 2 a second
    assert (result.ttft_p50_s, result.gap_p50_s, result.generated_tokens) == (1.5, 0.375, 5)
    assert (result.num_requests, result.num_errors) == (4, 0)


def test_prompts_count_what_was_not_in_the_cache_and_failures_are_no_part_of_rates() -> None:
    test = EndpointTest("pp", 100, num_sequences=3)
    one = Round(0.5, 180, 0.5, (), asked=(asked(0.4, 0.5), asked(0.5, 0.5, cached=20)), errors=("lost",))
    result = make_endpoint_result(test, samples(one))
    assert (result.tok_s.mean, result.each_tok_s) == (360.0, (250 + 160) / 2)
    assert (result.cached_share, result.num_requests, result.num_errors) == (0.1, 3, 1)
    nothing = make_endpoint_result(test, samples(Round(0.5, 0, 0.0, (), errors=("lost",) * 3)))
    assert (nothing.tok_s, nothing.ttft_p50_s, nothing.num_errors) == (None, None, 3)


def test_prompts_are_as_long_as_wanted_and_begin_unlike_each_other() -> None:
    texts, test = Texts(4.0, 10.0), EndpointTest("pp", 300, num_sequences=30)
    prompts = [prompt for _ in range(3) for prompt in texts.prompts(test)]
    assert {len(prompt) for prompt in prompts} == {(300 - 10) * 4}
    assert len({prompt[:12] for prompt in prompts}) == len(prompts)
    (deep,) = texts.prompts(EndpointTest("tg", 8, depth=100_000))
    assert len(deep) > 4 * 99_000


def test_each_prompt_is_asked_again() -> None:
    tests = with_again(plan_tests("8", "4", "0", "1,2", is_sweep=False))
    assert [test.name for test in tests] == ["pp8", "again8", "tg4", "pp8 x2", "again8 x2", "tg4 x2"]


# Servers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(lambda: speaking(lambda prompt: (None, STORY), num_pages=2048)) as url:
        yield url


def test_our_own_server_is_measured(url: str) -> None:
    result = run_bench(url, "-p", "200", "-n", "12", "-b", "1,4")
    assert result.exit_code == 0, result.output
    document = document_of(result)
    assert document["is_counted"]
    assert document["errors"] == {}
    assert [each["test"] for each in document["results"]] == [
        *("pp200", "again200", "tg12", "pp200 x4", "again200 x4", "tg12 x4")
    ]
    for each in document["results"]:
        assert each["num_errors"] == 0
        assert each["ttft_p50_s"] > 0
    assert 150 <= of_test(document, "pp200")["prompt_tokens"] <= 250
    assert of_test(document, "pp200 x4")["cached_share"] < 0.3
    assert of_test(document, "again200 x4")["cached_share"] > 0.6
    generated = of_test(document, "tg12 x4")
    assert generated["generated_tokens"] == 12
    assert generated["tok_s"]["mean"] > generated["each_tok_s"] / 2
    assert "| tg12 x4 " in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 120


@pytest.mark.parametrize(("form", "head"), [("csv", "test,kind,"), ("jsonl", '{"test": "tg3"')])
def test_other_forms(url: str, form: str, head: str) -> None:
    result = run_bench(url, "-p", "0", "-n", "3", "-b", "1", "-o", form)
    assert result.stdout.startswith(head)


def test_a_server_that_does_not_count_is_measured_by_pieces() -> None:
    with FakeOpenAI(*[Answer([sse({"content": "a"}, {"content": "b"}, {"content": "c"})])] * 20) as fake:
        result = run_bench(fake.url, "-p", "64", "-n", "3", "-b", "1")
    document = document_of(result)
    assert not document["is_counted"]
    assert of_test(document, "tg3")["generated_tokens"] == 3
    assert of_test(document, "pp64")["prompt_tokens"] is None
    assert "does not count" in result.stdout
    assert all(body["max_tokens"] in (1, 3) for body in fake.bodies)


def test_what_a_server_does_not_know_is_left_out_and_said() -> None:
    refusal = Answer([b'{"error": {"message": "Unknown parameter: ignore_eos"}}'], 400)
    answer = Answer([sse({"content": "a"}, {"content": "b"}, usage={"prompt_tokens": 9, "completion_tokens": 2})])
    with FakeOpenAI(refusal, *[answer] * 20) as fake:
        result = run_bench(fake.url, "-p", "0", "-n", "8", "-b", "1")
    assert document_of(result)["left_out"] == ["ignore_eos"]
    assert "does not know ignore_eos" in result.stdout
    assert "ended before their length" in result.stdout
    assert sum("ignore_eos" in body for body in fake.bodies) == 1


def test_failures_are_counted_and_told() -> None:
    good = Answer([sse({"content": "a"}, {"content": "b"})])
    bad = Answer([b'{"error": "no memory left"}'], 500)
    with FakeOpenAI(good, good, *[bad, good, good, bad] * 6) as fake:
        result = run_bench(fake.url, "-p", "0", "-n", "2", "-b", "4")
    document = document_of(result)
    assert of_test(document, "tg2 x4")["num_errors"] == 2
    (said,) = document["errors"]
    assert "no memory left" in said
    assert document["errors"][said] >= 4
    assert f"failed {document['errors'][said]} x" in result.stdout


def test_a_server_that_answers_nothing_is_an_error() -> None:
    good, bad = Answer([sse({"content": "a"})]), Answer([b'{"error": "no memory left"}'], 500)
    with FakeOpenAI(good, good, *[bad] * 10) as fake:
        result = run_bench(fake.url, "-p", "0", "-n", "2", "-b", "1")
    assert result.exit_code != 0
    assert "answered none of" in str(result.exception)
    assert "no memory left" in str(result.exception)
    with FakeOpenAI(bad, models=[{"id": "m", "max_model_len": 100}]) as fake:
        assert "the server has 100" in str(run_bench(fake.url, "-p", "512").exception)


@pytest.mark.parametrize("flags", [["--sweep"], ["--compare", "llama.cpp"], ["--cold"], ["--baseline", "x.json"]])
def test_what_only_a_model_of_our_own_can_do_is_refused(flags: list[str]) -> None:
    assert f"{flags[0]} measures a model in this process" in str(run_bench("http://127.0.0.1:9", *flags).exception)
