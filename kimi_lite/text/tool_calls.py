"""Tool calls and their ids: Kimi names the called tool only inside the id, `functions.{name}:{index}`.

The index counts the calls of a whole conversation. Ids are handed out as the model wrote them, and ids that a client
invented are turned back before the model sees them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ID = re.compile(r"(?:functions\.)?(?P<name>[\w.\-]+):(?P<index>\d+)")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the model made it. `arguments` is JSON text, possibly malformed: see the piece's error."""

    id: str
    name: str
    arguments: str = ""


class OpenCall:
    """The call being received: its id as written, its arguments so far, and whether they end inside a JSON string."""

    def __init__(self) -> None:
        self.header = self.arguments = self.space = ""
        self.call: ToolCall | None = None
        self.is_in_string = self._is_escaped = False

    def add(self, text: str) -> str:
        """Append argument text; returns what of it is certain: blanks around the arguments are not part of them."""
        for char in text:
            if self._is_escaped:
                self._is_escaped = False
            elif char == '"':
                self.is_in_string = not self.is_in_string
            else:
                self._is_escaped = self.is_in_string and char == "\\"
        text = self.space + text if self.arguments else text.lstrip()
        body = text.rstrip()
        self.space = text[len(body) :]
        self.arguments += body
        return body


def name_in_id(call_id: str) -> str | None:
    """The tool that an id of the model's form calls, else None."""
    match = _ID.fullmatch(call_id)
    return match["name"] if match else None


def _dict(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def name_by_arguments(arguments: str, tools: Sequence[Mapping]) -> str | None:
    """For a call whose id is a bare number: the one declared tool that has all its argument names, else None."""
    try:
        keys = json.loads(arguments).keys()
    except (ValueError, AttributeError, RecursionError):
        return None
    names = []
    for tool in tools:
        function = _dict(_dict(tool).get("function"))
        properties = _dict(_dict(function.get("parameters")).get("properties"))
        if keys <= properties.keys():
            names.append(str(function.get("name")))
    return names[0] if len(names) == 1 else None


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def with_native_ids(messages: Sequence[Mapping]) -> list[Mapping]:
    """`messages` with foreign call ids (`call_x9`) rewritten to the model's form in calls and results; its own stay
    verbatim."""
    native: dict[str, str] = {}
    result, num_calls = [], 0
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                call_id, name = str(call.get("id")), str((call.get("function") or {}).get("name"))
                native[call_id] = call_id if name_in_id(call_id) == name else f"functions.{name}:{num_calls}"
                calls.append({**call, "id": native[call_id]})
                num_calls += 1
            message = {**message, "tool_calls": calls}
        elif isinstance(message.get("tool_call_id"), str) and message["tool_call_id"] in native:
            message = {**message, "tool_call_id": native[message["tool_call_id"]]}
        result.append(message)
    return result
