"""Every value that a compiled schema lets through is valid by `jsonschema`; what cannot be enforced is named."""

import json
import random
import re
import warnings
from functools import cache

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from kimi_lite.engine.ecma_pattern import PatternError, translate
from kimi_lite.engine.grammar import AnswerForm, Grammars
from kimi_lite.engine.json_schema import MAX_INTEGER, SchemaError, prepare
from kimi_lite.text.tokenizer import Tokenizer
from tests.engine.fakes import tiny_metadata
from tests.engine.schemas import families, schemas, write


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer())


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(tiny_metadata())


def written(schema: dict, seed: int) -> str | None:
    """JSON at random by the schema."""
    make = grammars().answer(AnswerForm(schema=schema))
    ids = write(make(), tokenizer(), random.Random(seed))
    return None if ids is None else b"".join(map(tokenizer().decode_bytes, ids[:-1])).decode()


def require_valid(schema: dict, text: str) -> None:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Python warns of `[[`, which it reads as ECMA does
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def test_there_are_more_than_200_families() -> None:
    assert len({json.dumps(schema) for schema in families()}) >= 200


@pytest.mark.parametrize("schema", list(families()), ids=lambda schema: json.dumps(schema)[:60])
def test_what_a_family_lets_through_is_valid(schema: dict) -> None:
    texts = [written(schema, seed) for seed in range(12)]
    whole = [text for text in texts if text is not None]
    assert whole
    for text in whole:
        if r"\p{" not in json.dumps(schema).replace("\\\\", "\\"):  # Python's `re` does not know properties
            require_valid(schema, text)


@settings(max_examples=150, deadline=None)
@given(schemas, st.integers(0, 1000))
def test_what_any_schema_lets_through_is_valid(schema: dict, seed: int) -> None:
    try:
        text = written(schema, seed)
    except SchemaError as refused:
        if "cannot be made a grammar: " not in str(refused):  # of these only unsatisfiable ones are left
            raise
        return
    if text is not None and r"\p{" not in json.dumps(schema).replace("\\\\", "\\"):
        require_valid(schema, text)


_CLASS_PARTS = [
    "a",
    "b",
    "-",
    "^",
    "[",
    "&",
    "&&",
    '"',
    r"\\",
    r"\]",
    r"\d",
    r"\w",
    r"\s",
    r"\D",
    r"\W",
    r"\S",
    "é",
    "~",
]
_PARTS = ["a", "é", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"\.", "(?:a|b)", "(x)", r"\"", r"\\", " ", r"\x41"]


@st.composite
def patterns(draw) -> str:
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            parts.append(draw(st.sampled_from(_PARTS)))
        else:
            inside = "".join(draw(st.lists(st.sampled_from(_CLASS_PARTS), min_size=1, max_size=4)))
            parts.append(f"[{draw(st.sampled_from(['', '^']))}{inside}]")
        parts.append(draw(st.sampled_from(["", "", "?", "+", "{1,2}"])))
    return f"^{''.join(parts)}$"


@settings(max_examples=200, deadline=None)
@given(patterns(), st.integers(0, 1000))
def test_texts_of_any_pattern_match_it_in_python_and_as_ecma_reads_it(pattern: str, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            unicode, ascii_only = re.compile(pattern), re.compile(pattern, re.ASCII)
        except re.error:
            return
        try:
            text = written({"type": "string", "pattern": pattern}, seed)
        except SchemaError:
            return
    if text is not None:
        value = json.loads(text)
        assert unicode.search(value), (pattern, value)
        if r"\s" not in pattern.lower():  # ECMA's blanks are Unicode's, its digits and words are ASCII
            assert ascii_only.search(value), (pattern, value)


@pytest.mark.parametrize(
    "pattern",
    [r"^(?!a)", r"(?<=a)b", r"a++", r"a**", r"\bx", r"(?x)a", r"\Aa", r"a\z", r"\1", "[", "[]", r"\cA", "(?m)^a"],
)
def test_patterns_that_cannot_be_said_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        translate(pattern)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("not", {}), ("if", True), ("then", {}), ("else", {}), ("contains", {}), ("minContains", 1),
        ("uniqueItems", True), ("dependentRequired", {"a": ["b"]}), ("dependentSchemas", {}), ("dependencies", {}),
        ("minimun", 3), ("propertyNames", {"maxLength": 1}),
        ("unevaluatedProperties", False), ("unevaluatedItems", False),
        ("$dynamicRef", "#x"), ("$ref", "http://x/y"), ("$ref", "#/$defs/absent"), ("$ref", "#"),
        ("format", "regex"), ("format", "unknown"), ("format", "iri"),
        ("pattern", "^(?!a)"), ("pattern", "("), ("multipleOf", 0.1), ("multipleOf", 0), ("multipleOf", 10_007),
        ("minProperties", 2), ("maxItems", 10**6), ("minimum", True), ("exclusiveMinimum", True), ("type", "str"),
        ("const", 1e100), ("const", 2**70), ("enum", []), ("enum", [[{"a": 2**60}]]), ("enum", "a"), ("required", "a"),
        ("minLength", -1), ("items", 3), ("properties", []), ("anyOf", {}), ("minLength", 1.5), ("$defs", [1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 2])
def test_a_keyword_that_cannot_be_enforced_is_named_with_its_place(keyword: str, value: object, depth: int) -> None:
    schema: dict = {keyword: value}
    for _ in range(depth if keyword != "$ref" or value != "#" else 0):
        schema = {"type": "object", "properties": {"p": schema}, "required": ["p"]}
    with pytest.raises(SchemaError) as refused:
        grammars().answer(AnswerForm(schema=schema))
    assert keyword in str(refused.value) or refused.value.keyword == ""


def test_bounds_of_size_depth_and_time() -> None:
    deep: dict = {"type": "string"}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    long = {"enum": ["x" * 300_000]}
    steps = {"allOf": [{"multipleOf": 9999}, {"multipleOf": 9998}], "type": "integer"}
    slow = {"type": "string", "pattern": "^(a{1000}){1000}$"}
    for schema in (deep, wide, long, steps, slow):
        with pytest.raises(SchemaError):
            grammars().answer(AnswerForm(schema=schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"allOf": [{"$ref": "#/$defs/a"}]}]}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_schema_without_a_finite_value_is_refused(schema: dict) -> None:
    with pytest.raises(SchemaError, match="another one inside itself"):
        prepare(schema)


