"""Constraints of answers: calls in each model's syntax, content by a schema, and both; text that stays free."""

import json
import random
import threading
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from kimi_lite.engine.grammar import MAX_COMPILED, AnswerForm, Grammars
from kimi_lite.engine.json_schema import SchemaError
from kimi_lite.engine.sampler import unpack_bits
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.stream import DEEPSEEK, KIMI, StreamParser
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from tests.engine.fakes import VOCAB_SIZE, fake_engine, tiny_metadata
from tests.engine.schemas import schemas, tool, write
from tests.layouts import DEEPSEEK_R1, DEEPSEEK_SPECIAL, DEEPSEEK_V31, KIMI_K2, KIMI_SPECIAL
from tests.text.conftest import kimi as real_kimi  # noqa: F401
from tests.text.conftest import kimi_metadata, make_metadata  # noqa: F401

BYTES = [bytes([i]) for i in range(256)] + [
    b'{"',
    b'":',
    b"functions",
    b".get",
    b"_weather",
    b"\n```",
    b"```json\n",
    b"}\n",
]
WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
GET = tool("get", {"type": "object", "properties": {"k": {"enum": ["a", "b"]}}, "required": ["k"]})
NOTHING = tool("nothing", {})
TOOLS = (WEATHER, GET, NOTHING)
MODELS = {
    "kimi": (KIMI_K2, KIMI_SPECIAL),
    "r1": (DEEPSEEK_R1, DEEPSEEK_SPECIAL),
    "v31": (DEEPSEEK_V31, DEEPSEEK_SPECIAL),
}


class Model:
    """A vocabulary with its template and grammars."""

    def __init__(self, source: str, special: list[str]) -> None:
        special = [*special, "<eot>"] if "<eot>" not in special else special
        first = len(BYTES)
        end = first + special.index("<|im_end|>" if "<|im_end|>" in special else "<｜end▁of▁sentence｜>")
        metadata = make_metadata(BYTES, special, "gpt-2", eos_token_id=end, eot_token_id=first + special.index("<eot>"))
        metadata["tokenizer.chat_template"] = source
        self.tokenizer = Tokenizer.from_metadata(metadata)
        self.template = ChatTemplate.from_metadata(metadata, self.tokenizer)
        self.grammars = Grammars(self.tokenizer, lambda: self.template.facts.fences_arguments)
        self.dialect = KIMI if KIMI.call_begin in self.tokenizer.special else DEEPSEEK

    def ids(self, *parts: str) -> list[int]:
        """Control tokens where a part is one, else text."""
        special = self.tokenizer.special
        return [i for part in parts for i in ([special[part]] if part in special else self.tokenizer.encode(part))]

    def parsed(self, ids: list[int], num_calls: int = 0):
        parser = StreamParser(self.tokenizer, False, (), TOOLS, num_calls)
        pieces = [piece for i in ids for piece in parser.feed(i)] + parser.finish()
        assert not [piece.error for piece in pieces if piece.error]
        return parser.tool_calls, "".join(piece.text for piece in pieces if piece.kind == "content")


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Model:
    return Model(*MODELS[request.param])


@pytest.fixture(scope="module")
def kimi() -> Model:
    return Model(*MODELS["kimi"])


def allowed_ids(constraint, model: Model) -> set[int] | None:
    bits = constraint.allowed()
    return None if bits is None else set(np.flatnonzero(unpack_bits(bits, model.tokenizer.vocab_size)).tolist())


def fed(constraint, model: Model, *parts: str):
    for i in model.ids(*parts):
        allowed = allowed_ids(constraint, model)
        assert allowed is None or i in allowed, (parts, model.tokenizer.decode([i]))
        constraint.accept(i)
    return constraint


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_calls=st.integers(0, 12), parallel=st.booleans(), named=st.booleans())
def test_forced_calls_are_read_back_with_valid_arguments(model, seed, num_calls, parallel, named) -> None:
    choice = "get_weather" if named else "required"
    form = AnswerForm(tools=TOOLS, choice=choice, has_parallel_calls=parallel, num_calls=num_calls)
    ids = write(model.grammars.answer(form)(), model.tokenizer, random.Random(seed))
    if ids is None:
        return
    calls, content = model.parsed(ids[:-1], num_calls)
    assert calls and not content and (parallel or len(calls) == 1)
    parameters = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
    for i, call in enumerate(calls):
        jsonschema.validate(json.loads(call.arguments), parameters[call.name])
        assert isinstance(json.loads(call.arguments), dict)
        assert call.id == f"functions.{call.name}:{num_calls + i}"
        assert not named or call.name == "get_weather"


