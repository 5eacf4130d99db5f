"""Files of one folder: what is found, and that nothing leads out of it."""

import os
import time
from pathlib import Path

import pytest

from kimi_lite.apps.tools import files
from kimi_lite.apps.tools.files import file_tools, list_files, read_file, search_files
from kimi_lite.apps.tools.folder import Folder
from kimi_lite.apps.tools.tool import LONGEST_RESULT, ToolError
from kimi_lite.errors import KimiLiteError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    root = tmp_path / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("one\ntwo 你好\nthree\n")
    (root / "sub" / "b.py").write_text("x = 'TWO'\n")
    (root / "sub" / "deep" / "c.bin").write_bytes(b"\x00\x01two")
    (tmp_path / "secret.txt").write_text("two secrets")
    (root / "out").symlink_to(tmp_path / "secret.txt")
    (root / "up").symlink_to(tmp_path)
    (root / "in").symlink_to(root / "a.txt")
    return Folder(root)


def test_listing(folder: Folder) -> None:
    assert list_files(folder).split("\n") == ["a.txt 21", "in (link)", "out (link)", "sub/", "up (link)"]
    assert list_files(folder, "sub", 2).split("\n") == ["sub/b.py 10", "sub/deep/", "sub/deep/c.bin 5"]
    assert list_files(folder, "sub/deep") == "sub/deep/c.bin 5"
    (folder.root / "empty").mkdir()
    assert list_files(folder, "empty") == "(empty)"
    for i in range(600):
        (folder.root / "empty" / f"{i}").touch()
    assert len(list_files(folder, "empty").split("\n")) == 501
    with pytest.raises(ToolError, match="read_file"):
        list_files(folder, "a.txt")


def test_reading(folder: Folder) -> None:
    assert read_file(folder, "a.txt") == "one\ntwo 你好\nthree"
    assert read_file(folder, "a.txt", 2, 1) == "two 你好\n[more lines; go on with first_line=3]"
    assert read_file(folder, "in") == "one\ntwo 你好\nthree"
    assert read_file(folder, "a.txt", 9) == "(no line 9)"
    (folder.root / "long").write_text("x" * 5000 + "\n" + "y\n" * 50_000)
    text = read_file(folder, "long")
    assert text.startswith("x" * 2000 + " [... line cut]\ny\n")
    assert len(text) < LONGEST_RESULT
    assert text.endswith("[more lines; go on with first_line=2001]")


def test_a_file_without_end_is_read_in_parts(folder: Folder) -> None:
    (folder.root / "wide").write_text(("z" * 1999 + "\n") * 100)
    first = read_file(folder, "wide")
    assert len(first) < LONGEST_RESULT
    start = int(first.rpartition("=")[2].rstrip("]"))
    assert read_file(folder, "wide", start).startswith("z")


@pytest.mark.parametrize(
    "path", ["../secret.txt", "out", "up/secret.txt", "up", "/etc/passwd", "sub/../../secret.txt", "no\0", "none"]
)
def test_nothing_leads_out(folder: Folder, path: str) -> None:
    for tool in (read_file, list_files):
        with pytest.raises(ToolError, match=r"outside|no "):
            tool(folder, path)
    with pytest.raises(ToolError, match=r"outside|no "):
        search_files(folder, lambda: False, "two", path)


def test_what_is_no_text_is_refused(folder: Folder) -> None:
    with pytest.raises(ToolError, match="binary"):
        read_file(folder, "sub/deep/c.bin")
    (folder.root / "latin1").write_bytes("café".encode("latin-1"))
    with pytest.raises(ToolError, match="UTF-8"):
        read_file(folder, "latin1")
    (folder.root / "cut").write_text("你" * 5000)  # a character across the end of what is probed
    assert read_file(folder, "cut").startswith("你")
    os.mkfifo(folder.root / "fifo")
    with pytest.raises(ToolError, match="no ordinary file"):
        read_file(folder, "fifo")
    with pytest.raises(ToolError, match="list_files"):
        read_file(folder, "sub")


def test_searching(folder: Folder) -> None:
    assert search_files(folder, lambda: False, "two") == "a.txt:2: two 你好\nsub/b.py:1: x = 'TWO'"
    assert search_files(folder, lambda: False, "two", name="*.py") == "sub/b.py:1: x = 'TWO'"
    assert search_files(folder, lambda: False, "two", "sub") == "sub/b.py:1: x = 'TWO'"
    assert search_files(folder, lambda: False, "two", "a.txt") == "a.txt:2: two 你好"
    assert search_files(folder, lambda: False, "(a+)+$") == "(no match)"
    with pytest.raises(ToolError, match="empty"):
        search_files(folder, lambda: False, "")
    (folder.root / "many").write_text("hit\n" * 500)
    assert len(search_files(folder, lambda: False, "hit").split("\n")) == 101


def test_searching_ends(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "stopped" in search_files(folder, lambda: True, "two")
    monkeypatch.setattr(files, "SEARCH_S", -1.0)
    began_s = time.monotonic()
    assert "stopped" in search_files(folder, lambda: False, "two")
    assert time.monotonic() - began_s < 1.0


def test_a_file_that_is_changed_for_a_link_meanwhile(folder: Folder, tmp_path: Path) -> None:
    real = folder.locate("a.txt")
    (folder.root / "a.txt").unlink()
    (folder.root / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ToolError):
        folder.open(real)


def test_links_in_a_circle_end(folder: Folder) -> None:
    (folder.root / "sub" / "round").symlink_to(folder.root)
    assert list_files(folder, ".", 8).count("round") == 1


def test_the_folder_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(KimiLiteError, match="cannot be opened"):
        Folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(KimiLiteError, match="is a file"):
        Folder(tmp_path / "file")


def test_what_is_declared_can_be_called(folder: Folder) -> None:
    tools = {tool.name: tool for tool in file_tools(folder)}
    assert list(tools) == ["list_files", "read_file", "search_files"]
    assert tools["read_file"].run({"path": "a.txt", "num_lines": 1}, lambda: False).startswith("one\n[more")
    assert tools["list_files"].run({}, lambda: False).startswith("a.txt")
    assert tools["search_files"].run({"text": "ONE"}, lambda: False) == "a.txt:1: one"
