"""Conversations that cannot be saved, or not where they should: the chat goes on, it is said once, and nothing is
lost."""

import errno
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.apps.chat import sessions
from kimi_lite.apps.chat.command import claim_session, prepare_folder
from kimi_lite.apps.chat.sessions import Autosave, Claim, SessionLock, SessionStore
from kimi_lite.engine.session import Session
from kimi_lite.errors import KimiLiteError
from tests.apps.chat.test_sessions import open_autosave
from tests.apps.talk import Talk
from tests.apps.terminal import ROOT, Terminal
from tests.engine.fakes import fake_engine

FAKE = [sys.executable, "-m", "tests.apps.fake_main", "chat", "-m", "x"]


def chat(lines: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*FAKE, *flags],
        cwd=ROOT,
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_chats_that_begin_in_the_same_second_get_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_name_of_now", lambda: "2026-11-28_12-00-00")
    first, second, third = (open_autosave(tmp_path) for _ in range(3))
    first.save()
    first.close()  # the first is over when the second saves
    second.save()
    third.save()  # while the second goes on
    second.save()
    names = ["2026-11-28_12-00-00", "2026-11-28_12-00-00-2", "2026-11-28_12-00-00-3"]
    assert [one.name for one in (first, second, third)] == names
    assert sorted(one.name for one in SessionStore(tmp_path).summaries()) == names
    second.close()
    third.close()


def test_many_chats_at_once_lose_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_name_of_now", lambda: "same")

    def one(number: int) -> None:
        autosave = open_autosave(tmp_path)
        autosave.conversation.system = f"number {number}"
        for _ in range(3):
            autosave.save()
        autosave.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(16)))
    store = SessionStore(tmp_path)
    systems = {store.read(summary.name)["system"] for summary in store.summaries()}
    assert systems == {f"number {number}" for number in range(16)}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "rename", "flock"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_anything_never_ends_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """Each system call of a save fails; afterwards the disk is well again."""
    talk = Talk(tmp_path / "sessions", capsys)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        if call == "rename":
            broken.setattr(Path, "replace", fail)
        elif call == "flock":
            broken.setattr(sessions.fcntl, "flock", fail)
        else:
            broken.setattr(os, call, fail)
        shown = talk.say("one", "two", "three")
    assert [turn.text for turn in talk.session.turns if turn.role == "user"] == ["one", "two", "three"]
    if call == "pwrite":  # the number in a lock is for people
        assert "unsaved" not in shown
        return
    assert shown.count("The chat goes on unsaved.") == 1
    assert os.strerror(code) in " ".join(shown.split())
    assert "the conversation is saved again" in talk.say("four")
    document = talk.store.read(talk.chat.autosave.name)
    assert [turn["content"] for turn in document["turns"]][::2] == ["one", "two", "three", "four"]
    talk.chat.autosave.close()


def test_what_cannot_be_saved_in_the_end_is_written_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "sessions").write_text("not a folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    talk = Talk(tmp_path / "sessions", capsys)
    shown = talk.say("precious", f"/export md {tmp_path / 'kept.md'}", "/clear")
    assert "precious" in (tmp_path / "kept.md").read_text()
    (kept,) = (tmp_path / "tmp").iterdir()
    assert str(kept) in shown.replace("\n", "")
    assert "precious" in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert talk.session.turns == []


@pytest.mark.parametrize("place", ["/proc", "FILE", "FILE/below"])
def test_a_state_folder_that_cannot_be_goes_unsaved_with_a_word_before_the_load(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = chat("hi\nagain\n", KIMI_LITE_STATE=place.replace("FILE", str(tmp_path / "file")))
    assert (done.returncode, done.stdout) == (0, "you said: hi\nyou said: again\n"), done.stderr
    assert done.stderr.count("The chat goes on unsaved") == 1
    assert done.stderr.index("unsaved") < done.stderr.index("· fake")
    assert "Traceback" not in done.stderr
    (kept,) = re.findall(r"It is in (\S+)\.", done.stderr)
    assert "again" in Path(kept).read_text()
    Path(kept).unlink()


def test_at_a_terminal_what_was_typed_is_remembered_without_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    terminal = Terminal("tests.apps.fake_main", "chat", "-m", "x", KIMI_LITE_STATE=str(tmp_path / "file"))
    terminal.wait_for_prompt()
    terminal.enter("first words")
    terminal.type("\x1b[A")  # arrow up
    terminal.wait_until(lambda rows: rows[-1].startswith("❯ first words"))
    terminal.type("\x03\x04")
    assert terminal.wait() == 0
    terminal.close()
    (kept,) = re.findall(r"It is in\s(\S+)\.", terminal.seen)
    Path(kept).unlink()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--continue"], "no conversation to continue"),
        (["--session", "mine"], "open in another kimi-lite"),
        (["--session", "bad"], "is damaged"),
        (["--session", "../x"], "not a valid name"),
        (["--continue", "--session", "a"], "both given"),
    ],
)
def test_what_cannot_be_opened_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    from typer.testing import CliRunner

    from kimi_lite.cli import app

    opened: list[object] = []
    monkeypatch.setattr("kimi_lite.apps.opening.open_conversation", lambda *a: opened.append(a))
    monkeypatch.setattr("kimi_lite.apps.chat.command.open_conversation", lambda *a: opened.append(a))
    store = SessionStore(Path(os.environ["KIMI_LITE_STATE"]) / "sessions")
    store.folder.mkdir(parents=True)
    store.path("bad").write_text("[" * 100_000)
    with SessionLock(store, "mine"):
        result = CliRunner().invoke(app, ["chat", "-m", "x", *flags])
    assert isinstance(result.exception, KimiLiteError)
    assert message in str(result.exception)
    assert opened == []


