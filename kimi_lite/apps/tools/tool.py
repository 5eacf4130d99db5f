"""What a tool is, and what its caller must get right. `apps.tools.box` calls tools; its neighbours make them.

Whatever goes wrong in a call is told to the model, which can do better: `ToolError` with words that say how.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST_RESULT = 20_000  # characters; about 5,000 tokens
UNUSABLE_CALL = "[A tool call could not be used. {error} Call a tool by its name, with one JSON object as arguments.]"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
ShouldStop = Callable[[], bool]
Run = Callable[[dict[str, Any], ShouldStop], str]


class ToolError(Exception):
    """A call that did not work; the text is for the model."""


@dataclass(frozen=True, slots=True)
class Tool:
    """`parameters` is a JSON schema; `run` takes arguments that were checked against it, and a question to ask now and
    then."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Run
    origin: str = ""  # the MCP server it comes from
    risks: tuple[str, ...] = ()  # sentences on what does not confine it here; then it is never run without a question

    @property
    def declaration(self) -> dict[str, Any]:
        """As the OpenAI API declares it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def parameters(required: tuple[str, ...] = (), **properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object with these properties and no others."""
    return {"type": "object", "properties": dict(properties), "required": list(required), "additionalProperties": False}


def read_arguments(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, as the model wrote them, checked; ToolError with what is wrong."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments are not valid JSON: {error}. Call again with a JSON object") from error
    if not isinstance(arguments, dict):
        raise ToolError("the arguments are not a JSON object. Call again with one")
    check_arguments(arguments, schema)
    return arguments


def check_arguments(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """ToolError where required arguments are missing, unknown ones given, or simple types wrong; deeper ones are the
    tool's."""
    properties = schema.get("properties") or {}
    missing = [name for name in schema.get("required") or () if name not in arguments]
    if missing:
        raise ToolError(f"required argument(s) missing: {', '.join(missing)}")
    unknown = [name for name in arguments if name not in properties]
    if unknown and schema.get("additionalProperties") is False:
        raise ToolError(f"unknown argument(s): {', '.join(unknown)}; known are: {', '.join(properties) or 'none'}")
    for name, value in arguments.items():
        expected = properties.get(name, {}).get("type") if isinstance(properties.get(name), Mapping) else None
        if isinstance(expected, str) and expected in _TYPES and not _is_of(value, expected):
            raise ToolError(f"argument {name} must be of type {expected}, and is {value!r:.80}")


def _is_of(value: object, expected: str) -> bool:
    if isinstance(value, bool):
        return expected == "boolean"
    if isinstance(value, float) and expected == "integer":
        return value.is_integer()
    return isinstance(value, _TYPES[expected])


def shortened(text: str, longest: int = LONGEST_RESULT) -> str:
    """Beginning and end of a text that is too long, with a note of what is missing between them."""
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 3
    return f"{text[:head]}\n[... {len(text) - head - tail:,} characters left out ...]\n{text[-tail:]}"
