"""OpenAI-shaped messages and tools of clients, checked and brought into the form that templates and the engine read.

Clients differ: `content` is missing, null, text or parts; `developer` means system; a system message may stand
anywhere; `reasoning` and `reasoning_content` are one thing; calls come with arguments as text or as an object, and from
before tools were, as `function_call`. Text never becomes control tokens: that is the template's doing.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_lite.apps.server.errors import ApiError
from kimi_lite.apps.server.media import MediaParts

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
MAX_TOOLS = 1024


def read_messages(messages: Sequence[Mapping[str, Any]], media: MediaParts) -> tuple[dict[str, Any], ...]:
    """Messages as the template takes them; ApiError 400 that names the place of what is wrong."""
    read: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        place = f"messages.{i}"
        role = message.get("role")
        if role == "function":  # before tools were
            result = {"role": "tool", "content": _content(message.get("content"), place, media)}
            called = message.get("name")
            read.append({**result, "tool_call_id": _last_id_of(read, called), "name": called})
            continue
        if not isinstance(role, str) or role not in _ROLES:
            known = ", ".join(_ROLES)
            raise ApiError(
                400, f"{place}.role is {role!r}; it must be one of {known}.", "invalid_value", f"{place}.role"
            )
        plain = {"role": _ROLES[role], "content": _content(message.get("content"), f"{place}.content", media)}
        if isinstance(message.get("name"), str):
            plain["name"] = message["name"]
        if role == "assistant":
            plain |= _assistant(message, place)
        elif role == "tool":
            plain["tool_call_id"] = str(message.get("tool_call_id") or "")
        read.append(plain)
    return tuple(read)


def read_tools(tools: Sequence[Mapping[str, Any]], can_call: bool, model: str) -> tuple[dict[str, Any], ...]:
    """Function declarations; ApiError 400 for what is no function or cannot be declared to this model."""
    if tools and not can_call:
        raise ApiError(400, f"The chat template of {model} has no place for tools.", "tools_unsupported", "tools")
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"There are {len(tools)} tools; {MAX_TOOLS} are allowed.", "invalid_value", "tools")
    read = []
    for i, tool in enumerate(tools):
        function, place = tool.get("function"), f"tools.{i}"
        if tool.get("type", "function") not in ("function", "builtin_function") or not isinstance(function, Mapping):
            raise ApiError(400, f"{place} must have type function and a function.", "invalid_value", place)
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name:
            raise ApiError(400, f"{place}.function.name must be a text.", "invalid_value", f"{place}.function.name")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ApiError(400, f"{place}.function.parameters must be a schema.", "invalid_value", place)
        declared = {**function, "parameters": dict(parameters or {"type": "object", "properties": {}})}
        declared.pop("strict", None)
        read.append({"type": "function", "function": declared})
    return tuple(read)


def strict_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Of the tools that are declared `strict`, by clients' own declarations."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), Mapping)]
    return frozenset(str(f.get("name")) for f in functions if f.get("strict") is True)


def read_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> str:
    """`auto`, `none`, `required`, or the name of the tool that must be called."""
    if choice is None or isinstance(choice, str):
        wanted = choice or "auto"
    else:
        assert isinstance(choice, Mapping), choice
        function = choice.get("function")
        wanted = (function if isinstance(function, Mapping) else choice).get("name")
        if not isinstance(wanted, str) or wanted not in [tool["function"]["name"] for tool in tools]:
            raise ApiError(
                400, f"tool_choice names {wanted!r}, which is not among the tools.", "invalid_value", "tool_choice"
            )
    if wanted in ("required",) and not tools:
        raise ApiError(400, "tool_choice is required, and there are no tools.", "invalid_value", "tool_choice")
    return wanted


def _assistant(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    more: dict[str, Any] = {}
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if isinstance(reasoning, str):
        more["reasoning_content"] = reasoning
    calls = message.get("tool_calls") or []
    if isinstance(message.get("function_call"), Mapping) and not calls:
        calls = [{"id": "", "type": "function", "function": message["function_call"]}]
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ApiError(400, f"{place}.tool_calls must be a list.", "invalid_value", f"{place}.tool_calls")
    read = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            where = f"{place}.tool_calls.{i}"
            raise ApiError(400, f"{where} must have a function with a name.", "invalid_value", where)
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        read.append({"id": str(call.get("id") or ""), "type": "function",
                     "function": {"name": function["name"], "arguments": text}})  # fmt: skip
    return {**more, "tool_calls": read} if read else more


def _content(content: object, place: str, media: MediaParts) -> object:
    """Text; a list of parts only where there are images."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ApiError(400, f"{place} must be a text or a list of parts.", "invalid_value", place)
    parts = [_part(part, f"{place}.{i}", media) for i, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: object, place: str, media: MediaParts) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS:
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise ApiError(400, f"{place}.text must be a text.", "invalid_value", f"{place}.text")
        return {"type": "text", "text": text}
    shown = media.read(part, place) if isinstance(part, Mapping) else None
    if shown is not None:
        return shown
    raise ApiError(
        400, f"{place} has the type {kind!r}, which this server does not read.", "invalid_value", f"{place}.type"
    )


def _last_id_of(messages: Sequence[Mapping[str, Any]], name: object) -> str:
    """The id of the newest call of this function."""
    for message in reversed(messages):
        for call in reversed(message.get("tool_calls", [])):
            if call["function"]["name"] == name:
                return call["id"]
    return ""
