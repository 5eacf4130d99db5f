"""Tool calls in one form, wherever they come from: a local model, an endpoint's deltas, a client of our server.

A `ToolCall` has an id that is unique in its answer, the name of a tool, and arguments that are the JSON text of an
object (or a piece with `error` says that they are not). `ArgumentReader` makes such text of whatever models and servers
write, piece by piece; `tool_of` finds the tool that an id means; `CallBook` gives ids out. Kimi names the called tool
only inside the id, `functions.{name}:{index}`; the index counts the calls of a whole conversation. Its ids are handed
out as the model wrote them, and ids that a client invented are turned back before the model sees them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

MAX_QUOTED = 2  # JSON text inside a JSON string inside ...

_ID = re.compile(r"(?:functions\.)?(?P<name>[\w.\-]+):(?P<index>\d+)")
_ID_WITHOUT_INDEX = re.compile(r"functions\.(?P<name>[\w.\-]*[A-Za-z_\-])")
_NUMBER = re.compile(r"\D*?(\d{1,6})")  # `3`, `call00003`; not the last digit of `call_a1b2c3`
_PLAIN = re.compile(r'[^"\'\\\x00-\x1f]+')  # of a string: what stands for itself
_WORD = re.compile(r"[\w.+\-]")
_LITERALS = {"True": "true", "False": "false", "None": "null"}  # as Python writes them
_EMPTY = ("", "null", "None")
MALFORMED, SEVERAL = "malformed, or cut off", "several objects"  # what arguments can be instead of one JSON object


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. `arguments` is JSON text of an object, or as it was written where the piece's error says it is none."""

    id: str
    name: str
    arguments: str = ""


class Arguments(NamedTuple):
    """Arguments as far as they are certain, and at their end what is wrong with them."""

    text: str
    error: str = ""


