"""A model's files while it is in use: written, shortened, replaced; and the terminal after the end that a shorter file
is."""

import os
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.apps.model_files import ModelFiles
from kimi_lite.cli import app
from kimi_lite.engine.engine import Engine
from kimi_lite.errors import KimiLiteError
from tests.apps.fake_main import open_fake
from tests.apps.terminal import ROOT, Terminal
from tests.tiny import write_tiny_gguf
from tests.tiny_tokenizer import FIRST_SPECIAL_ID, NUM_SPECIALS

_FAULT = """
import mmap, os, sys, threading
from kimi_lite.apps.model_files import guard_terminal
guard_terminal("; all is well")
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[1], 0)
work = lambda: print(mapped[5000])
if sys.argv[2] == "thread":
    threading.Thread(target=work).start()
else:
    work()
"""


@pytest.mark.parametrize("where", ["thread", "main"])
def test_a_fault_ends_in_a_sentence_whoever_holds_the_interpreter(tmp_path: Path, where: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 10_000)
    command = [sys.executable, "-c", _FAULT, str(path), where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "model's file could no longer be read: it became shorter, or its disk failed" in done.stderr
    assert "start again; all is well." in done.stderr


def test_a_model_that_shrinks_under_a_chat_leaves_the_terminal_and_the_message(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), context_length=65536)
    _never_end_an_answer(path)
    terminal = Terminal("kimi_lite", "chat", "-m", str(path), "--no-prefix-cache", "-n", "60000", "--temp", "0")
    terminal.timeout_s = 120.0
    terminal.wait_for("❯")
    terminal.type("never to be lost\r")
    deadline_s = time.monotonic() + 60
    sessions = Path(os.environ["KIMI_LITE_STATE"]) / "sessions"
    while not list(sessions.glob("*.json")) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    os.truncate(path, 4096)
    assert terminal.wait() == 2, terminal.seen
    assert termios.tcgetattr(terminal._master)[3] & termios.ECHO
    assert termios.tcgetattr(terminal._master)[3] & termios.ICANON
    assert "could no longer be read" in terminal.seen
    terminal.close()
    (saved,) = sessions.glob("*.json")
    assert "never to be lost" in saved.read_text()


def _never_end_an_answer(path: Path) -> None:
    """Control tokens get the logit 0: one of the other 274 random ones is always larger."""
    (head,) = (tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "output.weight")
    head.data[FIRST_SPECIAL_ID : FIRST_SPECIAL_ID + NUM_SPECIALS] = 0


def test_changes_are_noticed_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"0123456789")
    files = ModelFiles(path)
    assert files.changes() == ""
    os.utime(path, ns=(1, 1))
    assert "was written since it was loaded" in files.changes()
    assert files.changes() == ""  # said once
    path.write_bytes(b"0123456789abc")
    assert "was written" in files.changes()
    os.truncate(path, 3)
    for _ in range(2):
        with pytest.raises(KimiLiteError, match="has become shorter since it was loaded: 3 of 13 bytes"):
            files.changes()


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_file_that_is_overwritten_during_an_answer_is_reported_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"0123456789")

    def open_here(*arguments: object) -> Engine:
        engine = open_fake(*arguments)
        engine.info = replace(engine.info, path=path)
        engine.model.before_layer = lambda batch, layer: path.write_bytes(b"9876543210")
        return engine

    monkeypatch.setattr("kimi_lite.apps.opening.load", open_here)
    monkeypatch.setattr(
        f"kimi_lite.apps.{'run' if command == 'run' else 'chat.command'}.guard_terminal", lambda *a: None
    )
    arguments = [command, "-m", "x", *(["hi"] if command == "run" else ["--no-warm"])]
    result = CliRunner().invoke(app, arguments, input="hi\n" if command == "chat" else "")
    assert "you said: hi" in result.stdout
    assert result.stderr.count("was written since it was loaded; answers may be wrong") == 1


@pytest.mark.parametrize("kind", ["replaced", "deleted", "an endpoint"])
def test_what_does_not_touch_the_mapped_file_is_not_reported(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    if kind != "an endpoint":
        path.write_bytes(b"0123456789")
    files = ModelFiles(path)
    if kind == "replaced":
        (tmp_path / "new").write_bytes(b"0")
        (tmp_path / "new").replace(path)
    elif kind == "deleted":
        path.unlink()
    assert files.changes() == ""
