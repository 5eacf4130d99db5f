"""Text in the encodings that people have, wherever they give some; and what is written, whatever the locale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_lite.apps.chat.attachments import read_text
from kimi_lite.apps.tools.mcp_config import read_mcp_config
from kimi_lite.commandline.config_file import read_settings
from tests.apps.terminal import ROOT

FAKE = [sys.executable, "-m", "tests.apps.fake_main"]
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")
TEXT = "héllo wörld, this is text"
LOCALES = (
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1"},
)


def fake(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    command = [*FAKE, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("LC_")} | environment
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, timeout=120, env=env, check=False)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_prompt_by_file_and_by_pipe(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.txt").write_bytes((TEXT + "\r\nnext\r\n").encode(encoding))
    done = fake("run", "-m", "x", "-q", "-f", tmp_path / "p.txt", stdin=TEXT.encode(encoding))
    assert done.stdout.decode() == f"you said: {TEXT}\nnext\n\n\n{TEXT}\n"


@pytest.mark.parametrize(
    ("encoding", "locale"),
    [
        *((encoding, LOCALES[0]) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le")),
        *((encoding, locale) for encoding in ("utf-8", "utf-16") for locale in LOCALES[1:]),
    ],
)
def test_messages_by_pipe_in_any_locale(encoding: str, locale: dict[str, str]) -> None:
    done = fake("chat", "-m", "x", "-q", stdin=f"{TEXT}\r\n/system é\r\nmore\r\n".encode(encoding), **locale)
    assert done.returncode == 0, done.stderr
    assert b"you said: more" in done.stdout
    (saved,) = (Path(os.environ["KIMI_LITE_STATE"]) / "sessions").glob("*.json")
    document = json.loads(saved.read_text(encoding="utf-8"))
    assert document["turns"][0]["content"] == TEXT
    assert document["system"] == "é"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_configurations_and_files_for_a_message(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "m.json").write_bytes('{"mcpServers": {}}'.encode(encoding))
    (tmp_path / "c.toml").write_bytes("temp = 0.5\r\n".encode(encoding))
    (tmp_path / "t.txt").write_bytes((TEXT + "\r\n").encode(encoding))
    assert read_mcp_config(tmp_path / "m.json") == []
    assert len(read_settings(tmp_path / "c.toml")) == 1
    assert read_text(str(tmp_path / "t.txt")).text == TEXT + "\n"


@pytest.mark.parametrize("locale", LOCALES)
def test_what_is_written_is_utf_8_whatever_the_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    path, exported = tmp_path / "answer.txt", tmp_path / "x.md"
    done = fake("run", "-m", "x", "-o", path, "-f", "-", stdin="你好 é".encode(), **locale)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == "you said: 你好 é\n".encode()
    done = fake("chat", "-m", "x", stdin=f"你好\n/export md {exported}\n".encode(), **locale)
    assert done.returncode == 0, done.stderr
    assert "你好" in exported.read_text(encoding="utf-8")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("lines", ["caf\xe9\n/export\nmore\n", "/system caf\xe9\nmore\n"])
def test_bytes_that_are_not_text_are_refused_and_the_chat_goes_on(lines: str) -> None:
    done = fake("chat", "-m", "x", "-q", stdin=lines.encode("latin-1"))
    assert done.returncode == 0, done.stderr
    assert b"is not UTF-8 text: byte 0xE9 after 3 characters" in done.stderr
    assert done.stdout == b"you said: more\n"


def test_a_system_prompt_that_is_not_text_is_a_sentence() -> None:
    done = fake("run", "-m", "x", "hi", "-s", os.fsdecode("caf\xe9".encode("latin-1")))
    assert done.returncode == 2
    assert b"The system prompt is not UTF-8 text" in done.stderr
