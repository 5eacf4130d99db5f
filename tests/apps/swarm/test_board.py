"""Files that agents share: nothing is overwritten unseen, nothing is lost, nothing leads out."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.swarm import board
from kimi_lite.apps.swarm.board import SharedFiles
from kimi_lite.apps.tools.tool import ToolError


def go_on() -> bool:
    return False


class Shared(NamedTuple):
    files: SharedFiles
    conflicts: list[tuple[str, tuple[str, ...]]]
    root: Path

    def call(self, agent: str, tool: str, **arguments: object) -> str:
        (found,) = (one for one in self.files.tools(agent) if one.name == self.files.tool_name(tool))
        return found.run(arguments, go_on)


def share(root: Path, name: str = "") -> Shared:
    root.mkdir(exist_ok=True)
    conflicts: list[tuple[str, tuple[str, ...]]] = []
    return Shared(SharedFiles(root, lambda path, agents: conflicts.append((path, agents)), name), conflicts, root)


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return share(tmp_path / "root")


def test_agents_hand_files_over(shared: Shared) -> None:
    assert (
        shared.call("a1", "write_file", path="sub/notes.md", text="one\ntwo\n")
        == "sub/notes.md is written: 2 lines, 8 bytes"
    )
    assert shared.call("a2", "read_file", path="sub/notes.md") == "one\ntwo"
    shared.call("a2", "write_file", path="sub/notes.md", text="three\n")
    assert (
        shared.call("a1", "append_file", path="sub/notes.md", text="four\n")
        == "sub/notes.md has 1 line, 5 bytes more: 2 lines, 11 bytes in all"
    )
    assert (shared.root / "sub" / "notes.md").read_text() == "three\nfour\n"
    assert not shared.conflicts and shared.call("a1", "list_files", path="sub") == "sub/notes.md 11"


def test_a_write_over_what_another_agent_wrote_meanwhile_is_refused_and_told(tmp_path: Path) -> None:
    shared = share(tmp_path / "root", "board")
    shared.call("a1", "write_file", path="plan", text="first")
    shared.call("a2", "read_file", path="plan")
    shared.call("a2", "write_file", path="plan", text="second")
    with pytest.raises(
        ToolError, match=r"Agent a2 wrote it after you last saw it\. Read it with board_read_file, then"
    ):
        shared.call("a1", "write_file", path="plan", text="third")
    assert shared.conflicts == [("board/plan", ("a1", "a2"))] and (shared.root / "plan").read_text() == "second"
    assert shared.call("a1", "read_file", path="plan") == "second"
    shared.call("a1", "write_file", path="plan", text="second and third")
    assert (shared.root / "plan").read_text() == "second and third"


def test_what_is_there_must_have_been_read(shared: Shared) -> None:
    (shared.root / "mine").write_text("from before")
    with pytest.raises(ToolError, match="It was there before, and you have not read it"):
        shared.call("a1", "write_file", path="mine", text="x")
    assert not shared.conflicts  # of agents
    shared.call("a1", "read_file", path="mine")
    (shared.root / "mine").write_text("from an editor")
    with pytest.raises(ToolError, match="changed from outside after you last saw it"):
        shared.call("a1", "write_file", path="mine", text="x")
    assert shared.conflicts == [("mine", ("a1",))]
    shared.call("a2", "write_file", path="new", text="by a2")
    with pytest.raises(ToolError, match="Agent a2 wrote it before, and you have not read it"):
        shared.call("a1", "write_file", path="new", text="x")
    assert shared.conflicts[1:] == [("new", ("a1", "a2"))]


def test_to_add_without_reading_is_no_reading(shared: Shared) -> None:
    shared.call("a1", "write_file", path="log", text="a\n")
    shared.call("a2", "append_file", path="log", text="b\n")
    with pytest.raises(ToolError, match="you have not read it"):
        shared.call("a2", "write_file", path="log", text="c\n")
    with pytest.raises(ToolError, match="Agent a2 wrote it after you last saw it"):
        shared.call("a1", "write_file", path="log", text="c\n")
    shared.call("a1", "read_file", path="log")
    shared.call("a1", "append_file", path="log", text="d\n")
    shared.call("a1", "write_file", path="log", text="e\n")
    assert (shared.root / "log").read_text() == "e\n"


def test_a_part_of_a_file_is_not_the_file(shared: Shared) -> None:
    (shared.root / "x").write_text("1\n2\n3\n4\n")
    for lines in ({"num_lines": 2}, {"first_line": 4}, {"first_line": 2, "num_lines": 2}):  # up to line 3, and line 4
        shared.call("a1", "read_file", path="x", **lines)
        with pytest.raises(ToolError, match="you have not read it to its end"):
            shared.call("a1", "write_file", path="x", text="y")
    shared.call("a1", "read_file", path="x", first_line=4)
    shared.call("a1", "write_file", path="x", text="y")
    shared.call("a2", "read_file", path="x", num_lines=1)  # which is all of it
    shared.call("a2", "write_file", path="x", text="1\n2\n")
    shared.call("a1", "read_file", path="x", num_lines=1)
    shared.call("a2", "write_file", path="x", text="1\n3\n")
    shared.call("a1", "read_file", path="x", first_line=2)  # goes on in another file
    with pytest.raises(ToolError, match="Agent a2 wrote it after you last saw it"):
        shared.call("a1", "write_file", path="x", text="y")


_agents, _paths, _texts = st.sampled_from("abc"), st.sampled_from(["x", "d/y", "link"]), st.text("xy\n", max_size=2)
_deeds = st.tuples(_agents, st.sampled_from(["read", "write", "append", "outside"]), _paths, _texts)


@settings(max_examples=60, deadline=None)
@given(deeds=st.lists(_deeds, max_size=12))
def test_a_write_happens_exactly_where_the_agent_knows_what_is_there(
    deeds: list[tuple[str, str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    shared = share(tmp_path_factory.mktemp("shared"))
    (shared.root / "d").mkdir()
    (shared.root / "link").symlink_to("x")
    edition = 0  # of a file: another one after every write, also of the same text
    files: dict[str, tuple[int, str]] = {}
    seen: dict[tuple[str, str], int] = {}
    for agent, deed, path, text in deeds:
        name, edition = "x" if path == "link" else path, edition + 1
        before = files.get(name)
        if deed == "outside":
            place = shared.root / name
            place.unlink(missing_ok=True)
            place.write_text(text)
            os.utime(place, ns=(edition, edition))
            files[name] = edition, text
        elif deed == "read" and before is not None:
            whole = before[1].removesuffix("\n") if before[1] else "(empty file)"
            assert shared.call(agent, "read_file", path=path) == whole
            seen[agent, name] = before[0]
        elif deed == "append":
            shared.call(agent, "append_file", path=path, text=text)
            files[name] = edition, (before[1] if before else "") + text
            if before is None or seen.get((agent, name)) == before[0]:
                seen[agent, name] = edition
        elif deed == "write":
            if before is None or seen.get((agent, name)) == before[0]:
                shared.call(agent, "write_file", path=path, text=text)
                files[name], seen[agent, name] = (edition, text), edition
            else:
                with pytest.raises(ToolError, match="was not written"):
                    shared.call(agent, "write_file", path=path, text=text)
        assert {name: (shared.root / name).read_text() for name in files} == {name: t for name, (_, t) in files.items()}
    assert sorted(os.listdir(shared.root)) == sorted({"d", "link", *(name for name in files if name == "x")})


def test_threads_that_add_lose_nothing_and_of_those_that_write_one_wins(shared: Shared) -> None:
    def add(number: int) -> None:
        for i in range(8):
            shared.call(f"a{number}", "append_file", path="log", text=f"{number} {i}\n")

    def write(number: int) -> bool:
        try:
            shared.call(f"a{number}", "write_file", path="result", text=str(number))
        except ToolError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
        won = list(pool.map(write, range(4)))
    lines = (shared.root / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{number} {i}" for number in range(4) for i in range(8))
    assert won.count(True) == 1 and (shared.root / "result").read_text() == str(won.index(True))
    assert len(shared.conflicts) == 3


_OTHER = """
import sys
from pathlib import Path
from kimi_lite.apps.swarm.board import SharedFiles
files = SharedFiles(Path(sys.argv[1]), lambda path, agents: None)
print("ready", flush=True)
sys.stdin.readline()
for i in range(30):
    files.append("a1", lambda: False, "log", f"other {i}\\n")
