"""What the chat shows on terminals from 40 to 200 columns: whole words, no line wider than the screen."""

import io
import re
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.apps.chat.commands.registry import all_commands
from kimi_lite.apps.opening import wrapped
from kimi_lite.terminal import Console
from tests.apps.talk import Talk
from tests.apps.terminal import Terminal
from tests.tiny import write_tiny_gguf

WIDTHS = (40, 60, 80, 100, 200)
COMMANDS = (
    "/help",
    "/help ctx",
    "/ctx",
    "/set",
    "/stats",
    "/experts",
    "/sessions",
    "/think",
    "/stop",
    "/image x",
    "/load x",
)


def words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


@pytest.fixture
def talk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Talk:
    one = Talk(tmp_path / "sessions", capsys)
    one.say("hello there", "and again")
    yield one
    one.chat.autosave.close()


def shown(talk: Talk, width: int, line: str) -> list[str]:
    """As on a terminal, without colours."""
    out = io.StringIO()
    talk.chat.status = Console(file=out, width=width, force_terminal=True, color_system=None)
    talk.say(line)
    return [re.sub(r"\x1b\[[0-9;]*m", "", row).rstrip() for row in out.getvalue().split("\n")]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_command_fits_and_breaks_no_word(talk: Talk, width: int) -> None:
    talk.session.engine.model.heat = lambda: np.outer(np.ones(4), np.arange(1.0, 65))
    known = {word for line in COMMANDS for row in shown(talk, 1000, line) for word in row.split()}
    for line in COMMANDS:
        rows = shown(talk, width, line)
        assert max(map(len, rows)) <= width, (line, rows)
        broken = [word for row in rows for word in row.split() if word not in known and not set(word) & set("░▒▓█")]
        assert [word for word in broken if re.fullmatch(r"[a-z]{3,}", word)] == [], (line, rows)


@pytest.mark.parametrize("width", WIDTHS)
def test_help_lists_everything_at_any_width(talk: Talk, width: int) -> None:
    text = words(shown(talk, width, "/help"))
    assert all(f"/{command.names[0]}" in text for command in all_commands().commands)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_name_of_a_conversation_can_be_copied(talk: Talk, width: int) -> None:
    assert "…" not in words(shown(talk, width, "/sessions"))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_header_and_a_question_on_a_real_terminal(width: int) -> None:
    terminal = Terminal("tests.apps.fake_main", "chat", "-m", "x", "-c", "256", num_columns=width, num_rows=50)
    rows = terminal.wait_for_prompt()
    text = words(rows)
    for part in ("Q8_0 67 %, F32 33 % · 2.9 MiB · context 256", "thinking on (temp 1, top-p 0.95) · /help for help"):
        assert part in text
    for message in ("/think off", "a b c " * 6, "a b c " * 6):
        terminal.enter(message)
    terminal.type("word " * 22 + "\r")
    terminal.wait_until(lambda rows: "[c]ancel?" in words(rows[-4:]))
    question = words(terminal.screen[-6:])
    assert re.search(
        r"\[d\]rop the oldest \d of 2 exchanges, (\[s\]ummarise the oldest \d, )?or \[c\]ancel\?$", question
    )
    terminal.type("c\r")
    terminal.wait_until(lambda rows: "not sent" in words(rows))
    terminal.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_line_is_wrapped_between_words_whatever_its_length(width: int) -> None:
    line = "  RAM 23.5 GiB here: dense 0.1 + KV 0.2 + work 0.0 + program 0.2 + experts 0.2 GiB · and more-of-it"
    rows = wrapped(line, width).split("\n")
    assert max(map(len, rows)) <= width
    assert words(rows) == words([line])


@pytest.mark.parametrize("width", [40, 200])
def test_the_header_of_a_file(tmp_path: Path, width: int) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), context_length=1024)
    terminal = Terminal("kimi_lite", "chat", "-m", str(path), "--no-prefix-cache", num_columns=width)
    terminal.timeout_s = 120.0
    rows = terminal.wait_for_prompt()
    terminal.close()
    text = words(rows)
    assert rows[0].startswith("kimi-lite 0.1.0 · tiny · ")
    for part in ("RAM", "context 1,024 · thinking on (temp 1, top-p 0.95) · /help for help · expected", "tok/s"):
        assert part in text
