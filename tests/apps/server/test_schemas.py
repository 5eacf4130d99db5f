"""Answers by schemas and forced tool calls, asked over HTTP, whole and streamed: all valid by `jsonschema`."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import httpx
import jsonschema
import numpy as np
import pytest

pytest.importorskip("llguidance")

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.grammar import Grammars
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from tests.apps.server.running import call, running, speaking
from tests.engine.fakes import VOCAB_SIZE, fake_engine
from tests.engine.schemas import families, tool

INSTANT = {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": False}}
SCHEMAS = [schema for schema in families() if r"\p{" not in json.dumps(schema).replace("\\\\", "\\")]


def babbling() -> Engine:
    """An engine whose model says anything, but likes to come to an end."""
    engine = fake_engine(context_length=2048, num_pages=512, max_running=8)
    likes = [*engine.tokenizer.eos_ids, *engine.tokenizer.encode('"]}a0')]

    def next_logits(context: list[int]) -> np.ndarray:
        random = np.random.default_rng([*context[-3:], len(context)])
        logits = random.normal(scale=2, size=VOCAB_SIZE).astype(np.float32)
        logits[likes] += 6
        return logits

    engine.model.next_logits = next_logits
    return engine


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(babbling) as url:
        yield url


@dataclass(frozen=True, slots=True)
class Said:
    """One answer."""

    content: str
    calls: list[dict]
    finish_reason: str


def ask(url: str, is_streamed: bool, **body: object) -> Said:
    body = {"messages": [{"role": "user", "content": "Go"}], "temperature": 1.5, "max_tokens": 300, **INSTANT, **body}
    if not is_streamed:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        calls = [each["function"] | {"id": each["id"]} for each in choice["message"].get("tool_calls") or []]
        return Said(choice["message"]["content"] or "", calls, choice["finish_reason"])
    content, calls, reason = "", [], ""
    body["stream"] = True
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"] or [{"delta": {}, "finish_reason": None}]
            content += choice["delta"].get("content") or ""
            for delta in choice["delta"].get("tool_calls") or []:
                if delta["index"] == len(calls):
                    calls.append({"id": delta["id"], "name": delta["function"]["name"], "arguments": ""})
                calls[delta["index"]]["arguments"] += delta["function"].get("arguments", "")
            reason = choice["finish_reason"] or reason
    return Said(content, calls, reason)


def require_valid(schema: dict, text: str) -> None:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def response_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_answers_by_200_schemas_are_valid(url: str) -> None:
    assert len(SCHEMAS) >= 200
    with ThreadPoolExecutor(8) as pool:
        wanted = [pool.submit(ask, url, i % 2 == 0, seed=i, response_format=response_format(schema))
                  for i, schema in enumerate(SCHEMAS)]  # fmt: skip
        answers = [each.result() for each in wanted]
    ended = [(schema, said) for schema, said in zip(SCHEMAS, answers, strict=True) if said.finish_reason == "stop"]
    assert len(ended) > 0.9 * len(SCHEMAS)
    for schema, said in ended:
        require_valid(schema, said.content)
        assert not said.calls


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_arguments_of_forced_calls_are_valid(url: str) -> None:
    objects = [schema for schema in SCHEMAS if schema.get("type") == "object"]
    assert len(objects) > 60
    with ThreadPoolExecutor(8) as pool:
        wanted = []
        for i, schema in enumerate(objects):
            tools = [
                tool("first", schema),
                tool("second", {"type": "object", "properties": {"n": {"type": "integer"}}}),
            ]
            choice = {"type": "function", "function": {"name": "first"}} if i % 3 else "required"
            wanted.append(pool.submit(ask, url, i % 2 == 0, seed=i, tools=tools, tool_choice=choice,
                                      parallel_tool_calls=False))  # fmt: skip
        answers = [each.result() for each in wanted]
    ended = [
        (schema, said) for schema, said in zip(objects, answers, strict=True) if said.finish_reason == "tool_calls"
    ]
    assert len(ended) > 0.9 * len(objects)
    for schema, said in ended:
        (called,) = said.calls
        assert called["id"] == f"functions.{called['name']}:0"
        if called["name"] == "first":
            require_valid(schema, called["arguments"])
        else:
            assert isinstance(json.loads(called["arguments"]), dict)


def test_an_unsupported_keyword_is_a_400_that_names_it(url: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "null"}}}}
    place = "response_format.json_schema.schema.properties.a.contains"
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": response_format(schema)}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, place, "unsupported_schema")
    assert "contains" in error["message"]
    body = {**body, "tools": [tool("f", schema)]}
    del body["response_format"]
    for more in ({"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}):
        error = httpx.post(f"{url}/v1/chat/completions", json=body | more).json()["error"]
        assert error["param"] == "tools.0.function.parameters.properties.a.contains", error
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    assert httpx.post(f"{url}/v1/chat/completions", json=body | {"tools": [strict]}).status_code == 400
    assert httpx.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 3}).status_code == 200  # may be called


def test_thinking_is_free_and_the_answer_is_not() -> None:
    with running(lambda: speaking(lambda prompt: ("Is it {not} a schema?", "plain words"))) as url:
        said = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 80,
                  "response_format": response_format({"enum": ["yes", "no"]})},
            timeout=120,
        ).json()["choices"][0]["message"]  # fmt: skip
    assert said["reasoning_content"] == "Is it {not} a schema?"
    assert json.loads(said["content"]) in ("yes", "no")


def test_text_before_a_call_that_may_be_made_stays_as_it_is() -> None:
    words = "Let me see: <b>{]</b> 世界 \\u0000 "
    spoken = words + call("f", '{"n": 5}')
    with running(lambda: speaking(lambda prompt: (None, spoken))) as url:
        tools = [tool("f", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})]
        for is_streamed in (False, True):
            said = ask(url, is_streamed, tools=tools, temperature=0)
            assert (said.content, said.finish_reason) == (words, "tool_calls")
            assert said.calls == [{"id": "functions.f:0", "name": "f", "arguments": '{"n": 5}'}]


# The demo model -------------------------------------------------------------------------------------------------------

_MARKERS = {
    "<repo_name>": "<|tool_calls_section_begin|>", "<reponame>": "<|tool_calls_section_end|>",
    "<file_sep>": "<|tool_call_begin|>", "<filename>": "<|tool_call_argument_begin|>",
    "<gh_stars>": "<|tool_call_end|>",
}  # fmt: skip
_TEMPLATE = (
    "{%- if tools -%}<|im_start|>system\nYou can call: {{ tools | tojson }}<|im_end|>\n{%- endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}<|tool_calls_section_begin|><|tool_call_begin|>{{ c.id }}"
    "<|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|><|tool_calls_section_end|>{%- endfor -%}"
    "<|im_end|>\n{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def demo() -> Engine:
    """The demo model with Kimi's markers in place of five control tokens that it never says."""
    from kimi_lite.demo.build import ensure_demo_model
    from kimi_lite.engine.loader import load
    from kimi_lite.gguf.store import GGUFStore
    from kimi_lite.options import Options

    path = ensure_demo_model()
    engine = load(path, Options(context_length=2048, num_sequences=8, num_threads=1))
    with closing(GGUFStore.open(path)) as store:
        metadata = dict(store.metadata)
    tokens = [_MARKERS.get(token, token) for token in metadata["tokenizer.ggml.tokens"]]
    assert len(set(tokens) & set(_MARKERS.values())) == len(_MARKERS)
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.chat_template": _TEMPLATE}
    engine.tokenizer = Tokenizer.from_metadata(metadata)
    engine.template = ChatTemplate.from_metadata(metadata, engine.tokenizer)
    engine.grammars = Grammars(engine.tokenizer)
    return engine


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_the_demo_model_follows_schemas_and_calls() -> None:
    """Some of the schemas: what a real vocabulary and real logits add. The kinds of schemas are the tests' above."""
    from kimi_lite.demo.build import ensure_demo_model

    try:
        ensure_demo_model()
    except KimiLiteError as error:
        pytest.skip(f"the demo model cannot be built here: {error.message}")
    some = SCHEMAS[::40]
    question = [{"role": "user", "content": "Tell me about the weather in Rome, in a few words."}]
    with running(demo) as url, ThreadPoolExecutor(8) as pool:

        def asked(i: int, **form: object):
            more = {"temperature": (0, 1.5)[i // 2 % 2], "max_tokens": 64, "seed": i, "messages": question}
            return pool.submit(ask, url, i % 2 == 0, **more, **form)

        contents = [(schema, asked(i, response_format=response_format(schema))) for i, schema in enumerate(some)]
        objects = [schema for schema in some if schema.get("type") == "object"]
        once = {"tool_choice": "required", "parallel_tool_calls": False}
        calls = [(schema, asked(i, tools=[tool("weather", schema)], **once)) for i, schema in enumerate(objects)]
        contents = [(schema, each.result()) for schema, each in contents]
        calls = [(schema, each.result()) for schema, each in calls]
    num_ended = 0
    for schema, said in contents:
        if said.finish_reason == "stop":
            num_ended += 1
            require_valid(schema, said.content)
    for schema, said in calls:
        if said.finish_reason == "tool_calls":
            num_ended += 1
            require_valid(schema, said.calls[0]["arguments"])
    print(f"{num_ended} of {len(contents) + len(calls)} answers ended, all valid")
    assert num_ended > 0.4 * (len(contents) + len(calls))
