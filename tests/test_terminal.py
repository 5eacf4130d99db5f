"""What reaches a terminal: hostile texts through every writer, in a pseudo-terminal; and no other writer there is."""

import ast
import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.terminal import Console, harmless, mixed_words, show_plain, visible, write

ROOT = Path(__file__).parents[1]
# Ours: colours, and the cursor movements of rich and prompt_toolkit.
_OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\??[0-9;]*[ABCDGHJKhl]|\r")
HOSTILE = {
    "window title": "\x1b]0;EVIL\x07",
    "clipboard": "\x1b]52;c;RVZJTA==\x1b\\",
    "link": "\x1b]8;;http://evil\x1b\\",
    "C1 CSI": "\x9b31mEVIL\x9b5n",
    "C1 OSC": "\x9d0;EVIL\x9c",
    "device control": "\x1bP$qEVIL\x1b\\",
    "status report": "\x1b[6n\x1b[c\x05",
    "screen": "\x1b[2J\x1bcEVIL",
    "line": "right\rEVIL\x08\x08\x0b\x0c\x7f",
    "bidi": "\u202eEVIL\u2066\u2069\u202c\u2028",
}
WRITERS = {
    "show_plain": "show_plain(Console(), text, style='red')",
    "show_plain in pieces": "[show_plain(Console(), char, end='') for char in text]",
    "print": "Console(highlight=True).print(text, markup=False)",
    "table": "table = Table(text); table.add_row(Text(text), text); Console().print(table)",
    "panel": "Console().print(Panel(Text(text), title=Text(text)))",
    "progress": "p = Progress(TextColumn('{task.description}'), console=Console()); p.start(); "
    "p.add_task(text, total=1); p.refresh(); p.stop()",
    "linked": "Console().print(Text('x', Style(link=text)))",
    "markdown": "m = MarkdownStream(Console()); "
    "m.feed(f'# {text}\\n\\n`{text}` [a]({text})\\n\\n```\\n{text}\\n```\\n'); "
    "m.feed(f'| {text} | b |\\n|--|--|\\n'); m.finish()",
    "answer": "write(sys.stdout, text + '\\n')",
    "error": "echo(text, to_stderr=True, colour='red')",
    "crash": "sys.excepthook = report_crash; raise ValueError(text)",
    "warning": "from kimi_lite import cli; import warnings; cli._report_warning(text, UserWarning, text, 1)",
    "log": "from kimi_lite import cli; import logging; logging.lastResort = cli._LogOnTerminal(); "
    "logging.getLogger('kimi_lite.part').warning('%s', text)",
    "question": "q = Question(text, {text: text, 'code': text + '\\n' + text}, (text,)); "
    "[echo(line) for line in (*q.lines, q.prompt)]",
    "prompt": "open_prompt().prompt(text + 'ready> ')",
}
PRELUDE = """
import sys
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text
from kimi_lite.apps.markdown.stream import MarkdownStream
from kimi_lite.apps.tools.confirm import Question
from kimi_lite.terminal import *
from kimi_lite.terminal import Console
for text in TEXTS:
"""


