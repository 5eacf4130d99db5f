"""Saved conversations: whole at any moment, held by one program at a time, and a sentence for every file that is
none."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_lite.apps.chat.sessions import Autosave, Claim, SessionLock, SessionStore
from kimi_lite.engine.session import Session
from kimi_lite.errors import KimiLiteError
from tests.apps.fake_main import repeat
from tests.apps.terminal import ROOT, Terminal
from tests.engine.fakes import fake_engine, scripted_logits

FAKE = "tests.apps.fake_main"
_ENDLESS_SAVER = """
import sys
from pathlib import Path
from tests.apps.chat.test_sessions import open_autosave
from kimi_lite.engine.turns import Turn
autosave = open_autosave(Path(sys.argv[1]))
autosave.save_as("mine")
print("ready", flush=True)
while True:
    autosave.conversation.turns.append(Turn("user", f"{len(autosave.conversation.turns)} " + "x" * 200_000))
    autosave.save()
    print(len(autosave.conversation.turns), flush=True)
"""


def open_autosave(folder: Path) -> Autosave:
    """With one exchange in it."""
    engine = fake_engine(context_length=2048)
    engine.model.next_logits = scripted_logits(engine.tokenizer, repeat)
    session = Session(engine)
    list(session.ask("hi"))
    return Autosave(session, SessionStore(folder))


@pytest.fixture
def autosave(tmp_path: Path) -> Iterator[Autosave]:
    one = open_autosave(tmp_path / "sessions")
    yield one
    one.close()


def test_files_are_for_their_owner_only(autosave: Autosave) -> None:
    autosave.save()
    folder = autosave.store.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600, 0o600]


def test_an_empty_conversation_leaves_no_file(autosave: Autosave) -> None:
    autosave.conversation.clear()
    autosave.save()
    assert not autosave.store.folder.exists()


def test_one_conversation_is_held_by_one_program(autosave: Autosave) -> None:
    autosave.save_as("mine")
    other = open_autosave(autosave.store.folder)
    before = list(other.conversation.turns)
    with pytest.raises(KimiLiteError, match=rf"open in another kimi-lite \(pid {os.getpid()}\)"):
        Claim.of(other.store, "mine")
    with pytest.raises(KimiLiteError, match="open in another"):
        other.store.delete("mine")
    assert other.conversation.turns == before
    autosave.close()
    assert other.open(Claim.of(other.store, "mine"))
    other.close()
    assert {path.suffix for path in autosave.store.folder.iterdir()} == {".json"}


def test_a_lock_file_without_a_holder_holds_nothing(autosave: Autosave) -> None:
    autosave.save_as("mine")
    autosave.close()
    (autosave.store.folder / "mine.lock").write_text("1")
    SessionLock(autosave.store, "mine").release()


def test_a_hold_that_ended_takes_no_other_one_away(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    first = SessionLock(store, "mine")
    first.release()
    with SessionLock(store, "mine"):
        first.release()
        with pytest.raises(KimiLiteError, match="open in another"):
            SessionLock(store, "mine")


def test_two_programs_on_one_conversation_and_the_second_is_refused_politely(tmp_path: Path) -> None:
    first = Terminal(FAKE, "chat", "-m", "x", "--session", "mine")
    first.wait_for("❯")
    first.type("hello\r")
    first.wait_for("TTFT")
    second = Terminal(FAKE, "chat", "-m", "x", "--continue")
    code = second.wait()
    assert code == 2
    assert f"is open in another kimi-lite (pid {first.process.pid})" in second.seen
    assert "--session NAME" in second.seen
    first.type("\x04")
    assert first.wait() == 0
    third = Terminal(FAKE, "chat", "-m", "x", "--continue")
    third.wait_for("mine: 1 exchange, the last about: hello")
    for one in (first, second, third):
        one.close()


def test_a_kill_during_a_save_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", _ENDLESS_SAVER, str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        num_saved = 2
        for _ in range(3 + 4 * attempt):
            num_saved = int(process.stdout.readline())
        time.sleep(0.003 * attempt)
        process.kill()
        num_saved = max([num_saved, *map(int, process.communicate()[0].split())])
        store = SessionStore(folder)
        document = store.read("mine")
        assert num_saved <= len(document["turns"]) <= num_saved + 1
        (summary,) = store.summaries()
        assert not summary.error
        other = open_autosave(folder)
        assert other.open(Claim.of(store, "mine"))  # the killed program holds nothing
        other.close()


def test_a_killed_chat_goes_on_where_it_was(tmp_path: Path) -> None:
    terminal = Terminal(FAKE, "chat", "-m", "x")
    terminal.wait_for("❯")
    terminal.type("first words\r")
    terminal.wait_for("TTFT")
    terminal.wait_for("❯")
    terminal.type("slow\r")
    terminal.wait_for("tick tick")
    os.kill(terminal.process.pid, signal.SIGKILL)
    terminal.wait()
    terminal.close()
    again = Terminal(FAKE, "chat", "-m", "x", "--continue")
    again.wait_for("2 exchanges, the last about: slow")
    again.wait_for("the last message has no answer: /regen asks again")
    again.close()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_closed_terminal_keeps_the_partial_answer(name: str) -> None:
    terminal = Terminal(FAKE, "chat", "-m", "x", "--session", "mine")
    terminal.wait_for("❯")
    terminal.type("slow\r")
    terminal.wait_for("tick tick")
    os.kill(terminal.process.pid, getattr(signal, name))
    assert terminal.wait() == 128 + getattr(signal, name)
    terminal.close()
    document = SessionStore(Path(os.environ["KIMI_LITE_STATE"]) / "sessions").read("mine")
    assert document["turns"][-1]["content"].startswith("tick tick")
    assert document["turns"][-1]["finish_reason"] == "cancelled"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ('{"format": "other"}', "is not a conversation"),
        ("[1]", "is not a conversation"),
        ("\xff", "not a con|damaged"),
    ],
)
def test_foreign_and_damaged_files_are_a_sentence(autosave: Autosave, text: str, message: str) -> None:
    autosave.save()
    autosave.store.path("bad").write_text(text, encoding="latin-1")
    before = list(autosave.conversation.turns)
    with pytest.raises(KimiLiteError, match=message):
        autosave.open(Claim.of(autosave.store, "bad"))
    assert autosave.conversation.turns == before
    assert {one.name: bool(one.error) for one in autosave.store.summaries()} == {"bad": True, autosave.name: False}
    assert autosave.store.latest() == autosave.name


def test_nothing_to_continue_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KimiLiteError, match="no conversation to continue"):
        SessionStore(tmp_path).latest()


def test_a_full_disk_is_a_sentence_and_the_old_file_stays(autosave: Autosave, monkeypatch: pytest.MonkeyPatch) -> None:
    autosave.save_as("mine")
    before = autosave.store.path("mine").read_text()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KimiLiteError, match="No space left on device"):
        autosave.save()
    assert autosave.store.path("mine").read_text() == before
    json.loads(before)


def test_flags_go_before_what_was_saved(tmp_path: Path) -> None:
    def chat(lines: str, *flags: str) -> str:
        command = [sys.executable, "-m", FAKE, "chat", "-m", "x", *flags]
        return subprocess.run(
            command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=120, check=True
        ).stderr

    chat("/system from before\n/set temp 0.4\n/set top-k 7\nhello\n", "--session", "mine")
    shown = chat("/set\n/system\n/sessions\n", "--continue", "--temp", "0.2", "--no-think")
    assert "0.2" in shown
    assert "thinking off" not in shown.partition("/help")[2].partition("temp")[0]
    assert "system prompt: from before" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["top-k"]] == ["7"]
    assert "system prompt: now" in chat("/system\n", "--continue", "-s", "now")