class ArgumentReader:
    """Arguments as they come, cut anywhere, to JSON text.

    Text that is JSON passes as it is. Else what has only one meaning is rewritten: control characters in strings and
    backslashes before no escape are escaped; single quotes, True, False, None and a comma before a closing bracket (as
    Python writes them) become JSON; a code fence around, JSON text in a JSON string, null or nothing for an empty
    object, braces doubled, the same object twice, an empty object before the real one, and words after the object are
    undone. `text` never changes what it once held.
    """

    def __init__(self, num_quoted: int = 0) -> None:
        self._parts: list[str] = []  # certain so far
        self._state: Literal["start", "object", "closed", "held"] = "start"  # held: to be looked at as a whole
        self._held = ""  # as written, not yet in `text`; when closed, what follows the object
        self._brackets: list[str] = []
        self._quote = ""  # that the open string began with
        self._escape = ""  # a backslash and what followed it so far
        self._word = ""  # a number or name that may go on
        self._last = ""  # the last character that is no blank
        self._num_quoted = num_quoted

    @property
    def text(self) -> str:
        """What is certain."""
        return "".join(self._parts)

    @property
    def is_in_string(self) -> bool:
        return bool(self._quote)

    @property
    def is_closed(self) -> bool:
        """Whether a whole object has come."""
        return self._state == "closed"

    @property
    def is_empty(self) -> bool:
        return not self._parts and not self._held.strip()

    def feed(self, text: str) -> str:
        """What of the arguments `text` makes certain."""
        before, at = len(self._parts), 0
        while at < len(text):
            at = self._step(text, at)
        return "".join(self._parts[before:])

    def finish(self) -> Arguments:
        """What was held back, and what is wrong, when no text will follow."""
        before = len(self._parts)
        error = self._finish()
        return Arguments("".join(self._parts[before:]), error)

    def _step(self, text: str, at: int) -> int:
        """Take a character (of a string: all up to the next special one); the place of the next."""
        if self._quote and not self._escape and (plain := _PLAIN.match(text, at)):
            self._parts.append(plain.group())
            return plain.end()
        char = text[at]
        if self._state == "start":
            self._start(char)
        elif self._state != "object":
            self._held += char
        elif self._quote:
            self._in_string(char)
        else:
            self._between(char)
        return at + 1

    def _start(self, char: str) -> None:
        if self._held.startswith("`"):  # a code fence: its first line says at most "json"
            self._held += char
            if char == "\n" and re.fullmatch(r"```\w*\s*", self._held):
                self._held = ""
            elif len(self._held) > 40:
                self._state = "held"
        elif char == "`":
            self._held = char
        elif char == "{":
            self._state, self._held, self._last, self._brackets = "object", char, char, ["}"]
        elif not (char.isspace() or char == "\ufeff"):
            self._state, self._held = "held", char

    def _between(self, char: str) -> None:
        """Outside strings. `_held` is an opening brace, or a comma, whose fate the next character decides."""
        if _WORD.match(char):
            self._word += char
            return
        if self._word:
            self._write(_LITERALS.get(self._word, self._word))
            self._word, self._last = "", "w"
        if char.isspace():
            self._write(char, is_blank=True)
        elif char in "\"'":
            if char == "'" and self._last not in "{[,:":
                self._give_up(char)
                return
            self._quote = self._last = char
            self._write('"')
        elif char in "{[":
            if self._last == "{":  # braces doubled, or no JSON
                self._give_up(char)
                return
            self._brackets.append({"{": "}", "[": "]"}[char])
            self._write(char)
            self._last = char
        elif char == ",":
            if self._last in "{[,:":
                self._give_up(char)
                return
            self._held = self._last = char
        elif char == ":":
            self._write(char)
            self._last = char
        elif char == self._brackets[-1]:
            self._close(char)
        else:
            self._give_up(char)

    def _close(self, char: str) -> None:
        self._brackets.pop()
        self._last = char
        if self._held.startswith("{"):  # empty so far: the real one may follow
            self._state, self._held = "closed", ""
            return
        self._held = self._held.removeprefix(",")
        self._write(char)
        if not self._brackets:
            self._state = "closed"

    def _write(self, text: str, is_blank: bool = False) -> None:
        if self._held:
            self._held += text
            if is_blank:
                return
            text, self._held = self._held, ""
        self._parts.append(text)

    def _give_up(self, char: str) -> None:
        self._state, self._held = "held", self._held + self._word + char
        self._quote = self._word = ""

    def _in_string(self, char: str) -> None:
        if self._escape:
            self._in_escape(char)
        elif char == "\\":
            self._escape = char
        elif char == self._quote:
            self._parts.append('"')
            self._quote = ""
        elif char == '"':
            self._parts.append('\\"')
        else:
            self._parts.append(json.dumps(char)[1:-1] if char < " " else char)

    def _in_escape(self, char: str) -> None:
        """After a backslash: an escape of JSON stays, else the backslash is meant as one."""
        escape = self._escape + char
        if escape == "\\u" or re.fullmatch(r"\\u[0-9a-fA-F]{1,3}", escape):
            self._escape = escape
        elif re.fullmatch(r'\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}', escape):
            self._parts.append(escape)
            self._escape = ""
        elif escape == "\\'":
            self._parts.append("'")
            self._escape = ""
        else:
            self._parts.append("\\" + self._escape)
            self._escape = ""
            self._in_string(char)

    def _finish(self) -> str:
        if self._state == "closed":
            error = self._finish_closed()
        elif self._state == "held" or self._held.startswith("`"):
            error = self._finish_held()
        elif self._state == "start":
            self._parts, error = ["{}"], ""
        else:
            self._parts.append(self._held + self._escape + self._word)
            error = MALFORMED
        self._held = ""
        return error or ("" if is_json_object(self.text) else MALFORMED)

    def _finish_closed(self) -> str:
        """Another object after the first: the same, an empty one, or the real one after an empty one."""
        rest, self._held = self._held.strip().lstrip(",;").lstrip(), ""
        second = read_arguments(rest, self._num_quoted) if rest.startswith("{") else Arguments("{}")
        if second.error == SEVERAL:
            self._parts = self._parts or [second.text]
            return SEVERAL
        if second.error:
            second = Arguments("{}")  # words that begin with a brace
        if not self._parts:
            self._parts = [second.text]
            return ""
        is_same = second.text == "{}" or _loads(second.text) == _loads(self.text)
        return "" if is_same else SEVERAL

    def _finish_held(self) -> str:
        """Text that is no object as it stands."""
        written = self._held.strip()
        inner = None if self._parts else _inner(written)
        if inner is None or self._num_quoted >= MAX_QUOTED:
            self._parts.append(self._held if self._parts else written)
            return MALFORMED
        text, error = read_arguments(inner, self._num_quoted + 1)
        self._parts = [written if error else text]
        return error


def _inner(written: str) -> str | None:
    """The object's text inside what was written around it: a JSON string, doubled braces, a fence on one line."""
    if written in _EMPTY:
        return ""
    if written.startswith('"'):
        value = _loads(written)
        return value if isinstance(value, str) else None
    if written.startswith("{{") and written.endswith("}}"):
        return written[1:-1]
    fence = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", written, re.DOTALL)
    return fence[1] if fence else None


def read_arguments(value: object, num_quoted: int = 0) -> Arguments:
    """Whole arguments, as text or as the JSON value they stand for, to JSON text."""
    if value is None:
        return Arguments("{}")
    if not isinstance(value, str):
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError):
            return Arguments("", MALFORMED)
        return read_arguments(text, MAX_QUOTED)
    reader = ArgumentReader(num_quoted)
    text = reader.feed(value)
    rest, error = reader.finish()
    return Arguments(text + rest, error)


