"""Files of one folder: what is found, and that nothing leads out of it."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.apps.tools import files
from kimi_lite.apps.tools.files import file_tools, list_files, read_file, search_files
from kimi_lite.apps.tools.folder import Folder
from kimi_lite.apps.tools.tool import LONGEST_RESULT, ToolError
from kimi_lite.errors import KimiLiteError


def go_on() -> bool:
    return False


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
    assert read_file(folder, go_on, "a.txt") == "one\ntwo 你好\nthree"
    assert read_file(folder, go_on, "a.txt", 2, 1) == "two 你好\n[more lines; go on with first_line=3]"
    assert read_file(folder, go_on, "in") == "one\ntwo 你好\nthree"
    assert read_file(folder, go_on, "a.txt", 9) == "(no line 9)"
    (folder.root / "long").write_text("x" * 5000 + "\n" + "y\n" * 50_000)
    text = read_file(folder, go_on, "long")
    assert text.startswith("x" * 2000 + " [... line cut]\ny\n")
    assert len(text) < LONGEST_RESULT
    assert text.endswith("[more lines; go on with first_line=2001]")


def test_a_file_without_end_is_read_in_parts(folder: Folder) -> None:
    (folder.root / "wide").write_text(("z" * 1999 + "\n") * 100)
    first = read_file(folder, go_on, "wide")
    assert len(first) < LONGEST_RESULT
    start = int(first.rpartition("=")[2].rstrip("]"))
    assert read_file(folder, go_on, "wide", start).startswith("z")


@pytest.mark.parametrize(
    "path", ["../secret.txt", "out", "up/secret.txt", "up", "/etc/passwd", "sub/../../secret.txt", "no\0", "none"]
)
def test_nothing_leads_out(folder: Folder, path: str) -> None:
    with pytest.raises(ToolError, match=r"outside|no "):
        read_file(folder, go_on, path)
    with pytest.raises(ToolError, match=r"outside|no "):
        list_files(folder, path)
    with pytest.raises(ToolError, match=r"outside|no "):
        search_files(folder, go_on, "two", path)


def test_what_is_no_text_is_refused(folder: Folder) -> None:
    with pytest.raises(ToolError, match="binary"):
        read_file(folder, go_on, "sub/deep/c.bin")
    (folder.root / "latin1").write_bytes("café".encode("latin-1"))
    with pytest.raises(ToolError, match="UTF-8"):
        read_file(folder, go_on, "latin1")
    (folder.root / "cut").write_text("你" * 5000)  # a character across the end of what is probed
    assert read_file(folder, go_on, "cut").startswith("你")
    os.mkfifo(folder.root / "fifo")
    with pytest.raises(ToolError, match="no ordinary file"):
        read_file(folder, go_on, "fifo")
    with pytest.raises(ToolError, match="list_files"):
        read_file(folder, go_on, "sub")


def test_searching(folder: Folder) -> None:
    assert search_files(folder, go_on, "two") == "a.txt:2: two 你好\nsub/b.py:1: x = 'TWO'"
    assert search_files(folder, go_on, "two", name="*.py") == "sub/b.py:1: x = 'TWO'"
    assert search_files(folder, go_on, "two", "sub") == "sub/b.py:1: x = 'TWO'"
    assert search_files(folder, go_on, "two", "a.txt") == "a.txt:2: two 你好"
    assert search_files(folder, go_on, "(a+)+$") == "(no match)"
    with pytest.raises(ToolError, match="empty"):
        search_files(folder, go_on, "")
    (folder.root / "many").write_text("hit\n" * 500)
    assert len(search_files(folder, go_on, "hit").split("\n")) == 101


def test_searching_ends(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "stopped" in search_files(folder, lambda: True, "two")
    monkeypatch.setattr(files, "SEARCH_S", -1.0)
    began_s = time.monotonic()
    assert "stopped" in search_files(folder, go_on, "two")
    assert time.monotonic() - began_s < 30.0


def test_links_inside_are_followed_wherever_they_stand(folder: Folder) -> None:
    (folder.root / "sub" / "back").symlink_to("../sub/deep/..")
    (folder.root / "all").symlink_to(folder.root)
    (folder.root / "chain").symlink_to("all/sub/back/b.py")
    for path in ("sub/b.py", "sub/back/b.py", "all/sub/b.py", "chain", f"{folder.root}/sub//b.py/"):
        assert read_file(folder, go_on, path) == "x = 'TWO'"
    with pytest.raises(ToolError, match="there is no"):
        read_file(folder, go_on, "in/../sub/b.py")  # a file has no folder above it
    assert list_files(folder, "all/sub/back").split("\n") == ["sub/b.py 10", "sub/back (link)", "sub/deep/"]
    (folder.root / "loop").symlink_to("loop")
    with pytest.raises(ToolError, match="there is no"):
        read_file(folder, go_on, "loop")


_PARTS = st.sampled_from(
    [*["sub", "deep", "..", ".", "in", "out", "up", "all", "b.py", "secret.txt", "root", "none"], "", "/"]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(_PARTS, max_size=8).map("/".join))
def test_it_finds_what_the_system_finds_inside_and_nothing_else(folder: Folder, path: str) -> None:
    if not (folder.root / "all").is_symlink():
        (folder.root / "all").symlink_to("sub/../")
    real = os.path.realpath(folder.root / path)
    try:
        with folder.find(path) as entry:
            found = os.path.join(folder.root, entry.name).rstrip("/")
    except ToolError:
        return
    assert found == real
    assert found == str(folder.root) or found.startswith(f"{folder.root}/")


@pytest.mark.parametrize("tool", ["read_file", "list_files", "search_files", "search_files of all"])
@pytest.mark.parametrize("step", range(12))
def test_what_becomes_a_link_meanwhile_does_not_lead_out(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, step: int
) -> None:
    """Before every single system call on the way, the folder or the file is exchanged for a link to the outside."""
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (folder.root / "sub" / "deep" / "d.txt").write_text("two harmless")
    (outside / "deep" / "d.txt").write_text("two secrets")
    for exchanged in ("sub", "sub/deep", "sub/deep/d.txt"):
        calls, place = [0], folder.root / exchanged

        def exchange(name: str, original, calls=calls, place=place, exchanged=exchanged) -> None:
            def call(*arguments, **options):
                calls[0] += 1
                if calls[0] == step:
                    place.rename(folder.root / "kept")
                    place.symlink_to(outside / exchanged.removeprefix("sub").lstrip("/"))
                return original(*arguments, **options)

            monkeypatch.setattr(os, name, call)

        with monkeypatch.context() as patched:
            for name in ("open", "lstat", "fstat", "listdir", "readlink"):
                exchange(name, getattr(os, name))
            with suppress(ToolError):
                shown = {
                    "read_file": lambda: read_file(folder, go_on, "sub/deep/d.txt"),
                    "list_files": lambda: list_files(folder, "sub/deep", 8),
                    "search_files": lambda: search_files(folder, go_on, "two", "sub/deep/d.txt"),
                    "search_files of all": lambda: search_files(folder, go_on, "two", "sub"),
                }[tool]()
                assert "secrets" not in shown
                assert "11" not in shown or tool != "list_files"  # the size of the file outside
            patched.undo()
        monkeypatch.undo()
        if place.is_symlink():
            place.unlink()
            (folder.root / "kept").rename(place)


def test_a_race_of_a_folder_against_a_link(folder: Folder, tmp_path: Path) -> None:
    (folder.root / "sub" / "secret.txt").write_text("harmless")
    (folder.root / "link").symlink_to(tmp_path)
    swapper = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os\nwhile True:\n    for names in ('sub real', 'link sub', 'sub link', 'real sub'):\n"
            "        os.rename(*names.split())",
        ],
        cwd=folder.root,
    )
    shown, end_s = {"harmless": 0, "refused": 0}, time.monotonic() + 1.5
    try:
        while time.monotonic() < end_s:
            try:
                text = read_file(folder, go_on, "sub/secret.txt")
            except ToolError:
                text = "refused"
            shown[text] += 1  # KeyError: something outside
    finally:
        swapper.kill()
        swapper.wait()
    assert min(shown.values()) > 0, shown


def test_reading_of_what_has_no_end_stops(folder: Folder) -> None:
    (folder.root / "sparse").write_text("line\n" * 4000)
    os.truncate(folder.root / "sparse", 1 << 40)
    began_s = time.monotonic()
    shown = read_file(folder, lambda: time.monotonic() > began_s + 0.3, "sparse", 900_000_000)
    assert "stopped" in shown
    assert time.monotonic() - began_s < 30.0


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
