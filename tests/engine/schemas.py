"""JSON schemas of many kinds, and what is written at random within a constraint."""

import random
from collections.abc import Iterator, Mapping

import numpy as np
from hypothesis import strategies as st

from kimi_lite.engine.sampler import unpack_bits
from kimi_lite.engine.types import Constraint
from kimi_lite.text.tokenizer import Tokenizer

_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_POINT = {"type": "object", "properties": {"x": _INTEGER, "y": _INTEGER}, "required": ["x", "y"]}
_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": _INTEGER, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
_LIST = {
    "$defs": {
        "cell": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/cell"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/cell",
}
_PATTERNS = (
    r"^\w+$", r"^\W{1,3}$", r"^\d\D\s\S$", r"^[\w-]{1,9}$", r"^[^\w]{1,3}$", r"^[\W\d]{2}$", r"^[^\W]{2}$", r"^[[a]b]$",
    r"^[a&&b]{2}$", r"^[a-c-e]{3}$", r"^[\s\S]{2}$", r"^.{3}$", r"^[^\s]{3}$", r"^a{2,3}?b$", r"^(?:ab|cd)+$",
    r"^(?P<x>a)b$", r"(?i)^hello$", r"^\u00e9\x41\/\-$", r"^[+\-]?\d{1,3}(?:\.\d+)?$", r'^[^"\\]{2}$', r'^[^"]+$',
    r"^[^\\]+$", r"^[\[\]]+$", r"^(foo|bar)", r"a|b", r"z$", r"^$", r"^\$\{x\}$", r"^[\d\-.]+$", "^[\u4e00-\u9fa5]{2}$",
    r"^#[0-9a-fA-F]{6}$", r"^[^@\s]{1,20}@[^@\s]{1,20}\.[a-z]{2,3}$", r"^[\x00-\x1f]$", r"^[^a]{2}$", r'^["\\]{2}$',
    r"^\n\t$", r"^[a\-z]{2}$", r"^\p{Lu}$", r"^(a|b|)c?$",
)  # fmt: skip
_NUMBERS = (
    {"minimum": 0.1, "maximum": 0.3}, {"exclusiveMinimum": -1e-3}, {"maximum": -2.5}, {"minimum": -1.5},
    {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"minimum": 10, "maximum": 11}, {"multipleOf": 2},
    {"minimum": -7.25, "exclusiveMaximum": 1e3}, {},
)  # fmt: skip
_INTEGERS = (
    {}, {"minimum": 0}, {"maximum": -5}, {"minimum": 17, "maximum": 23}, {"exclusiveMinimum": 3}, {"multipleOf": 4},
    {"exclusiveMaximum": 100, "minimum": -100}, {"multipleOf": 7, "minimum": 3, "maximum": 100}, {"minimum": 1.5},
    {"maximum": 2**63 - 1}, {"minimum": 0, "maximum": 2**64 - 1}, {"format": "int32"}, {"minimum": -(2**63)},
)  # fmt: skip
_FORMATS = ("date", "time", "date-time", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "duration", "password")
_CONSTANTS = (1, -3, 0, 1.5, 0.1, 1e-7, True, None, "", "x", 'ä"\\\u2028\n', "世界", [1, [2]], {"a": {"b": []}}, [], {})
_COMBINED = (
    {"anyOf": [_STRING, _INTEGER]},
    {"anyOf": [_POINT, {"type": "null"}]},
    {"anyOf": [{"properties": {"a": _STRING}, "required": ["a"], "type": "object"}, _POINT]},
    {"oneOf": [_STRING, _INTEGER, {"type": "null"}]},
    {"oneOf": [{"const": 1, "title": "one"}, {"const": 2}, {"type": "string", "const": "a"}]},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in "abc"]},
    {"allOf": [_POINT, {"properties": {"z": _STRING}, "required": ["z"]}]},
    {"allOf": [{"minimum": 3}, {"maximum": 10}], "type": "integer"},
    {"allOf": [{"pattern": "^a"}, {"pattern": "b$"}], "type": "string"},
    {"allOf": [{"multipleOf": 4}, {"multipleOf": 6}], "type": "integer"},
    {"type": "object", "properties": {"a": _STRING}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"type": ["string", "null", "integer"], "minLength": 2, "minimum": 7},
    {"enum": ["a", "bb", 1, None], "minLength": 2},
    {"type": "string", "enum": ["a", "b"]},
)  # fmt: skip
_OBJECTS = (
    {"type": "object"}, {"type": "object", "properties": {}}, _POINT, {**_POINT, "additionalProperties": False},
    {"type": "object", "additionalProperties": _INTEGER}, {"type": "object", "minProperties": 1},
    {"type": "object", "maxProperties": 2}, {"type": "object", "required": ["a"], "minProperties": 2},
    {"type": "object", "properties": {"é\"\\": _STRING, "": _INTEGER, "世": {}}, "required": [""]},
    {"type": "object", "patternProperties": {"^a": _STRING}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^[^\"]$": _INTEGER}},
    {"type": "object", "patternProperties": {"^[[a]b]": _INTEGER}, "properties": {"q": _STRING}},
    {"type": "object", "properties": {"a": False, "b": True}}, {"properties": {"a": _STRING}, "required": ["a"]},
    {"type": "object", "properties": {"q\"": {"type": "integer"}}, "additionalProperties": _STRING},
    {"type": "object", "additionalProperties": False}, {"type": "object", "required": ["x", "y"]},
    {"type": "object", "properties": {f"p{i}": _STRING for i in range(40)}, "required": [f"p{i}" for i in range(5)]},
)  # fmt: skip
_ARRAYS = (
    {"type": "array"}, {"type": "array", "items": _STRING, "minItems": 1, "maxItems": 2}, {"items": _INTEGER},
    {"type": "array", "prefixItems": [_STRING, _INTEGER], "items": False},
    {"type": "array", "prefixItems": [_STRING, _INTEGER], "minItems": 3}, {"type": "array", "maxItems": 0},
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [_STRING, _INTEGER],
     "additionalItems": False},
    {"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 2}, "minItems": 2},
    {"type": "array", "items": _POINT, "minItems": 1, "uniqueItems": False},
)  # fmt: skip
_REFERENCES = (
    _TREE, _LIST,
    {"$defs": {"a/b": _STRING, "c%d": _INTEGER}, "anyOf": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/c%25d"}]},
    {"definitions": {"p": _POINT}, "type": "array", "items": {"$ref": "#/definitions/p"}},
    {"type": "object", "properties": {"self": {"$ref": "#"}, "n": _INTEGER}, "required": ["n"]},
    {"type": "object", "properties": {"a": _STRING, "b": {"$ref": "#/properties/a"}}, "required": ["b"]},
    {"$defs": {"s": _STRING}, "type": "array", "items": {"$ref": "#/$defs/s", "minLength": 3}},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"enum": ["deep"]}}, "$ref": "#/$defs/a"},
)  # fmt: skip
_BARE = (
    {},
    {"minLength": 3},
    {"required": ["a"]},
    {"additionalProperties": False},
    {"title": "t", "x-y": 1},
    {"minimum": 3},
)


