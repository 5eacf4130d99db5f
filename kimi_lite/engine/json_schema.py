"""JSON schemas in the form that llguidance compiles to a grammar, every keyword of them honoured.

`prepare` walks a schema: a keyword that the grammar would not enforce is an error that names it, annotations are left
out, and where llguidance is looser than JSON Schema (found by generating values at random and asking `jsonschema`) the
schema is made narrower. So each value that the grammar lets through is valid. Integers stay within 2**53, in which all
readers of JSON agree (RFC 8259, section 6), which also bounds their digits. Called by `engine.grammar`.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from kimi_lite.engine.ecma_pattern import PatternError, translate
from kimi_lite.errors import KimiLiteError

Schema = Mapping[str, Any] | bool


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MAX_BYTES = 256 << 10  # of a schema as JSON
MAX_DEPTH = 48  # of schemas inside each other
MAX_SCHEMAS = 1500  # inside one; compiling takes time that grows with the square
MAX_ITEMS = 10_000
MAX_STEP = 10_000  # least common multiple of all `multipleOf`: its automaton has as many states
MAX_NAMES, MAX_NAME = 20_000, 200  # characters of the properties of an object, of one of them
MAX_INTEGER = 2**53 - 1

_ANNOTATIONS = _words(
    "$schema $id $comment $anchor $vocabulary id title description default examples example deprecated readOnly "
    "writeOnly contentEncoding contentMediaType contentSchema nullable discriminator xml externalDocs "
    "propertyOrdering enumDescriptions enumNames markdownDescription markdownEnumDescriptions errorMessage"
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONE = ("additionalProperties", "items", "additionalItems")
_VALUES = _words(
    "type enum const minLength maxLength pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "minItems maxItems minProperties maxProperties required $ref"
)
_NO_CHANGE = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True, "propertyNames": True}
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const")
_TYPE_OF_KEYWORD = {
    "object": ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
}

_YEAR = r"(?:000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})"
_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+\-](?:[01]\d|2[0-3]):[0-5]\d)"
_OWN_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}  # RFC 3339
_COMPILED_FORMATS = ("email", "hostname", "ipv4", "ipv6", "uri", "uuid", "duration")  # llguidance has them
_FREE_FORMATS = ("int64", "uint64", "float", "double", "password")  # OpenAPI's; they say no more than the type does
_INT32 = {"minimum": -(2**31), "maximum": 2**31 - 1}


class SchemaError(KimiLiteError):
    """A schema cannot be a grammar. `keyword` is what in it cannot; "" where it is the schema as a whole."""

    def __init__(self, place: str, keyword: str, problem: str, hint: str = "") -> None:
        where = f"{place}.{keyword}" if keyword else place
        super().__init__(f"{where}: {problem}.", hint)
        self.place, self.keyword = place, keyword


class Prepared(NamedTuple):
    """A schema to compile. `may_escape`: its texts may hold `\\u4e16`. llguidance 1.9 lets an escaped name pass for
    one that is not declared; where that could be, nothing is escaped by number."""

    schema: dict[str, Any] | bool
    may_escape: bool


def prepare(schema: Schema, place: str = "schema") -> Prepared:
    """The schema to compile; SchemaError that names the keyword and its place where it asks for what a grammar cannot
    enforce."""
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, TypeError, RecursionError):
        raise SchemaError(place, "", "it is no JSON, or nested too deep") from None
    if size > MAX_BYTES:
        raise SchemaError(place, "", f"it has {size:,} bytes; {MAX_BYTES:,} are allowed")
    prepared = _Preparation(place, _refers_alone(schema)).schema(schema, place, 0, is_whole=True)
    _require_an_end(prepared, place)
    return Prepared(prepared, _has_no_open_names(prepared))


class _Preparation:
    """One walk over one schema."""

    def __init__(self, place: str, are_definitions_whole: bool) -> None:
        self._are_definitions_whole = are_definitions_whole
        self._root, self._num_schemas, self._step = place, 0, 1

    def schema(self, schema: object, place: str, depth: int, is_whole: bool = False) -> dict[str, Any] | bool:
        """`is_whole`: no other schema speaks about the same value, so a missing type may be filled in."""
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            raise SchemaError(self._root, "", f"it holds more than {MAX_SCHEMAS:,} schemas")
        if depth > MAX_DEPTH:
            raise SchemaError(place, "", f"it is nested deeper than {MAX_DEPTH} schemas")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise SchemaError(place, "", f"a schema is an object or a boolean, not {schema!r}"[:200])
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            self._require_known(keyword, value, place)
            under = f"{place}.{keyword}"
            if keyword in _MAPS:
                result[keyword] = self._map(keyword, value, place, depth)
            elif keyword in _LISTS or (keyword == "items" and isinstance(value, list)):
                if not isinstance(value, list):
                    raise SchemaError(place, keyword, "it must be a list of schemas")
                whole = keyword in ("prefixItems", "items")
                result[keyword] = [self.schema(s, f"{under}.{i}", depth + 1, whole) for i, s in enumerate(value)]
            elif keyword in _ONE:
                result[keyword] = self.schema(value, under, depth + 1, is_whole=True)
            elif keyword in _VALUES:
                result[keyword] = value
        if is_whole:
            self._fill_type(result)
        self._check_values(result, place)
        self._check_object(result, place)
        if is_whole:
            _spell_other_names(result)
        self._bound_integers(result, place)
        self._rewrite_texts(result, place)
        _unite_constants(result)
        return result

    def _require_known(self, keyword: str, value: object, place: str) -> None:
        known = (*_MAPS, *_LISTS, *_ONE, *_VALUES)
        is_true = keyword in _NO_CHANGE and (value is _NO_CHANGE[keyword] or value == {})
        if keyword in known or keyword in _ANNOTATIONS or keyword.startswith("x-") or is_true:
            if keyword in ("$id", "id") and place != self._root and isinstance(value, str):
                raise SchemaError(place, keyword, "only the whole schema may have a name of its own")
            return
        raise SchemaError(place, keyword, "this keyword is not supported", "Leave it out, or check it afterwards.")

    def _map(self, keyword: str, value: object, place: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise SchemaError(place, keyword, "it must be an object of schemas")
        under = f"{place}.{keyword}"
        whole = keyword in ("properties", "patternProperties") or self._are_definitions_whole
        schemas = {name: self.schema(s, f"{under}.{name}", depth + 1, whole) for name, s in value.items()}
        if keyword != "patternProperties":
            return schemas
        return {self._pattern(name, place, keyword): s for name, s in schemas.items()}

    def _pattern(self, pattern: object, place: str, keyword: str) -> str:
        try:
            if not isinstance(pattern, str):
                raise PatternError("it must be a text")
            return translate(pattern)
        except PatternError as error:
            raise SchemaError(place, keyword, f"the pattern {pattern!r} cannot be used: {error}"[:300]) from None

    @staticmethod
    def _fill_type(schema: dict[str, Any]) -> None:
        """What has keywords of one type only is meant to be of that type; JSON Schema would take any other, too."""
        if "type" in schema or any(keyword in schema for keyword in _COMBINED):
            return
        found = [kind for kind, keywords in _TYPE_OF_KEYWORD.items() if any(k in schema for k in keywords)]
        if len(found) == 1:
            schema["type"] = found[0]

    def _check_values(self, schema: dict[str, Any], place: str) -> None:
        types = schema.get("type", [])
        for kind in types if isinstance(types, list) else [types]:
            if kind not in _TYPES:
                raise SchemaError(place, "type", f"{kind!r} is no type; the types are {', '.join(_TYPES)}")
        reference = schema.get("$ref", "#")
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise SchemaError(place, "$ref", f"{reference!r} is not within this schema; use #/$defs/NAME")
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
            if not _is_number(schema.get(keyword, 0)):
                raise SchemaError(place, keyword, f"{schema[keyword]!r} is no number")
        for keyword in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
            value = schema.get(keyword, 0)
            if not _is_number(value) or value < 0 or value != int(value):
                raise SchemaError(place, keyword, f"{value!r} is no number of 0 or more")
            if "Length" not in keyword and value > MAX_ITEMS:
                raise SchemaError(place, keyword, f"{value:,} is more than {MAX_ITEMS:,}")
        step = schema.get("multipleOf", 1)
        if step != int(step) or step < 1:
            raise SchemaError(place, "multipleOf", f"{step!r} is no whole number of 1 or more: binary fractions differ")
        self._step = math.lcm(self._step, int(step))
        if self._step > MAX_STEP:
            raise SchemaError(place, "multipleOf", f"all together need {self._step:,} states; at most {MAX_STEP:,}")
        values = [("const", schema["const"])] if "const" in schema else []
        choices = schema.get("enum", [])
        if not isinstance(choices, list) or ("enum" in schema and not choices):
            raise SchemaError(place, "enum", "it must be a list of at least one value")
        for keyword, value in [*values, *(("enum", choice) for choice in choices)]:
            if (number := _inexact(value)) is not None:
                raise SchemaError(place, keyword, f"{number!r} is no number that all readers of JSON read alike")

    @staticmethod
    def _check_object(schema: dict[str, Any], place: str) -> None:
        """Names that are free may come twice, and then there are fewer properties than were counted."""
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaError(place, "required", "it must be a list of names")
        most = len(set(required)) + 1
        if schema.get("minProperties", 0) > most:
            raise SchemaError(place, "minProperties", f"with {most - 1} required names it may be at most {most}")

    @staticmethod
    def _bound_integers(schema: dict[str, Any], place: str) -> None:
        types = schema.get("type", [])
        types = types if isinstance(types, list) else [types]
        if schema.get("format") == "int32":
            schema["minimum"] = max(schema.get("minimum", -math.inf), _INT32["minimum"])
            schema["maximum"] = min(schema.get("maximum", math.inf), _INT32["maximum"])
        if "integer" not in types or "number" in types or "const" in schema or "enum" in schema:
            return
        for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            if abs(schema.get(keyword, 0)) > MAX_INTEGER:
                number = schema.pop(keyword)
                if (number > 0) == (keyword == "exclusiveMinimum"):
                    raise SchemaError(place, keyword, f"integers go to {MAX_INTEGER:,} only")
        least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if least > MAX_INTEGER or most < -MAX_INTEGER:
            raise SchemaError(place, "minimum" if least > 0 else "maximum", f"integers go to {MAX_INTEGER:,} only")
        if least < -MAX_INTEGER and "exclusiveMinimum" not in schema:
            schema["minimum"] = -MAX_INTEGER
        if most > MAX_INTEGER and "exclusiveMaximum" not in schema:
            schema["maximum"] = MAX_INTEGER

    def _rewrite_texts(self, schema: dict[str, Any], place: str) -> None:
        if "pattern" in schema:
            schema["pattern"] = self._pattern(schema["pattern"], place, "pattern")
        name = schema.get("format")
        if name is None:
            return
        if not isinstance(name, str):
            raise SchemaError(place, "format", f"it is {name!r:.40}, not a name", "")
        if name in _COMPILED_FORMATS:
            return
        del schema["format"]
        if name in _OWN_FORMATS:
            schema["allOf"] = [*schema.get("allOf", []), {"pattern": _OWN_FORMATS[name]}]
        elif name not in _FREE_FORMATS and name != "int32":
            known = ", ".join((*_OWN_FORMATS, *_COMPILED_FORMATS))
            raise SchemaError(place, "format", f"{name!r} is not supported", f"These are: {known}.")


def _spell_other_names(schema: dict[str, Any]) -> None:
    """`additionalProperties` as a pattern of all names but the declared ones: names by a pattern are never escaped."""
    names = list(schema.get("properties", ()))
    is_plain = "patternProperties" not in schema and not any(keyword in schema for keyword in _COMBINED)
    others = schema.get("additionalProperties", True)
    is_short = sum(map(len, names)) <= MAX_NAMES and max(map(len, names), default=0) <= MAX_NAME
    if names and is_plain and is_short and others is not False:
        schema["patternProperties"] = {f"^{_other_than(names)}$": others}
        schema["additionalProperties"] = False


def _other_than(names: list[str]) -> str:
    """A pattern of every text but these (and but NUL)."""
    initials = sorted({name[0] for name in names if name})
    options = [re.escape(c) + _other_than([name[1:] for name in names if name.startswith(c)]) for c in initials]
    options.append(rf"[^\x00{''.join(map(_in_class, initials))}][^\x00]*")
    return f"(?:{'|'.join(options)}{'' if '' in names else '|'})"


def _in_class(char: str) -> str:
    return f"\\{char}" if char in "\\]^-[&~" else char


def _has_no_open_names(part: object) -> bool:
    if not isinstance(part, dict):
        return True
    is_open = part.get("additionalProperties", True) is not False
    if is_open and (part.get("properties") or part.get("patternProperties") or part.get("minProperties", 0) > 1):
        return False
    return all(_has_no_open_names(each) for each in _inner(part))


def _refers_alone(part: object) -> bool:
    """Whether definitions speak alone about the values they are for: a reference stands alone."""
    if isinstance(part, list):
        return all(map(_refers_alone, part))
    if not isinstance(part, Mapping):
        return True
    others = part.keys() - {*_ANNOTATIONS, "$defs", "definitions"}
    is_alone = "$ref" not in part or len(others) == 1
    is_alone &= not (part.keys() & {"anyOf", "oneOf"} and part.keys() & {*_TYPE_OF_KEYWORD["object"]})
    return "allOf" not in part and is_alone and all(map(_refers_alone, part.values()))


def _unite_constants(schema: dict[str, Any]) -> None:
    """`oneOf` different constants is an `enum`: numbers among them could not be told apart otherwise."""
    branches = schema.get("oneOf", ())
    constants = [branch["const"] for branch in branches if isinstance(branch, dict) and _is_constant(branch)]
    num_different = len({_key(constant) for constant in constants})
    if branches and num_different == len(branches) and "enum" not in schema:
        schema["enum"] = constants
        del schema["oneOf"]


def _is_constant(branch: dict[str, Any]) -> bool:
    kind = {str: "string", int: "integer", bool: "boolean", type(None): "null"}.get(type(branch.get("const")))
    return "const" in branch and (branch.keys() == {"const"} or branch == {"const": branch["const"], "type": kind})


def _key(value: object) -> object:
    """Equal for what JSON Schema calls equal: 1 and 1.0 are, 1 and true are not."""
    return (type(value) is bool, float(value)) if isinstance(value, (int, float)) else json.dumps(value, sort_keys=True)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _inexact(value: object) -> int | float | None:
    """A number in a constant that does not come back as it is, if there is one."""
    if isinstance(value, Mapping):
        return next((n for v in value.values() if (n := _inexact(v)) is not None), None)
    if isinstance(value, list):
        return next((n for v in value if (n := _inexact(v)) is not None), None)
    return value if isinstance(value, (int, float)) and abs(value) > MAX_INTEGER else None


def _require_an_end(schema: dict[str, Any] | bool, place: str) -> None:
    """Refuse references that lead nowhere, and a schema whose every value would hold another one of its kind."""
    budget = 50_000
    known: set[str] = set()

    def resolve(reference: str) -> object:
        found: Any = schema
        for part in reference[2:].split("/") if reference != "#" else ():
            name = _unescape(part)
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SchemaError(place, "$ref", f"{reference!r} leads nowhere") from None
        if not isinstance(found, (dict, bool)):
            raise SchemaError(place, "$ref", f"{reference!r} leads to no schema")
        return found

    def ends(part: object, open_references: frozenset[str]) -> bool:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise SchemaError(place, "$ref", "its references are too entangled")
        if not isinstance(part, dict):
            return part is not False
        if "enum" in part or "const" in part:
            return True
        if (reference := part.get("$ref")) is not None and reference not in known:
            if reference in open_references or not ends(resolve(reference), open_references | {reference}):
                return False
            known.add(reference)
        needed = [part.get("properties", {}).get(name, True) for name in part.get("required", ())]
        if part.get("minItems", 0) > 0:
            items = part.get("prefixItems") or part.get("items", True)
            needed += items[: int(part["minItems"])] if isinstance(items, list) else [items]
        needed += part.get("allOf", ())
        if not _types(part) or _types(part) - {"object", "array"}:  # a value that holds no others will do
            needed = list(part.get("allOf", ()))
        return all(ends(each, open_references) for each in needed) and all(
            any(ends(each, open_references) for each in part[name]) for name in ("anyOf", "oneOf") if name in part
        )

    if not ends(schema, frozenset()):
        raise SchemaError(place, "$ref", "no value could satisfy it: it needs another one inside itself")
    for reference in _references(schema):
        resolve(reference)


def _types(schema: dict[str, Any]) -> set[str]:
    types = schema.get("type", [])
    return set(types if isinstance(types, list) else [types])


def _references(part: object) -> set[str]:
    """Of all schemas inside; constants are not looked at."""
    if not isinstance(part, dict):
        return set()
    inner = {reference for each in _inner(part) for reference in _references(each)}
    return inner | ({part["$ref"]} if "$ref" in part else set())


def _inner(schema: dict[str, Any]) -> list[Any]:
    """The schemas right inside."""
    inner = [schema[keyword] for keyword in _ONE if keyword in schema]
    inner = [each for value in inner for each in (value if isinstance(value, list) else [value])]
    inner += [each for keyword in _LISTS for each in schema.get(keyword, ())]
    return inner + [each for keyword in _MAPS for each in schema.get(keyword, {}).values()]


def _unescape(part: str) -> str:
    """A part of a JSON pointer in a URI fragment (RFC 6901)."""
    return unquote(part).replace("~1", "/").replace("~0", "~")