def test_what_the_template_writes_for_calls_may_come(model: Model) -> None:
    """The oracle is the model's own template."""
    names = [("get_weather", '{"city":"Rome"}'), ("get", '{"k": "a"}')]
    calls = [
        {"id": f"functions.{name}:{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(names)
    ]
    question = {"role": "user", "content": "?"}
    rendered = model.template.encode(
        [question, {"role": "assistant", "content": "", "tool_calls": calls}, question]
    ).ids
    special = model.tokenizer.special
    begin = next(special[name] for name in model.dialect.section_begin if name in special)
    end = next(special[name] for name in model.dialect.section_end if name in special)
    section = rendered[rendered.index(begin) : rendered.index(end) + 1]
    section = [i for i, next_id in zip(section, [*section[1:], -1], strict=True)
               if not (model.tokenizer.decode([i]) == "\n" and next_id in special.values())]  # fmt: skip
    constraint = model.grammars.answer(AnswerForm(tools=TOOLS, choice="required"))()
    for i in section:
        assert i in allowed_ids(constraint, model), model.tokenizer.decode(section)
        constraint.accept(i)
    assert allowed_ids(constraint, model) == model.tokenizer.eos_ids
    assert len(model.tokenizer.eos_ids) > 1


def test_text_is_free_until_a_call_begins_and_after_it(kimi: Model) -> None:
    section, end, begin, arguments, call_end = (
        KIMI.section_begin[0], KIMI.section_end[0], KIMI.call_begin, KIMI.arguments_begin, KIMI.call_end,
    )  # fmt: skip
    constraint = kimi.grammars.answer(AnswerForm(tools=TOOLS, num_calls=7))()
    assert constraint.allowed() is None
    fed(constraint, kimi, "Let me <look> at {this}")
    assert constraint.allowed() is None
    fed(constraint, kimi, section)
    assert allowed_ids(constraint, kimi) == set(kimi.ids(begin))
    fed(constraint, kimi, begin, "functions.get")
    assert allowed_ids(constraint, kimi) == {*kimi.ids(":", "_"), BYTES.index(b"_weather")}
    fed(constraint, kimi, ":7", arguments, '{"k":"a"}')
    assert allowed_ids(constraint, kimi) == set(kimi.ids(call_end))
    fed(constraint, kimi, call_end)
    assert allowed_ids(constraint, kimi) == set(kimi.ids(begin, *KIMI.section_end))
    fed(constraint, kimi, end)
    assert constraint.allowed() is None
    fed(constraint, kimi, "more", begin, "functions.nothing:8", arguments, "{}", call_end)  # without a section
    assert constraint.allowed() is None


def test_one_call_only_where_calls_are_not_parallel(kimi: Model) -> None:
    call = (KIMI.call_begin, "functions.nothing:0", KIMI.arguments_begin, "{}", KIMI.call_end)
    constraint = kimi.grammars.answer(AnswerForm(tools=TOOLS, has_parallel_calls=False))()
    fed(constraint, kimi, "text", KIMI.section_begin[0], *call)
    assert allowed_ids(constraint, kimi) == set(kimi.ids(*KIMI.section_end))
    fed(constraint, kimi, KIMI.section_end[0])
    assert allowed_ids(constraint, kimi) == kimi.tokenizer.eos_ids


def test_content_by_a_schema_or_calls(kimi: Model) -> None:
    make = kimi.grammars.answer(AnswerForm(schema={"type": "object"}, tools=TOOLS))
    assert allowed_ids(make(), kimi) == {*kimi.ids("{", *KIMI.section_begin), BYTES.index(b'{"')}
    content = fed(make(), kimi, '{"a": 1}')
    assert allowed_ids(content, kimi) == kimi.tokenizer.eos_ids
    calls = fed(make(), kimi, KIMI.section_begin[0], KIMI.call_begin, "functions.nothing:0", KIMI.arguments_begin, "{}")
    fed(calls, kimi, KIMI.call_end, KIMI.section_end[0])
    assert allowed_ids(calls, kimi) == kimi.tokenizer.eos_ids
    forced = kimi.grammars.answer(AnswerForm(schema={"type": "object"}, tools=TOOLS, choice="required"))()
    assert allowed_ids(forced, kimi) == set(kimi.ids(*KIMI.section_begin))
    without = kimi.grammars.answer(AnswerForm(schema={"type": "object"}, tools=TOOLS, choice="none"))()
    assert allowed_ids(without, kimi) == {*kimi.ids("{"), BYTES.index(b'{"')}


def test_nothing_is_asked_where_anything_may_come(kimi: Model) -> None:
    assert kimi.grammars.answer(AnswerForm()) is None
    assert kimi.grammars.answer(AnswerForm(tools=TOOLS, choice="none")) is None


def test_a_model_that_opens_its_reasoning_itself_may() -> None:
    model = Model(*MODELS["r1"])
    think = model.tokenizer.special["<think>"]
    constraint = model.grammars.answer(AnswerForm(schema={"type": "object"}, may_think=True))()
    assert think in allowed_ids(constraint, model)
    constraint.accept(think)
    assert allowed_ids(constraint, model) == {
        *model.ids("{"),
        BYTES.index(b'{"'),
    }  # asked again when the reasoning has ended
    plain = model.grammars.answer(AnswerForm(schema={"type": "object"}))()
    assert think not in allowed_ids(plain, model)


UNSUPPORTED = tool("odd", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})