def on_terminal(code: str, typed: bytes = b"") -> str:
    """What the script shows on a terminal, whether it fails or not."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "PROMPT_TOOLKIT_NO_CPR": "1"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, start_new_session=True, **streams)
    os.close(theirs)
    os.write(ours, typed)
    shown = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    process.wait()
    return shown.decode("utf-8", "replace")


def assert_harmless(shown: str) -> None:
    """Besides what is ours there is nothing that acts on a terminal."""
    left = _OURS.sub("", shown)
    found = [ascii(left[max(at - 30, 0) : at + 30]) for at, char in enumerate(left) if harmless(char) != char]
    assert not found, found[:5]


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_hostile_reaches_a_terminal(writer: str) -> None:
    texts = list(HOSTILE.values())
    texts = texts[:1] if writer == "crash" else texts
    shown = on_terminal(f"TEXTS = {texts!r}{PRELUDE}    {WRITERS[writer]}\n", b"x\r" * len(texts))
    assert shown.count("EVIL") >= (0 if writer == "linked" else len(texts) // 2 or 1), shown  # it was shown at all
    assert_harmless(shown)


def test_our_own_colours_do_reach_it() -> None:
    shown = on_terminal(
        f"TEXTS = ['fine']{PRELUDE}    echo(text, colour='green'); show_plain(Console(), text, style='red')\n"
    )
    assert shown.count("\x1b[3") == 2


@given(st.text())
def test_text_is_kept_where_it_is_harmless(text: str) -> None:
    safe = harmless(text)
    assert len(safe) == len(text)
    assert harmless(safe) == safe
    assert all(a == b or b == "\ufffd" for a, b in zip(text, safe, strict=True))
    seen = visible(text)
    assert visible(seen) == seen
    assert harmless(seen) == seen
    out = io.StringIO()
    show_plain(Console(file=out, width=10), text, end="")
    assert harmless(out.getvalue()) == out.getvalue()


def test_what_people_write_stays_as_it_is() -> None:
    for text in ("a\tb\n", "你好 👩‍👩‍👧 naïve", "سلام", "שלום", "क्षि"):
        assert harmless(text) == text
    for text in ("a\tb\n", "你好 naïve", "سلام"):
        assert visible(text) == text


@pytest.mark.parametrize(
    "char",
    "\u200b\u200d\u2060\ufeff\u00ad\u061c\u200e\u202e\u2066\u2028\u00a0\u3000\u3164\u2800\ufe0f\U000e0041\r\x1b\x00\ud800",
)
def test_what_cannot_be_seen_is_made_visible(char: str) -> None:
    assert visible(f"a{char}b") == f"a⟨U+{ord(char):04X}⟩b"


def test_words_of_several_scripts() -> None:
    assert mixed_words("p\u0430y pay \u043f\u0430\u0440 naïve \u4f60a") == ["p\u0430y: Latin and Cyrillic letters"]


def test_an_answer_into_a_pipe_is_what_it_is() -> None:
    out = io.StringIO()
    write(out, "".join(HOSTILE.values()))
    assert out.getvalue() == "".join(HOSTILE.values())


# Processes whose outputs are pipes of ours.
_INNER = {
    "kimi_lite/terminal.py",
    "kimi_lite/apps/tools/mcp_keeper.py",
    "kimi_lite/apps/tools/python_child.py",
    "kimi_lite/text/sandbox.py",
}


def test_there_is_no_other_writer() -> None:
    """Only `kimi_lite/terminal.py` prints; JSON, which is ASCII, is the exception."""
    found = []
    files = [path for folder in ("kimi_lite", "quantize") for path in (ROOT / folder).rglob("*.py")]
    for path in (*sorted(files), ROOT / "tools/bench/report.py", ROOT / "tools/bench/__main__.py"):
        name = str(path.relative_to(ROOT))
        if name not in _INNER:
            found += [f"{name}:{line}" for line in _own_writers(ast.parse(path.read_text("utf-8")))]
    assert not found, f"print through kimi_lite.terminal: {found}"


def _own_writers(tree: ast.AST) -> list[int]:
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("rich.console", "rich", "prompt_toolkit"):
            lines += [
                node.lineno for name in node.names if name.name in ("Console", "print", "PromptSession", "prompt")
            ]
        if isinstance(node, ast.Call):
            text, argument = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            is_writer = text in (
                "print",
                "input",
                "typer.echo",
                "typer.secho",
                "typer.confirm",
                "typer.prompt",
            ) or re.match(r"sys\.std(out|err)\.(buffer\.)?write", text)
            if is_writer and not (argument.startswith("json.dumps(") and "ensure_ascii" not in argument):
                lines.append(node.lineno)
    return lines
