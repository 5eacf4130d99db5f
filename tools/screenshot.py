"""A picture of a real chat: runs `kimi-lite chat` on a terminal of its own, types, and draws the screen as SVG.

    python -m tools.screenshot tools/data/chat.svg -- --temp 0

What stands in the picture is what the program showed: a terminal emulator (pyte, of the test dependencies) keeps the
screen, rich draws it. The README shows the file; make it again on a quiet machine when the screen changes.
"""

import io
import os
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.files import whole_file

WIDTH, HEIGHT = 90, 44
LINES = (
    "Write a Python function that adds two numbers.",
    "What is the capital of France?",
    "/ctx",
    "/exprts",
)
_PROMPT = re.compile(r"❯\s*(thinking|instant)?\s*")
_SGR = re.compile(r"\x1b\[([\d;]*)m")
_GREY = "38;2;140;140;140"  # what terminals make of dim text; the emulator does not know it
TIMEOUT_S = 300


def main(
    path: Annotated[Path, typer.Argument(help="The SVG file.")],
    flags: Annotated[list[str] | None, typer.Argument(help="Flags of kimi-lite chat, behind --.")] = None,
) -> None:
    """Hold the conversation and write the picture."""
    import pexpect
    import pyte

    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.Stream(screen)
    with tempfile.TemporaryDirectory() as state:
        environment = os.environ | {"KIMI_LITE_STATE": state, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = ["-m", "kimi_lite", "chat", *(flags or [])]
        program = pexpect.spawn(sys.executable, command, env=environment, dimensions=(HEIGHT, WIDTH), encoding="utf-8")
        _read_to_prompt(program, stream, screen)
        for line in LINES:
            program.send(line + "\r")
            _read_to_prompt(program, stream, screen)
        program.sendeof()
        program.close()
    with whole_file(path) as file:
        file.write(_draw(screen))


def _read_to_prompt(program, stream, screen) -> None:
    """Until the last row is an empty prompt and nothing has come for a while."""
    import pexpect

    is_new = False
    for _ in range(TIMEOUT_S * 2):
        try:
            stream.feed(_SGR.sub(_without_dim, program.read_nonblocking(65536, timeout=0.5)))
            is_new = True
        except pexpect.TIMEOUT:
            rows = [row.rstrip() for row in screen.display if row.strip()]
            if is_new and rows and _PROMPT.fullmatch(rows[-1]):
                return
    raise SystemExit("no prompt came:\n" + "\n".join(screen.display))


def _without_dim(match: re.Match) -> str:
    parts = match[1].split(";")
    is_colour = any(part in ("38", "48") for part in parts)
    return (
        match[0]
        if is_colour or "2" not in parts
        else f"\x1b[{';'.join(_GREY if part == '2' else part for part in parts)}m"
    )


def _draw(screen) -> str:
    from rich.console import Console
    from rich.text import Text

    nowhere = io.StringIO()
    console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
    rows = [screen.buffer[y] for y in range(HEIGHT)]
    while rows and not "".join(rows[-1][x].data for x in range(WIDTH)).strip():
        rows.pop()
    for row in rows:
        text = Text()
        for style, run in groupby((row[x] for x in range(WIDTH)), _style):
            text.append("".join(char.data for char in run), style)
        console.print(text, no_wrap=True, overflow="crop", highlight=False)
    return console.export_svg(title="kimi-lite chat")


def _style(char):
    """The emulator's character as rich styles it."""
    from rich.style import Style

    names = {"brown": "yellow", "brightbrown": "bright_yellow", "brightblack": "bright_black"}

    def colour(name: str) -> str | None:
        if name == "default":
            return None
        return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else names.get(name, name.replace("bright", "bright_"))

    return Style(
        color=colour(char.fg),
        bgcolor=colour(char.bg),
        bold=char.bold,
        italic=char.italics,
        underline=char.underscore,
        strike=char.strikethrough,
        reverse=char.reverse,
    )


if __name__ == "__main__":
    typer.run(main)