def test_a_tool_that_may_be_called_takes_any_object_where_its_schema_is_no_grammar(kimi: Model) -> None:
    constraint = kimi.grammars.answer(AnswerForm(tools=[UNSUPPORTED]))()
    fed(constraint, kimi, KIMI.call_begin, "functions.odd:0", KIMI.arguments_begin, '{"a": [1, 1]}', KIMI.call_end)
    impossible = tool("no", {"type": "object", "required": ["a"], "additionalProperties": False})  # found by compiling
    constraint = kimi.grammars.answer(AnswerForm(tools=[impossible]))()
    fed(constraint, kimi, KIMI.call_begin, "functions.no:0", KIMI.arguments_begin, "{}", KIMI.call_end)


@pytest.mark.parametrize("more", [{"choice": "required"}, {"choice": "odd"}, {"strict_tools": frozenset({"odd"})}])
def test_a_tool_that_must_follow_its_schema_is_refused_where_that_is_no_grammar(kimi: Model, more: dict) -> None:
    with pytest.raises(SchemaError, match=r"tools.1.function.parameters.properties.a.uniqueItems"):
        kimi.grammars.answer(AnswerForm(tools=[GET, UNSUPPORTED], **more))


@pytest.mark.parametrize(
    "parameters", [{"type": ["object", "null"]}, {"properties": {}}, {"anyOf": [{}, {"type": "null"}]}, None]
)
def test_arguments_are_an_object_whatever_their_schema_says(kimi: Model, parameters: dict | None) -> None:
    constraint = kimi.grammars.answer(AnswerForm(tools=[tool("f", parameters)], choice="f"))()
    fed(constraint, kimi, KIMI.section_begin[0], KIMI.call_begin, "functions.f:0", KIMI.arguments_begin)
    assert allowed_ids(constraint, kimi) == {*kimi.ids("{"), BYTES.index(b'{"')}


def test_arguments_that_can_be_no_object_are_refused(kimi: Model) -> None:
    with pytest.raises(SchemaError, match=r"tools\.0\.function\.parameters\.type"):
        kimi.grammars.answer(AnswerForm(tools=[tool("f", {"type": "string"})], choice="f"))


def test_all_tools_together_have_a_limit(kimi: Model) -> None:
    tools = [tool(f"f{i}", {"properties": {"a": {"enum": ["x" * 200_000 + str(i)]}}}) for i in range(6)]
    with pytest.raises(SchemaError, match="1,048,576 bytes"):
        kimi.grammars.answer(AnswerForm(tools=tools, choice="required"))
    constraint = kimi.grammars.answer(AnswerForm(tools=tools))()
    fed(constraint, kimi, KIMI.call_begin, "functions.f5:0", KIMI.arguments_begin, '{"a": 1}', KIMI.call_end)


def test_what_no_token_spells_ends_one_answer_only() -> None:
    """SmolLM2's vocabulary lacks 21 bytes."""
    special = ["<|im_end|>", *KIMI.markers]
    metadata = make_metadata(BYTES[:128], special, "gpt-2", eos_token_id=128)
    tokenizer = Tokenizer.from_metadata(metadata)
    for form in (AnswerForm(schema={"const": "é"}), AnswerForm(tools=[tool("é", {})], choice="é")):
        constraint = Grammars(tokenizer).answer(form)()
        with pytest.raises(KimiLiteError, match="grammar"):
            write(constraint, tokenizer, random.Random(0))


def test_a_schema_is_compiled_once_and_many_threads_may_ask(kimi: Model, monkeypatch) -> None:
    from kimi_lite.engine import grammar

    compiled, original = [], grammar._compiled
    monkeypatch.setattr(grammar, "_compiled", lambda *args: (compiled.append(args), original(*args))[1])
    grammars = Grammars(kimi.tokenizer)
    form, texts, errors = AnswerForm(schema={"type": "object", "properties": {"only": {"type": "null"}}}), [], []

    def ask(seed: int) -> None:
        try:
            ids = write(grammars.answer(form)(), kimi.tokenizer, random.Random(seed % 4))
            texts.append((seed % 4, kimi.tokenizer.decode(ids or [])))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(texts) == 16 and len(set(texts)) == 4 and len(compiled) == 1
    for i in range(MAX_COMPILED + 5):
        grammars.answer(replace(form, schema={"const": i}))
    assert len(grammars._compiled) == MAX_COMPILED


