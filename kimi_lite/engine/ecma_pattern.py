"""Patterns of JSON Schema (ECMA-262 regular expressions) in the syntax that llguidance compiles (Rust's `regex`).

The same text means different things to different engines: `[[a]b]` is a nested class in Rust, `\\w` knows all letters
in Python and Rust but not in ECMA, `.` stops at other line ends. A translated pattern matches only what both ECMA and
Python take for a match, so whichever validator looks at the text later finds it valid. What cannot be said is an
error. No pattern matches NUL: in llguidance 1.9 a class that holds it holds quotes and backslashes, too, in their
escaped form. Called by `engine.json_schema`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

# Class items that match what both dialects count in, and what either counts in.
_NARROW = {"d": "0-9", "w": "0-9A-Za-z_",
           "s": r"\t\n\x0B\f\r \u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000"}  # fmt: skip
_WIDE = {"d": r"\p{N}", "w": r"\p{L}\p{M}\p{N}_", "s": _NARROW["s"] + r"\x1C-\x1F\x85\u180E\uFEFF"}
_ANY = r"[^\x00\n\r\u2028\u2029]"
_PLAIN_ESCAPES = "nrtfv"
_QUANTIFIER = re.compile(r"[*+?]|\{\d+(?:,\d*)?\}")


class PatternError(ValueError):
    """Why a pattern cannot be used."""


def translate(pattern: str) -> str:
    """`pattern` for llguidance; PatternError where it uses what has no finite automaton or one meaning only."""
    return "".join(_parts(pattern))


def _parts(pattern: str) -> Iterator[str]:
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            part, at = _escape(pattern, at)
            yield part
        elif char == "[":
            part, at = _class(pattern, at)
            yield part
        elif char == "(":
            part, at = _group(pattern, at)
            yield part
        elif found := _QUANTIFIER.match(pattern, at):
            at = found.end()
            if pattern[at : at + 1] == "+":
                raise PatternError("possessive quantifiers are not part of ECMA-262")
            lazy = pattern[at : at + 1] == "?"
            at += lazy
            if _QUANTIFIER.match(pattern, at):
                raise PatternError("two quantifiers follow each other")
            yield found.group()  # lazy or not, the same texts match
        else:
            yield _ANY if char == "." else char
            at += 1


def _group(pattern: str, at: int) -> tuple[str, int]:
    if pattern[at : at + 2] != "(?":
        return "(?:", at + 1
    if pattern.startswith("(?i)", at) and at == 0:
        return "(?i)", at + 4
    found = re.compile(r"\(\?(?::|P?<[A-Za-z_]\w*>)").match(pattern, at)
    if found is None:
        raise PatternError(f"{pattern[at : at + 4]} (look-around or a flag) is not supported")
    return "(?:", found.end()


def _escape(pattern: str, at: int) -> tuple[str, int]:
    """An escape outside a class, and the place after it."""
    name = pattern[at + 1 : at + 2]
    if name in _NARROW:
        return f"[{_NARROW[name]}]", at + 2
    if name.lower() in _NARROW:
        return rf"[^\x00{_WIDE[name.lower()]}]", at + 2
    return _character_escape(pattern, at)


def _character_escape(pattern: str, at: int) -> tuple[str, int]:
    found = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|[pP]\{[\w=]+\})").match(pattern, at)
    if found is not None:
        code = found[1] or found[2]
        if code and 0xD800 <= int(code, 16) < 0xE000:
            raise PatternError("half of a surrogate pair is no character")
        return (f"\\x{{{code}}}" if code else found.group()), found.end()
    name = pattern[at + 1 : at + 2]
    if name and name in _PLAIN_ESCAPES:
        return f"\\{name}", at + 2
    if name.isalnum() or not name:
        raise PatternError(f"\\{name} is not supported")
    return re.escape(name), at + 2


class _Item(NamedTuple):
    """A member of a class: a character, or a set such as `\\w`, and the place after it."""

    text: str
    is_set: bool
    end: int


def _class(pattern: str, at: int) -> tuple[str, int]:
    """`[...]`, and the place after it. Only the brackets of ECMA are brackets."""
    is_negated = pattern.startswith("[^", at)
    at += 1 + is_negated
    items: list[str] = []
    while at < len(pattern) and pattern[at] != "]":
        text, is_set, at = _item(pattern, at, is_negated)
        if not is_set and pattern.startswith("-", at) and pattern[at + 1 : at + 2] not in ("", "]"):
            last = _item(pattern, at + 1, is_negated)
            if not last.is_set:
                text, at = f"{text}-{last.text}", last.end
        items.append(text)
    if at >= len(pattern):
        raise PatternError("a class is not closed")
    if not items:
        raise PatternError("a class is empty")
    inside = "".join(items)
    return (rf"[^\x00{inside}]" if is_negated else rf"[[{inside}]&&[^\x00]]"), at + 1


def _item(pattern: str, at: int, is_negated: bool) -> _Item:
    if pattern[at] != "\\":
        return _Item(re.escape(pattern[at]) if pattern[at] in "[&~^-" else pattern[at], False, at + 1)
    name = pattern[at + 1 : at + 2]
    if name == "b":
        return _Item(r"\x08", False, at + 2)
    if name and name.lower() in _NARROW:
        kept = (_WIDE if is_negated != name.isupper() else _NARROW)[name.lower()]
        return _Item(rf"[^\x00{kept}]" if name.isupper() else kept, True, at + 2)
    text, end = _character_escape(pattern, at)
    return _Item(text, text[1:2] in "pP", end)