def families() -> Iterator[dict]:
    """More than 200 schemas, each of which a grammar can enforce."""
    for pattern in _PATTERNS:
        yield {"type": "string", "pattern": pattern}
    for limits in ({}, {"minLength": 2}, {"maxLength": 3}, {"minLength": 2, "maxLength": 2}, {"maxLength": 2**31 - 1}):
        yield {"type": "string", **limits}
    for limits in _NUMBERS:
        yield {"type": "number", **limits}
    for limits in _INTEGERS:
        yield {"type": "integer", **limits}
        yield {"type": ["integer", "null"], **limits}
    for name in _FORMATS:
        yield {"type": "string", "format": name}
        yield {"type": "object", "properties": {"f": {"type": ["string", "null"], "format": name}}, "required": ["f"]}
    for constant in _CONSTANTS:
        yield {"const": constant}
        yield {"type": "object", "properties": {"k": {"enum": [constant, "other"]}}, "required": ["k"]}
    for schema in (*_COMBINED, *_OBJECTS, *_ARRAYS, *_REFERENCES, *_BARE, {"type": "boolean"}, {"type": "null"}):
        yield schema
    for schema in (*_COMBINED, *_OBJECTS, *_ARRAYS):
        yield {"type": "object", "properties": {"in": schema, "n": _INTEGER}, "required": ["in"]}


def _limits(least: str, most: str, values: st.SearchStrategy) -> st.SearchStrategy[dict]:
    pairs = st.tuples(values, values).map(sorted)
    both = pairs.map(lambda pair: {least: pair[0], most: pair[1]})
    return st.one_of(
        st.just({}), values.map(lambda value: {least: value}), values.map(lambda value: {most: value}), both
    )


_texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6)
_leaves = st.one_of(
    _limits("minLength", "maxLength", st.integers(0, 6)).map(lambda limits: {"type": "string", **limits}),
    _limits("minimum", "maximum", st.integers(-300, 300)).map(lambda limits: {"type": "integer", **limits}),
    _limits("minimum", "maximum", st.decimals(-99, 99, places=2).map(float)).map(lambda e: {"type": "number", **e}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "integer"]}]),
    st.lists(st.one_of(_texts, st.integers(-99, 99), st.none()), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(_PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(_FORMATS).map(lambda name: {"type": "string", "format": name}),
)


@st.composite
def _object(draw, inner: st.SearchStrategy) -> dict:
    properties = draw(st.dictionaries(_texts, inner, max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    rest = draw(st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": _INTEGER}]))
    return {"type": "object", "properties": properties, "required": required, **rest}


def _wider(inner: st.SearchStrategy) -> st.SearchStrategy:
    limits = _limits("minItems", "maxItems", st.integers(0, 3))
    return st.one_of(
        _object(inner),
        st.builds(lambda items, limits: {"type": "array", "items": items, **limits}, inner, limits),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
    )


schemas = st.recursive(_leaves, _wider, max_leaves=6)


def write(constraint: Constraint, tokenizer: Tokenizer, rng: random.Random, num_most: int = 3000) -> list[int] | None:
    """Tokens at random within the constraint up to an end of turn, mostly plain ones and those that close something;
    None where it does not end in so many."""
    closing = {i for i in range(tokenizer.vocab_size) if tokenizer.decode_bytes(i) in (b'"', b"]", b"}")}
    closing |= tokenizer.eos_ids
    plain = set(tokenizer.encode("abz019 "))
    ids: list[int] = []
    while len(ids) < num_most:
        bits = constraint.allowed()
        assert bits is not None
        allowed = np.flatnonzero(unpack_bits(bits, tokenizer.vocab_size)).tolist()
        assert allowed, tokenizer.decode(ids)
        near, low = [i for i in allowed if i in closing], [i for i in allowed if i in plain]
        chosen = rng.choice(near if near and rng.random() < 0.5 else low if low and rng.random() < 0.5 else allowed)
        ids.append(chosen)
        constraint.accept(chosen)
        if chosen in tokenizer.eos_ids:
            return ids
    return None


def tool(name: str, parameters: Mapping) -> dict:
    """An OpenAI-shaped declaration."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}
