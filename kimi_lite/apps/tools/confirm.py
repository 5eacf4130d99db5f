"""The question before a call, and who answers it: the chat's prompt or a plain terminal; without either it is no.

A question is complete by itself, also where nothing else is shown (`-q`): it holds every argument whole, with what has
no ink or reorders text made visible, and what the tool is not confined from.
"""

import json
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kimi_lite.terminal import echo, mixed_words, visible

Permission = Literal["once", "always", "no", "stop"]
ANSWERS: dict[str, Permission] = {"y": "once", "a": "always", "n": "no", "s": "stop"}


@dataclass(frozen=True, slots=True)
class Question:
    """Whether to run the tool `name` with these arguments. `risks` are sentences about what does not confine it."""

    name: str
    arguments: Mapping[str, Any]
    risks: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """All that one decides about, a line each."""
        lines = [line for name, value in self.arguments.items() for line in _argument_lines(name, value)]
        return [*lines, *(f"  ! {risk}" for risk in self.risks)]

    @property
    def prompt(self) -> str:
        answers = "[y]es, [a]lways, [N]o, [s]top" if self.risks else "[y]es, [a]lways, [n]o, [s]top"
        return f"run {visible(self.name)}? {answers}: "

    @property
    def default(self) -> str:
        """What an empty line means; empty: ask again."""
        return "n" if self.risks else ""


Ask = Callable[[Question], Permission]


def asker(say: Callable[[str], None]) -> Ask:
    """For `ToolBox.call`: the user at the terminal if there is one; without a terminal the answer is no."""
    return lambda question: (
        ask_at_terminal(question) if sys.stdin.isatty() and sys.stderr.isatty() else refuse(question, say)
    )


def refuse(question: Question, say: Callable[[str], None]) -> Permission:
    """No terminal to ask at."""
    say(f"{question.name} was not run: there is no terminal to ask at (--allow {question.name} allows it)")
    return "no"


def ask_at_terminal(question: Question) -> Permission:
    """Ask until there is an answer; Ctrl-C and the end of input stop the calls."""
    for line in question.lines:
        echo(line, to_stderr=True)
    forget_typed_ahead()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            echo(question.prompt, to_stderr=True, end="")
            line = sys.stdin.readline()
            if not line:
                return "stop"
            answer = line.strip()[:1].lower() or question.default
            if answer in ANSWERS:
                return ANSWERS[answer]
    except KeyboardInterrupt:
        echo(to_stderr=True)
        return "stop"
    finally:
        signal.signal(signal.SIGINT, previous)


def forget_typed_ahead() -> None:
    """What was typed before a question was there is no answer to it."""
    if sys.stdin.isatty():
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def _argument_lines(name: str, value: Any) -> list[str]:
    """`name: value`; a text of several lines, code for instance, as one can read it; and words that deceive."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if "\n" in text:
        lines = [f"  {visible(name)}:", *(f"  │ {visible(line)}" for line in text.split("\n"))]
    else:
        lines = [f"  {visible(name)}: {visible(text)}"]
    return [*lines, *(f"  ! {words}" for words in mixed_words(text))]