def test_a_failed_schema_is_refused_each_time(kimi: Model) -> None:
    for _ in range(2):
        with pytest.raises(SchemaError, match="cannot be made a grammar"):
            kimi.grammars.answer(AnswerForm(schema={"type": "string", "minLength": 3, "maxLength": 2}))


@settings(max_examples=30, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**31))
def test_answers_of_the_engine_follow_the_schema_at_temperature_1_5(schema: dict, seed: int) -> None:
    engine = fake_engine()
    try:
        constraint = engine.grammars.answer(AnswerForm(schema=schema))
    except SchemaError:
        return
    sampling = SamplingParams(temperature=1.5, top_p=1, seed=seed, max_tokens=400)
    ends = sorted(engine.tokenizer.eos_ids)

    def eager(context: list[int]) -> np.ndarray:
        logits = np.random.default_rng(len(context) + seed).normal(scale=2, size=VOCAB_SIZE).astype(np.float32)
        logits[[*ends, *engine.tokenizer.encode('"]}')]] += 6
        return logits

    engine.model.next_logits = eager
    tokens = list(engine.generate([Request("a", (1, 2, 3), sampling, constraint=constraint)]))
    if tokens[-1].finish_reason == "stop":
        text = "".join(token.text for token in tokens)
        if r"\p{" not in json.dumps(schema).replace("\\\\", "\\"):
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_a_call_that_ends_the_reasoning_is_followed() -> None:
    """Kimi sometimes calls without `</think>`: the grammar goes on from the marker that came."""
    engine = fake_engine()
    special, encode = engine.tokenizer.special, engine.tokenizer.encode
    wanted = [*encode("hm"), special[KIMI.section_begin[0]], special[KIMI.call_begin], *encode("functions.get:0")]
    wanted += [special[KIMI.arguments_begin], *encode('{"k":"z"}')]  # z is not among the choices

    def scripted(context: list[int]) -> np.ndarray:
        logits = np.zeros(VOCAB_SIZE, np.float32)
        logits[wanted[min(len(context) - 3, len(wanted) - 1)]] = 50
        return logits

    engine.model.next_logits = scripted
    constraint = engine.grammars.answer(AnswerForm(tools=TOOLS, choice="required"))
    sampling = SamplingParams(temperature=0, max_tokens=60)
    tokens = list(engine.generate([Request("a", (1, 2, 3), sampling, True, TOOLS, constraint=constraint)]))
    assert "".join(t.text for t in tokens if t.kind == "reasoning") == "hm"
    assert [token.id for token in tokens].count(special[KIMI.section_begin[0]]) == 1
    arguments = "".join(t.text for t in tokens if t.kind == "tool_call")
    assert arguments.startswith('{"k":"') and arguments[6] in "ab"


def test_unbounded_vocabularies_are_named() -> None:
    metadata = {**tiny_metadata(), "tokenizer.ggml.pre": "gpt-2"}
    special = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    tokens = list(metadata["tokenizer.ggml.tokens"])
    for i in special:
        tokens[i] = f"<|plain{i}|>"
    metadata["tokenizer.ggml.tokens"] = tokens
    for key in ("eos", "bos", "padding"):
        metadata.pop(f"tokenizer.ggml.{key}_token_id", None)
    with pytest.raises(Exception, match="no token that ends a turn"):
        Grammars(Tokenizer.from_metadata(metadata)).answer(AnswerForm(schema={}))


def test_the_real_vocabulary(real_kimi: Tokenizer) -> None:  # noqa: F811
    """163,840 tokens, many of which are cut through characters, or hold brackets and quotes together."""
    grammars, num_ended = Grammars(real_kimi), 0
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "n": {"enum": [1, "世界", None]}},
        "required": ["n"],
    }
    assert real_kimi.eos_ids == {163585, 163586, 163593}
    for seed in range(6):
        make = grammars.answer(AnswerForm(schema=schema))
        ids = write(make(), real_kimi, random.Random(seed), 400)
        if ids is not None:
            num_ended += 1
            jsonschema.validate(json.loads(b"".join(map(real_kimi.decode_bytes, ids[:-1])).decode()), schema)
        ids = write(grammars.answer(AnswerForm(tools=TOOLS, choice="get", has_parallel_calls=False, num_calls=3))(),
                    real_kimi, random.Random(seed), 400)  # fmt: skip
        parser = StreamParser(real_kimi, False, (), TOOLS, 3)
        assert not [piece.error for i in ids[:-1] for piece in parser.feed(i) if piece.error]
        assert parser.tool_calls[0].id == "functions.get:3" and json.loads(parser.tool_calls[0].arguments)["k"] in "ab"
    assert num_ended > 3