def test_integers_stay_exact_and_short() -> None:
    for limits in ({}, {"maximum": 2**64}, {"minimum": -(2**70)}, {"exclusiveMaximum": 2**60}):
        for seed in range(40):
            text = written({"type": "integer", **limits}, seed)
            assert text is not None and abs(int(text)) <= MAX_INTEGER


def test_a_client_cannot_loosen_the_grammar() -> None:
    """llguidance reads options out of schemas."""
    with pytest.raises(SchemaError, match="contains"):
        prepare({"x-guidance": {"lenient": True}, "type": "array", "contains": {}})
    assert "x-guidance" not in prepare({"x-guidance": {"whitespace_flexible": False}, "type": "array"}).schema


def test_blanks_end() -> None:
    make = grammars().answer(AnswerForm(schema={"type": "object"}))
    constraint, blank, brace = make(), tokenizer().encode(" ")[0], tokenizer().encode("{")[0]
    constraint.accept(brace)
    constraint.accept(blank)
    assert not constraint.allowed()[blank >> 5] >> (blank & 31) & 1


def can_write(schema: dict, text: str) -> bool:
    """Whether the grammar lets this through, byte by byte."""
    constraint = grammars().answer(AnswerForm(schema=schema))()
    for byte in text.encode():
        i = tokenizer().encode(chr(byte))[0] if byte < 128 else BYTE_IDS[byte]
        if not constraint.allowed()[i >> 5] >> (i & 31) & 1:
            return False
        constraint.accept(i)
    end = min(tokenizer().eos_ids)
    return bool(constraint.allowed()[end >> 5] >> (end & 31) & 1)


BYTE_IDS = {tokenizer().decode_bytes(i)[0]: i for i in range(256)}
NAMED = {"type": "object", "properties": {"a": {"type": "integer"}, "ab": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, r'"\u4e16"'), ({"type": "string"}, '"世"'), (NAMED, r'{"c":"\u4e16"}'),
        (NAMED, '{"b":1,"abc":2}'),
        (NAMED, '{"":"x","a ":"y"}'), ({"$defs": {"n": NAMED}, "items": {"$ref": "#/$defs/n"}}, r'[{"x":"\u4e16"}]'),
        ({"type": "object"}, r'{"\u0061": "\ud83d\ude00"}'), (NAMED, '{\n    "a": 1\n}'), (NAMED, '{"a": 1, "世": {}}'),
        ({"type": "number"}, "6.02e23"), ({"type": "integer"}, "-9007199254740991"),
    ],
)  # fmt: skip
def test_what_is_valid_and_usual_may_come(schema: dict, text: str) -> None:
    require_valid(schema, text)
    assert can_write(schema, text)


@pytest.mark.parametrize(
    "schema",
    [
        NAMED, {"$defs": {"n": NAMED}, "$ref": "#/$defs/n"}, {"allOf": [NAMED]}, {"anyOf": [NAMED, {"type": "null"}]},
        {**NAMED, "additionalProperties": {"type": "string"}}, {**NAMED, "patternProperties": {"^q": True}},
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
        {"$defs": {"n": NAMED}, "allOf": [{"$ref": "#/$defs/n"}]},
    ],
)  # fmt: skip
def test_an_escaped_name_is_no_way_around_its_schema(schema: dict) -> None:
    assert not can_write(schema, r'{"\u0061":"x"}')
