"""Asking about a call where there is no chat's prompt: at a plain terminal, or nowhere."""

import json
import signal
import sys
from collections.abc import Callable

from kimi_lite.apps.markdown.stream import CONTROLS
from kimi_lite.apps.tools.box import Ask, Permission
from kimi_lite.text.tool_calls import ToolCall

ANSWERS: dict[str, Permission] = {"y": "once", "a": "always", "n": "no", "s": "stop"}


def asker(say: Callable[[str], None]) -> Ask:
    """For `ToolBox.call`: the user at the terminal if there is one, else nobody, which is a no."""
    return lambda call: ask_at_terminal(call, say) if sys.stdin.isatty() and sys.stderr.isatty() else refuse(call, say)


def refuse(call: ToolCall, say: Callable[[str], None]) -> Permission:
    """There is nobody to ask."""
    say(f"{call.name} was not run: nobody is here to allow it (--allow {call.name})")
    return "no"


def ask_at_terminal(call: ToolCall, say: Callable[[str], None]) -> Permission:
    """Ask until there is an answer; Ctrl-C and the end of input stop the calls."""
    for line in long_arguments(call):
        say(line)
    forget_typed_ahead()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            print(
                f"run {CONTROLS.sub('�', call.name)}? [y]es, [a]lways, [n]o, [s]top: ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            line = sys.stdin.readline()
            if not line:
                return "stop"
            if line.strip()[:1].lower() in ANSWERS:
                return ANSWERS[line.strip()[:1].lower()]
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return "stop"
    finally:
        signal.signal(signal.SIGINT, previous)


def forget_typed_ahead() -> None:
    """What was typed before a question was there is no answer to it."""
    if sys.stdin.isatty():
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def long_arguments(call: ToolCall) -> list[str]:
    """Arguments of several lines, code for instance, as one can read them."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        return []
    texts = [value for value in arguments.values() if isinstance(value, str) and "\n" in value]
    return [f"  │ {CONTROLS.sub('�', line)}" for text in texts for line in text.split("\n")]
