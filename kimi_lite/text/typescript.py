"""Tools declared to the model as TypeScript, the form Kimi K2.5 was trained on (JSON in its place costs accuracy).

One function type per tool; JSON-schema fields become members with their descriptions as comments. A schema that the
notation cannot express raises UnsupportedSchema, and the caller declares all tools as JSON instead.
"""

import json
from collections.abc import Mapping, Sequence

_STEP = "  "
_UNION = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_ENUM_TYPES = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "object": object,
    "array": object,
}
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}


class UnsupportedSchema(ValueError):
    """A tool's JSON schema has no TypeScript form here."""


def sort_keys(value: object) -> object:
    """`value` with the keys of every dict in it sorted and the order of lists kept."""
    if isinstance(value, dict):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    return [sort_keys(item) for item in value] if isinstance(value, list) else value


def declare_tools(tools: Sequence[Mapping]) -> str:
    """The declaration of key-sorted OpenAI-style `tools`; "" when none is a function. Raises UnsupportedSchema."""
    functions = [
        _function(_mapping(tool.get("function"))) for tool in map(_mapping, tools) if tool.get("type") == "function"
    ]
    if not functions:
        return ""
    return "\n".join(("# Tools", "", "## functions", "namespace functions {", *functions, "}", ""))


def _mapping(value: object) -> Mapping:
    if not isinstance(value, Mapping):
        raise UnsupportedSchema(f"a schema object is needed, not {type(value).__name__}")
    return value


def _list(value: object) -> list:
    if not isinstance(value, list):
        raise UnsupportedSchema(f"a list is needed, not {type(value).__name__}")
    return value


def _function(function: Mapping) -> str:
    name, parameters = function.get("name"), _mapping(function.get("parameters") or {})
    if not isinstance(name, str):
        raise UnsupportedSchema("a function has no name")
    definitions = _mapping(parameters.get("$defs", {}))
    lines, type_text = [], "parameters"
    if _refers_to_root({key: value for key, value in parameters.items() if key != "$defs"}):
        members = ",\n".join(_fields(parameters, _STEP, definitions, is_required_first=False))
        lines.append(f"interface parameters {{\n{members}\n}}")
    else:
        type_text = _object(parameters, "", definitions)
    for key, schema in definitions.items():
        lines += [*_description(_mapping(schema), ""), f"interface {key} {_type(schema, '', definitions)}"]
    lines += [*_description(function, ""), f"type {name} = (_: {type_text}) => any;"]
    return "\n".join(lines)


def _refers_to_root(schema: object) -> bool:
    if isinstance(schema, Mapping):
        return schema.get("$ref") == "#" or any(map(_refers_to_root, schema.values()))
    return isinstance(schema, list) and any(map(_refers_to_root, schema))


def _object(schema: Mapping, indent: str, definitions: Mapping) -> str:
    inner = indent + _STEP
    members = _fields(schema, inner, definitions)
    more = schema.get("additionalProperties")
    if more is not None:
        value = ("any" if more else "never") if isinstance(more, bool) else _type(more, inner, definitions)
        members.append(f"{inner}[k: string]: {value}")
    return "{\n" + ",\n".join(members) + f"\n{indent}}}" if members else "{}"


def _fields(schema: Mapping, indent: str, definitions: Mapping, is_required_first: bool = True) -> list[str]:
    """One text per field, comments included; required fields first, each part in key order."""
    properties, required = _mapping(schema.get("properties") or {}), _list(schema.get("required") or [])
    fields = []
    for name in sorted(properties, key=lambda name: (is_required_first and name not in required, name)):
        field = properties[name]
        lines = [*_description(field, indent), *_limits(field, indent), *_default(field, indent)]
        lines.append(f"{indent}{name}{'' if name in required else '?'}: {_type(field, indent, definitions)}")
        fields.append("\n".join(lines))
    return fields


def _description(schema: object, indent: str) -> list[str]:
    """The description line by line as comments; an empty line stays empty."""
    text = schema.get("description") if isinstance(schema, Mapping) else None
    return [f"{indent}// {line}" if line else "" for line in str(text).split("\n")] if text else []


def _limits(schema: object, indent: str) -> list[str]:
    """What the type alone does not say: one comment of `key: value` pairs."""
    if not isinstance(schema, Mapping) or any(key in schema for key in ("$ref", "anyOf", "enum")):
        return []
    kind = schema.get("type")
    keys = _CONSTRAINTS.get(kind, ()) if isinstance(kind, str) else ()
    limits = [f"{key}: {schema[key]}" for key in keys if key in schema]
    return [f"{indent}// {', '.join(limits)}"] if limits else []


def _default(schema: object, indent: str) -> list[str]:
    default = schema.get("default") if isinstance(schema, Mapping) else None
    if default is None:
        return []
    text = repr(default) if isinstance(default, (bool, int, float)) else json.dumps(default, ensure_ascii=False)
    return [f"{indent}// Default: {text}"]


def _type(schema: object, indent: str, definitions: Mapping) -> str:
    """The type expression of one schema. Looked at in this order: $ref, anyOf, enum, type, nothing."""
    if isinstance(schema, bool):
        return "any" if schema else "null"
    schema = _mapping(schema)
    if "$ref" in schema:
        return _reference(schema["$ref"], definitions)
    if "anyOf" in schema:
        return " | ".join(_type(option, indent, definitions) for option in _list(schema["anyOf"]))
    if "enum" in schema:
        return _enum(schema)
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_UNION[_known(one)] for one in kind)
    if kind == "object":
        return _object(schema, indent, definitions)
    if kind == "array":
        return _array(schema, indent, definitions)
    if schema:
        return _UNION[_known(kind)]
    return "any"


def _known(kind: object) -> str:
    if not isinstance(kind, str) or kind not in _UNION:
        raise UnsupportedSchema(f"type {kind!r}")
    return kind


def _enum(schema: Mapping) -> str:
    """Values as literals; they must be of the declared type (or null), else the schema contradicts itself."""
    kinds, values = schema.get("type", []), _list(schema["enum"])
    allowed = tuple(
        _ENUM_TYPES[_known(kind)] for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null"
    )
    if len(allowed) > 1 or (allowed and not all(value is None or isinstance(value, allowed[0]) for value in values)):
        raise UnsupportedSchema(f"enum {values!r} of type {kinds!r}")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def _reference(target: object, definitions: Mapping) -> str:
    if target == "#":
        return "parameters"
    name = target.removeprefix("#/$defs/") if isinstance(target, str) else ""
    if name == target or name not in definitions:
        raise UnsupportedSchema(f"$ref {target!r} is not among the $defs")
    return name


def _array(schema: Mapping, indent: str, definitions: Mapping) -> str:
    items = schema.get("items")
    if not items:
        return "Array<any>"
    inner = indent + _STEP
    comments = [*_description(items, inner), *_limits(items, inner)]
    if not comments:
        return f"Array<{_type(items, indent, definitions)}>"
    return "\n".join(["Array<", *comments, f"{inner}{_type(items, inner, definitions)}", f"{indent}>"])
