"""A conversation as any OpenAI-compatible server takes it.

Servers refuse a whole request for one message they do not like, and then every further turn fails; so what strict ones
(Moonshot's own API first) are known to refuse is put right before it is sent.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_lite.text.tool_calls import CallBook, read_arguments

NO_OUTPUT = "(no output)"
NOT_RUN = "Not run."
_NAME = re.compile(r"[A-Za-z_][\w\-]{0,63}", re.ASCII)
_TYPED = ("type", "anyOf", "oneOf", "allOf", "$ref")
_ANY = [{"type": name} for name in ("string", "number", "boolean", "object", "array", "null")]


def portable(messages: Sequence[Mapping[str, Any]], declared: Sequence[str] = ()) -> list[dict[str, Any]]:
    """`messages`, as `Turn.to_message` writes them, without what servers refuse:

    - calls: arguments that are no JSON object, ids that occurred before, names that no tool can have (but those in
      `declared`), no `content` with them where it is empty (Moonshot: "text content is empty"); `reasoning_content`
      always, for with thinking on Moonshot wants it there, empty or not, and elsewhere only where there is some;
    - results: empty, without their call, or not right behind it; calls without result;
    - messages without any content; two messages of the user in a row.
    """
    result: list[dict[str, Any]] = []
    book, waiting = CallBook(), list[tuple[str, str]]()  # ids of calls without result yet: as written, as sent
    for message in messages:
        if message["role"] == "tool":
            found = next((pair for pair in waiting if pair[0] == message.get("tool_call_id")), None)
            if found:
                waiting.remove(found)
                result.append({**message, "tool_call_id": found[1], "content": _filled(message["content"], NO_OUTPUT)})
            continue
        result += [_no_result(call_id) for _, call_id in waiting]
        waiting = []
        if message["role"] == "assistant":
            sent = _assistant(message, book, waiting, declared)
        else:
            sent = {**message, "content": _without_empty_parts(message["content"])}
        if not sent.get("content") and not sent.get("tool_calls"):
            continue
        if _are_both_texts_of_user(result, sent):
            result[-1] = {**result[-1], "content": f"{result[-1]['content']}\n\n{sent['content']}"}
        else:
            result.append(sent)
    return [*result, *(_no_result(call_id) for _, call_id in waiting)]


def _assistant(
    message: Mapping[str, Any], book: CallBook, waiting: list[tuple[str, str]], declared: Sequence[str]
) -> dict[str, Any]:
    content = message.get("content")
    sent = {**message, "content": content if not isinstance(content, str) or content.strip() else ""}
    if not message.get("tool_calls"):
        return {key: value for key, value in sent.items() if key != "reasoning_content" or value}
    calls = []
    for call in message["tool_calls"]:
        function, written = call["function"], call["id"]
        name = function["name"] if function["name"] in declared else _allowed(function["name"])
        call_id = book.id_for(written, name, is_foreign=True)
        waiting.append((written, call_id))
        calls.append({**call, "id": call_id, "function": {"name": name, "arguments": _object(function["arguments"])}})
    sent |= {"reasoning_content": sent.get("reasoning_content") or "", "tool_calls": calls}
    if not sent["content"]:
        del sent["content"]
    return sent


def _object(arguments: str) -> str:
    """JSON text of an object, for servers parse the arguments of the past; `malformed` holds what is none."""
    text, error = read_arguments(arguments)
    return json.dumps({"malformed": arguments}) if error else text


def _allowed(name: str) -> str:
    """A name that a tool could have: a model may have called one that cannot exist."""
    if _NAME.fullmatch(name):
        return name
    return re.sub(r"[^A-Za-z0-9_\-]", "_", f"_{name}" if not re.match("[A-Za-z_]", name) else name)[:64]


def _no_result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": NOT_RUN}


def _filled(content: Any, other: str) -> Any:
    return content if content and (not isinstance(content, str) or content.strip()) else other


def _without_empty_parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [part for part in content if part.get("type") != "text" or part.get("text")]


def _are_both_texts_of_user(before: Sequence[Mapping[str, Any]], message: Mapping[str, Any]) -> bool:
    """Two messages of the user in a row (what was between them is not sent): many templates want the roles to
    alternate."""
    if not before or not before[-1]["role"] == message["role"] == "user":
        return False
    return isinstance(before[-1]["content"], str) and isinstance(message["content"], str)


def typed_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Declarations whose schemas say a type everywhere: Moonshot's API refuses them otherwise."""
    return [_typed_tool(tool) for tool in tools]


def _typed_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return tool
    parameters = function.get("parameters")
    parameters = parameters if isinstance(parameters, Mapping) and parameters else {"properties": {}}
    if not any(key in parameters for key in _TYPED):
        parameters = {"type": "object", **parameters}
    return {**tool, "function": {**function, "parameters": _typed(parameters)}}


def _typed(schema: Any) -> Any:
    """`schema` with a type where none is said: what its other keys imply, else any."""
    if schema is True or schema == {}:
        return {"anyOf": _ANY}
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(result.get(key), Mapping):
            result[key] = {name: _typed(value) for name, value in result[key].items()}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(result.get(key), list):
            result[key] = [_typed(option) for option in result[key]]
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), Mapping):
            result[key] = _typed(result[key])
    if any(key in result for key in _TYPED):
        return result
    values = result.get("enum", [result["const"]] if "const" in result else None)
    if "properties" in result:
        return result | {"type": "object"}
    if "items" in result:
        return result | {"type": "array"}
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return result | {"type": "string"}
    return result | {"anyOf": _ANY}