def test_leftovers_of_killed_saves_are_removed_but_not_those_of_a_living_one(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    for name in ("dead.json.1.partial", "gone.json.77.partial", "held.json.99.partial", "old.lock"):
        (tmp_path / name).write_text("MYSECRET")
    with SessionLock(store, "held"):
        store.clean()
        assert {path.name for path in tmp_path.iterdir()} == {"held.json.99.partial", "held.lock"}
    autosave = open_autosave(tmp_path)
    autosave.save_as("held")
    autosave.close()
    store.delete("held")
    assert list(tmp_path.iterdir()) == []


def test_a_start_cleans_and_closes_the_folder(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "a" / "b" / "sessions")
    assert prepare_folder(store) == ""
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]
    store.folder.chmod(0o755)
    (store.folder / "x.json.1.partial").touch()
    prepare_folder(store)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert list(store.folder.iterdir()) == []


def test_undoing_everything_leaves_nothing_to_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tmp_path, capsys)
    talk.say("one", "/undo")
    assert talk.store.summaries() == []
    talk.say("two", "/save mine", "/undo")
    assert "no conversation is saved" in talk.say("/sessions")
    talk.chat.autosave.close()
    with pytest.raises(KimiLiteError, match="no conversation to continue"):
        claim_session(talk.store, True, None)
    assert claim_session(talk.store, False, "mine").document is not None


def test_clear_begins_a_conversation_with_its_own_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(tmp_path, capsys)
    talk.say("one")
    first = talk.store.read(talk.chat.autosave.name)["created"]
    monkeypatch.setattr("kimi_lite.engine.conversation.now", lambda: "2030-01-01T00:00:00+00:00")
    monkeypatch.setattr(sessions, "_name_of_now", lambda: "later")
    talk.say("/clear", "two", f"/export md {tmp_path / 'x.md'}")
    assert talk.store.read("later")["created"] == "2030-01-01T00:00:00+00:00" != first
    assert "Jan 2030" in (tmp_path / "x.md").read_text() or "Dec 2029" in (tmp_path / "x.md").read_text()
    talk.chat.autosave.close()


def test_a_conversation_is_found_by_how_its_name_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tmp_path, capsys)
    talk.say("one", "/save trip to Rome", "/clear", "two", "/save trip to Oslo", "/clear")
    assert "2 conversations begin with 'trip'" in talk.say("/load trip")
    assert "trip to Oslo: 1 exchange" in talk.say("/load trip to O")
    assert "is the conversation you are in" in talk.say("/load trip to Oslo")
    shown = talk.say("/sessions rome")
    assert "Rome" in shown
    assert "Oslo" not in shown
    talk.chat.autosave.close()


_DAMAGES = {
    "cut": lambda whole, at: whole[:at],
    "changed": lambda whole, at: whole[:at] + b"\xff\x00" + whole[at + 2 :],
    "doubled": lambda whole, at: whole[:at] + whole[:at],
    "with a mark": lambda whole, at: b"\xef\xbb\xbf" + whole,
    "UTF-16": lambda whole, at: whole.decode().encode("utf-16"),
    "deep": lambda whole, at: b"[" * 5000,
    "of another kind": lambda whole, at: re.sub(rb'("[a-z_]+"):("[^"]*"|\d+)', rb"\1:{}", whole, count=1 + at % 9),
    "no turns": lambda whole, at: whole.replace(b'"turns":', b'"turns":7,"was":'),
    "half a turn": lambda whole, at: whole.replace(b'"content":', b'"contents":', 1),
}


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(kind=st.sampled_from(sorted(_DAMAGES)), share=st.floats(0, 1))
def test_any_damage_to_a_session_is_one_sentence(tmp_path: Path, kind: str, share: float) -> None:
    autosave = open_autosave(tmp_path)
    autosave.is_named, autosave.name = True, "one"
    autosave.save()
    autosave.close()
    path = autosave.store.path("one")
    whole = path.read_bytes()
    path.write_bytes(_DAMAGES[kind](whole, int(share * len(whole))))
    (summary,) = autosave.store.summaries()
    said = ""
    try:
        claim = Claim.of(autosave.store, "one")
    except KimiLiteError as error:
        said = str(error)
    else:
        with claim.lock:
            Autosave(Session(fake_engine()), autosave.store).open(claim)
    assert bool(summary.error) <= bool(said)  # what the list calls damaged cannot be opened
    assert not said or "damaged" in said or "not a conversation" in said or "version" in said