"""


def test_processes_that_add_lose_nothing(shared: Shared) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OTHER, str(shared.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        for i in range(30):
            shared.call("a1", "append_file", path="log", text=f"ours {i}\n")
    assert other.returncode == 0
    lines = (shared.root / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{who} {i}" for who in ("ours", "other") for i in range(30))


def test_a_lock_that_another_program_keeps_is_waited_for_and_told(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "LOCK_S", 0.02)
    held = os.open(shared.root, os.O_RDONLY)
    try:
        assert board._try_lock(held, "x")
        with pytest.raises(ToolError, match="locked by another program"):
            shared.call("a1", "write_file", path="x", text="x")
    finally:
        os.close(held)
    shared.call("a1", "write_file", path="x", text="x")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../x", "outside"),
        ("/etc/x", "outside"),
        ("up/x", "outside"),
        ("out", "outside"),
        (".git/hooks/post-commit", "git's own"),
        ("sub/.GIT/config", "git's own"),
        ("hooks", "git's own"),
        (".", "is a folder"),
        ("", "is a folder"),
        ("sub", "is a folder"),
        ("pipe", "no ordinary file"),
        ("a.txt/x", "cannot be written: Not a directory"),
        ("x" * 300, "cannot be written: File name too long"),
        ("a\0b", "cannot be written"),
        ("loop", "cannot be written"),
    ],
)
def test_where_nothing_can_be_written(shared: Shared, path: str, reason: str) -> None:
    root = shared.root
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "a.txt").write_text("a")
    os.mkfifo(root / "pipe")
    for name, target in (("up", ".."), ("out", "../new"), ("hooks", ".git/x"), ("loop", "loop")):
        (root / name).symlink_to(target)
    (root / ".git").mkdir()
    for tool in ("write_file", "append_file"):
        with pytest.raises(ToolError, match=reason):
            shared.call("a1", tool, path=path, text="text")
    assert sorted(os.listdir(root.parent)) == ["root"] and not os.listdir(root / ".git")


@pytest.mark.parametrize(("text", "reason"), [("\ud800", "surrogate"), ("a\0b", "NUL"), ("x" * 4_200_000, "Split it")])
def test_what_cannot_be_written(shared: Shared, text: str, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        shared.call("a1", "write_file", path="x", text=text)
    shared.call("a1", "append_file", path="y", text="y" * 4_000_000)
    if reason == "Split it":
        with pytest.raises(ToolError, match=reason):
            shared.call("a1", "append_file", path="y", text="y" * 400_000)
    assert os.listdir(shared.root) == ["y"]


def test_permissions_of_a_file_stay_and_a_link_inside_stays_a_link(shared: Shared) -> None:
    (shared.root / "script").write_text("old")
    (shared.root / "script").chmod(0o750)
    (shared.root / "link").symlink_to("script")
    shared.call("a1", "read_file", path="link")
    shared.call("a1", "write_file", path="link", text="new")
    assert (shared.root / "script").read_text() == "new" and (shared.root / "script").stat().st_mode & 0o777 == 0o750
    assert (shared.root / "link").is_symlink()


def test_a_disk_that_takes_nothing_leaves_the_old_file(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.call("a1", "write_file", path="x", text="old")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ToolError, match="No space left on device"):
        shared.call("a1", "write_file", path="x", text="new")
    assert os.listdir(shared.root) == ["x"] and (shared.root / "x").read_text() == "old"
