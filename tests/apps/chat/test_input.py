"""The prompt, as keys arrive and as the screen shows it: many lines, pastes, history, completion, the editor,
images."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_lite.apps.chat.attachments import dropped_files, read_image
from kimi_lite.apps.chat.input import MAX_HISTORY_CHARS, Pastes, PrivateHistory
from kimi_lite.apps.chat.input_pipe import is_open_block, unquote_block
from kimi_lite.errors import KimiLiteError
from tests.apps.terminal import Terminal

FAKE = "tests.apps.fake_main"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "edited: " > "$1.new"; cat "$1" >> "$1.new"; mv "$1.new" "$1"\n')
    editor.chmod(0o755)
    terminal = Terminal(FAKE, "chat", "-m", "x", "--no-think", EDITOR=str(editor), VISUAL="")
    terminal.wait_for_prompt()
    yield terminal
    terminal.close()


def last_message(terminal: Terminal) -> str:
    """What the scripted model was told, as it repeats it on the screen."""
    screen = terminal.screen
    begin = max(i for i, row in enumerate(screen) if row.startswith("you said:"))
    return "\n".join(screen[begin:-3])


def test_the_ways_to_write_many_lines_and_to_change_them(terminal: Terminal) -> None:
    terminal.type("one\x1b\rtwo")
    terminal.enter("")
    assert last_message(terminal) == "you said: one\ntwo"
    terminal.type('"""\r- three\r- four')
    terminal.enter('"""')
    assert "four" in last_message(terminal)
    terminal.type("\x1b[A")  # up: the last message from the history
    terminal.wait_for("four")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D or /exit")
    terminal.wait_for_prompt()
    terminal.type("draft\x07")  # Ctrl-G
    terminal.wait_for("edited: draft")
    terminal.enter("")
    assert last_message(terminal) == "you said: edited: draft"
    terminal.type("gone\x03")
    screen = terminal.wait_for_prompt()
    assert "Ctrl-D" not in screen[-2]  # said once is enough


def test_ctrl_v_is_for_the_clipboard_s_image(terminal: Terminal) -> None:
    terminal.type("look \x16")
    terminal.wait_for("An image needs a vision tower")
    terminal.wait_for("look")  # the prompt is there again, with what was typed
    terminal.enter("at this")
    assert last_message(terminal) == "you said: look at this"


def test_a_paste_of_any_size_is_one_message(terminal: Terminal) -> None:
    lines = [f"line {i}" for i in range(200)]
    terminal.type("look: \x1b[200~" + "\r\n".join(lines) + "\x1b[201~")
    terminal.wait_for("[pasted 200 lines #1]")
    terminal.enter(" what is it?")
    assert "line 199 what is it?" in terminal.seen
    assert terminal.seen.count("TTFT") == 1
    terminal.type("\x1b[200~" + "x" * 500_000 + "\x1b[201~")
    terminal.wait_for("[pasted 500,000 characters #2]")
    terminal.type("\r")
    terminal.wait_for("need a context of")
    terminal.wait_until(lambda screen: screen[-1].startswith("❯ [pasted 500,000 characters #2]"))


def test_completion_of_commands_paths_and_settings(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "notes of mine.md").write_text("x")
    terminal.type("/und\t")
    terminal.wait_for("/undo")
    terminal.type("\x03")
    terminal.wait_for_prompt()
    terminal.type(f"/read {tmp_path}/not")
    terminal.wait_until(lambda screen: screen[-1].endswith("notes of mine.md"))  # the menu
    terminal.type("\t")
    terminal.wait_until(lambda screen: any(row.startswith("❯ /read") and "notes of mine" in row for row in screen))
    terminal.enter("")
    assert any("notes of mine.md (1 line)" in row for row in terminal.screen)
    assert terminal.screen[-1].startswith("1 file ❯")


def test_alt_t_switches_the_mode_and_the_prompt_says_so(terminal: Terminal) -> None:
    assert terminal.screen[-1].endswith("instant")
    terminal.type("\x1bt")
    terminal.wait_until(lambda screen: screen[-1].endswith("thinking"))
    terminal.enter("hi")
    assert "thought for" in terminal.seen


def test_history_is_private_and_without_giants(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    path.parent.mkdir()
    path.write_text("")
    path.chmod(0o644)
    pastes = Pastes()
    history = PrivateHistory(path, pastes)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    history.store_string(f"look {pastes.stand_in('small' * 500)}")
    history.store_string(pastes.stand_in("x" * (MAX_HISTORY_CHARS + 1)))
    assert next(iter(history.load_history_strings())) == "look " + "small" * 500
    assert "xxx" not in path.read_text()


def test_small_pastes_stay_as_they_are() -> None:
    pastes = Pastes()
    assert pastes.stand_in("a\nb") == "a\nb"
    words = pastes.stand_in("a\n" * 100)
    assert pastes.expand(f"x {words} y") == "x " + "a\n" * 100 + " y"


@pytest.mark.parametrize(
    ("text", "is_open", "message"),
    [
        ('"""', True, ""),
        ('"""a\nb', True, "a\nb"),
        ('"""a\nb"""', False, "a\nb"),
        ('say """x"""', False, 'say """x"""'),
        ("a", False, "a"),
    ],
)
def test_blocks_between_quotation_marks(text: str, is_open: bool, message: str) -> None:
    assert is_open_block(text) == is_open
    assert unquote_block(text) == message


def test_images_dropped_into_the_prompt_are_found(tmp_path: Path) -> None:
    for name in ("a.png", "my cat.PNG", "b.txt"):
        (tmp_path / name).write_bytes(PNG)
    escaped = str(tmp_path / "my cat.PNG").replace(" ", "\\ ")
    found = f"{tmp_path}/a.png and '{tmp_path}/my cat.PNG' or {escaped} or file://{tmp_path}/a.png"
    text = f"what is {found} not {tmp_path}/b.txt no/such.png"
    assert [kind for kind, _ in dropped_files(text)] == ["image"] * 4
    for _, word in dropped_files(text):
        assert read_image(word).url.startswith("data:image/png;base64,")
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(KimiLiteError, match="is not a PNG"):
        read_image(str(tmp_path / "no.png"))
    assert dropped_files("x" * 100_000 + ".png") == []
    assert os.sep in str(tmp_path)
