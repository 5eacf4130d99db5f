"""`kimi-lite chat` on a real terminal (a pty) and on pipes, with a scripted model."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_lite.apps.chat.commands.registry import all_commands
from kimi_lite.apps.interrupt import PATIENCE_S
from tests.apps.fake_openai import Answer, FakeOpenAI, sse
from tests.apps.terminal import ROOT, Terminal

FAKE = "tests.apps.fake_main"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(FAKE, "chat", "-m", "x", FAKE_BEGUN=str(tmp_path / "begun"))
    yield terminal
    terminal.close()


def wait_for_work(folder: Path) -> None:
    """Until the model has begun to read the first message."""
    end_s = time.monotonic() + 100
    while not (folder / "begun").exists():
        assert time.monotonic() < end_s, "it does not begin"
        time.sleep(0.02)


def test_a_conversation(terminal: Terminal) -> None:
    header = terminal.wait_for("❯")
    assert "· fake" in header
    assert "Q8_0 67 %, F32 33 % · 2.9 MiB · context 4,096" in header
    assert "thinking on (temp 1, top-p 0.95)" in header
    terminal.type("hello\r")
    shown = terminal.wait_for("TTFT")
    assert "▸ thought for 0 s · 8 tokens" in shown
    assert shown.index("thought for") < shown.index("you said: hello")
    assert "cached" not in shown
    terminal.wait_for("❯")
    terminal.type("again\r")
    assert " cached)" in terminal.wait_for("TTFT")
    terminal.wait_for("❯")
    terminal.type("/exit\r")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal: Terminal) -> None:
    terminal.wait_for("❯")
    terminal.type("slow\r")
    terminal.wait_for("tick tick")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("❯")
    terminal.type("fine\r")
    terminal.wait_for("you said: fine")
    assert " cached)" in terminal.wait_for("TTFT")
    terminal.wait_for("❯")
    terminal.type("/clear\r")
    terminal.wait_for("a new conversation")
    terminal.wait_for("❯")
    terminal.type("anew\r")
    terminal.wait_for("TTFT")
    terminal.wait_for("❯")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_reading_of_a_long_prompt(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("❯")
    terminal.type("long prompt " * 60 + "\r")
    wait_for_work(tmp_path)
    terminal.type("\x03")
    assert "gen 0 tok" in terminal.wait_for("stopped")
    terminal.wait_for("❯")
    terminal.type("/clear\r")  # else the question would still be read first
    terminal.wait_for("a new conversation")
    terminal.wait_for("❯")
    terminal.type("short\r")
    terminal.wait_for("you said: short")


def test_ctrl_c_at_the_prompt_clears_the_line_and_says_how_to_leave(terminal: Terminal) -> None:
    terminal.wait_for("❯")
    terminal.type("half a line\x03")
    terminal.wait_for("Ctrl-D or /exit to leave")
    terminal.wait_for("❯")
    terminal.type("whole\r")
    terminal.wait_for("TTFT")
    terminal.wait_for("❯")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_d_during_an_answer_leaves_after_it_and_what_is_typed_waits(terminal: Terminal) -> None:
    terminal.wait_for("❯")
    terminal.type("slow\r")
    terminal.wait_for("tick tick")
    terminal.type("\x03next\r\x04")  # stop, then a line, then the end; Ctrl-C forgets what was typed before it
    terminal.wait_for("stopped")
    terminal.wait_for("you said: next")
    terminal.wait_for("TTFT")
    assert terminal.wait() == 0


def test_a_later_ctrl_c_ends_a_program_that_does_not_stop(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("❯")
    terminal.type("deaf\r")  # the model never asks whether it should stop
    wait_for_work(tmp_path)
    terminal.type("\x03\x03")  # typed twice: the same wish
    time.sleep(PATIENCE_S)
    assert terminal.process.poll() is None
    terminal.type("\x03")
    with suppress(subprocess.TimeoutExpired):
        terminal.process.wait(20)
    if terminal.process.poll() is None:  # a busy machine had seen the first just before
        terminal.type("\x03")
    assert terminal.wait() == 130


def test_pasted_lines_are_one_message(terminal: Terminal) -> None:
    terminal.wait_for("❯")
    terminal.type("\x1b[200~" + "\n".join(f"line {i}" for i in range(20)) + "\x1b[201~\r")
    shown = terminal.wait_for("TTFT")
    assert "you said: line 0" in shown
    assert "line 19" in shown.partition("you said")[2]


def test_settings_by_command(terminal: Terminal) -> None:
    terminal.wait_for("❯")
    terminal.type("/think off\r")
    terminal.wait_for("thinking off (temp 0.6, top-p 0.95)")
    terminal.type("/system be brief\r")
    terminal.wait_for("system prompt: be brief")
    terminal.type("hi\r")
    assert "thought for" not in terminal.wait_for("TTFT")
    terminal.wait_for("❯")
    terminal.type("/think maybe\r")
    terminal.wait_for("It is /think on, off, show, hide or budget N.")
    terminal.type("/exlt\r")
    terminal.wait_for("unknown command /exlt - did you mean /exit?")
    terminal.type("/help\r")
    shown = terminal.wait_for("Alt-Enter")
    assert all(f"/{command.names[0]}" in shown for command in all_commands().commands)
    terminal.type("/bye\r")
    assert terminal.wait() == 0


def test_a_message_too_long_does_not_end_the_chat() -> None:
    terminal = Terminal(FAKE, "chat", "-m", "x", "-c", "128")
    terminal.wait_for("❯")
    terminal.type("x" * 200 + "\r")
    terminal.wait_for("it has 128")
    terminal.wait_for("❯ xxx")  # it comes back into the prompt
    terminal.type("\x03")
    terminal.wait_for("❯")
    terminal.type("short\r")
    terminal.wait_for("you said: short")
    terminal.close()


def test_lines_of_a_pipe_are_messages_and_stdout_has_only_answers() -> None:
    lines = "hello\n\n/think off\nagain\n/nonsense\nmore\n"
    done = subprocess.run(
        [sys.executable, "-m", FAKE, "chat", "-m", "x"],
        cwd=ROOT,
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "you said: hello\nyou said: again\nyou said: more\n"
    assert done.returncode == 0
    assert "unknown command /nonsense" in done.stderr
    assert done.stderr.count("TTFT") == 3


def test_no_command_has_two_meanings() -> None:
    registry = all_commands()
    names = [name for command in registry.commands for name in command.names]
    assert len(set(names)) == len(names)
    with pytest.raises(AssertionError, match="help"):
        registry.add(replace(registry.commands[0], names=("help",)))


def test_an_endpoint_answers_in_the_same_chat(tmp_path: Path) -> None:
    """Every command that does not need the model's insides works, an image goes through, and the conversation is
    saved."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    answers = [sse({"reasoning_content": "hm"}, {"content": f"answer {i}"}) for i in range(5)]
    lines = f"one\n/regen\n/think off\n/image {tmp_path}/a.png\ntwo\n/edit three\n"
    lines += "/ctx\n/tokens\n/stats\n/ctx summarise 1\n/save far\n"
    command = [sys.executable, "-m", "kimi_lite", "chat"]
    with FakeOpenAI(*answers) as server:
        flags = ["--endpoint", server.url, "--api-key", "k"]
        done = subprocess.run([*command, *flags], cwd=ROOT, input=lines, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "answer 0\nanswer 1\nanswer 2\nanswer 3\nanswer 4\n"
        assert "kimi-k2.5" in done.stderr
        assert "ids of the last answer are not known here" in done.stderr
        assert "replaced by this summary" in done.stderr
        assert "saved as far" in done.stderr
        contents = [body["messages"][-1]["content"] for body in server.bodies]
        assert contents[:2] == ["one", "one"]
        assert [part["type"] for part in contents[2]] == ["image_url", "text"]
        assert contents[3] == [contents[2][0], {"type": "text", "text": "three"}], "its image stays"
        server.answers.append(Answer([sse({"content": "again"})]))
        more = subprocess.run(
            [*command, *flags, "--continue"], cwd=ROOT, input="four\n", capture_output=True, text=True, timeout=120
        )
        assert more.stdout == "again\n"
        assert "answer 4" in server.bodies[-1]["messages"][0]["content"]  # the summary