def is_json_object(text: str) -> bool:
    """Whether every JSON parser takes `text` for an object (Python's own takes NaN and Infinity, too)."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def name_in_id(call_id: str) -> str | None:
    """The tool that an id of the model's form calls, else None."""
    match = _ID.fullmatch(call_id) or _ID_WITHOUT_INDEX.fullmatch(call_id)
    return match["name"] if match else None


def declared_names(tools: Iterable[object]) -> list[str]:
    """The names of OpenAI tool declarations; what is none is left out."""
    names = [_dict(_dict(tool).get("function")).get("name") for tool in tools]
    return [name for name in names if isinstance(name, str) and name]


def tool_of(call_id: str, tools: Sequence[Mapping], arguments: str | None = None) -> str | None:
    """The tool that a call means: the one its id names, in whichever form (`functions.exec:5`, `functionsexec5`,
    `functions.exec5`, `exec`), else, once the arguments are known, the one declared tool that takes them."""
    names = declared_names(tools)
    written = name_in_id(call_id)
    if written in names:
        return written
    named = _declared(call_id, names) or (_declared(written, names) if written else None) or _within(call_id, names)
    return named or written or (None if arguments is None else _taker(arguments, tools))


def _declared(text: str, names: Iterable[str]) -> str | None:
    """The declared name that `text` is, but for a prefix, an index, case and punctuation."""
    for prefix, index in (("", ""), ("", r"\W*_?\d+"), (r"functions?\W*_?", ""), (r"functions?\W*_?", r"\W*_?\d+")):
        found = [name for name in names if re.fullmatch(prefix + re.escape(name) + index, text)]
        if found:
            return max(found, key=len)
    plain = _letters(re.sub(r"(?i)^functions?\W*|\W*\d+$", "", text))
    found = [name for name in names if plain in (_letters(name), "functions" + _letters(name))]
    return found[0] if len(found) == 1 else None


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


def _within(text: str, names: Iterable[str]) -> str | None:
    """The one declared name that stands in `text` as a word; of names within each other the longest."""
    found = [name for name in names if re.search(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])", text)]
    found = [name for name in found if not any(name != other and name in other for other in found)]
    return found[0] if len(found) == 1 else None


def _dict(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _taker(arguments: str, tools: Sequence[Mapping]) -> str | None:
    """The one declared tool that knows all these arguments and misses none."""
    keys = _loads(arguments)
    if not isinstance(keys, dict):
        return None
    names = []
    for tool in tools:
        function = _dict(_dict(tool).get("function"))
        parameters = _dict(function.get("parameters"))
        required = parameters.get("required")
        needs = {key for key in required if isinstance(key, str)} if isinstance(required, (list, tuple)) else set()
        if needs <= keys.keys() <= _dict(parameters.get("properties")).keys():
            names.append(str(function.get("name")))
    return names[0] if len(names) == 1 else None


def complaint(call_id: str, error: str) -> str:
    """The sentence for a call whose arguments are wrong."""
    return f"Tool call {call_id} has arguments that are not a JSON object ({error})."


class CallBook:
    """The ids of one answer's calls. `num_before` is how many calls the conversation had before."""

    def __init__(self, num_before: int = 0) -> None:
        self._num_before, self._taken = num_before, set[str]()

    def id_for(self, written: str, name: str, is_foreign: bool = False) -> str:
        """`written` where it is the model's form (or anything, if `is_foreign`) and not taken; else Kimi's for `name`,
        with the number that was written or the next one."""
        if written and written not in self._taken and (is_foreign or _ID.fullmatch(written)):
            self._taken.add(written)
            return written
        match = _ID.fullmatch(written)
        number = _NUMBER.fullmatch(written) or _NUMBER.fullmatch(written.removeprefix("functions").lstrip(".") or " ")
        index = int(match["index"][-6:]) if match else int(number[1]) if number else self._num_before + len(self._taken)
        while (call_id := f"functions.{name}:{index}") in self._taken:
            index += 1
        self._taken.add(call_id)
        return call_id


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
                is_native = bool(_ID.fullmatch(call_id)) and name_in_id(call_id) == name
                native[call_id] = call_id if is_native else f"functions.{name}:{num_calls}"
                calls.append({**call, "id": native[call_id]})
                num_calls += 1
            message = {**message, "tool_calls": calls}
        elif isinstance(message.get("tool_call_id"), str) and message["tool_call_id"] in native:
            message = {**message, "tool_call_id": native[message["tool_call_id"]]}
        result.append(message)
    return result
