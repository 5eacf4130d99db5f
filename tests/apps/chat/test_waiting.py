"""While nothing comes yet: what is waited for and how long, and Ctrl-C works; with an endpoint, and here."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_lite.apps.chat.render import SILENCE_S, WorkProgress
from tests.apps.fake_openai import Answer, FakeOpenAI, sse
from tests.apps.screen import Screen
from tests.apps.terminal import Terminal


@pytest.mark.parametrize("command", ["chat", "run"])
@pytest.mark.parametrize("kind", ["before the headers", "before the first event"])
def test_a_silent_endpoint_is_said_to_be_waited_for(command: str, kind: str) -> None:
    answer = sse({"content": "at last"})
    wait_s = SILENCE_S + 2.5
    slow = Answer([answer], wait_s=wait_s) if kind == "before the headers" else Answer([answer], pause_s=wait_s)
    with FakeOpenAI(slow) as server:
        more = ["hi"] if command == "run" else []
        terminal = Terminal("kimi_lite", command, "--endpoint", server.url, *more)
        if command == "chat":
            terminal.wait_for_prompt()
            terminal.type("hi\r")
        terminal.wait_for("at last")
        assert len(set(re.findall(r"waiting for kimi-k2\.5 · (\d) s", terminal.seen))) > 1, terminal.seen
        terminal.wait_until(lambda rows: any("gen" in row for row in rows))
        assert not any("waiting" in row for row in terminal.screen)
        terminal.close()


def test_ctrl_c_ends_the_waiting_at_once() -> None:
    with FakeOpenAI(Answer([sse({"content": "never"})], wait_s=60.0)) as server:
        terminal = Terminal("kimi_lite", "chat", "--endpoint", server.url)
        terminal.wait_for_prompt()
        terminal.type("hi\r")
        terminal.wait_for("waiting for kimi-k2.5")
        began_s = time.monotonic()
        terminal.type("\x03")
        terminal.wait_for("stopped")
        assert time.monotonic() - began_s < 50.0  # of the 60 that it would take
        terminal.wait_for_prompt()
        terminal.close()


def test_a_slow_prompt_here_shows_it_too(tmp_path: Path) -> None:
    terminal = Terminal("tests.apps.fake_main", "chat", "-m", "x", FAKE_BEGUN=str(tmp_path / "begun"))
    terminal.wait_for_prompt()
    terminal.type("deaf\r")
    assert re.search(r"waiting for fake · \d s", terminal.wait_for(" s") + " s")
    terminal.close()


def until(is_right: Callable[[], object]) -> None:
    """Wait for what another thread draws."""
    end_s = time.monotonic() + 100
    while not is_right():
        assert time.monotonic() < end_s, "it is not drawn"
        time.sleep(0.05)


@pytest.mark.parametrize("width", [40, 60, 200])
def test_progress_fits_into_one_row(width: int) -> None:
    screen = Screen(width)
    with WorkProgress(screen.console) as progress:
        progress.wait("waiting for a-model-whose-name-is-longer-than-a-narrow-terminal-is-wide")
        until(lambda: re.search(r"· \d+ s$", screen.text))
        assert len(screen.text.split("\n")) == 1
        progress("reading the prompt", 100, 100_000)
        progress("reading the prompt", 50_000, 100_000)
        until(lambda: "50,000 / 100,000" in screen.text)
        assert "reading the prompt" in screen.text
        assert len(screen.text.split("\n")) == 1


def test_what_ends_within_a_second_shows_nothing() -> None:
    screen = Screen()
    progress = WorkProgress(screen.console)
    for _ in range(3):
        with progress:
            progress.wait("waiting for it")
            progress("reading", 0, 10)
            progress("reading", 10, 10)
    time.sleep(SILENCE_S + 0.2)
    assert "waiting" not in screen.raw.getvalue()
    with progress:
        progress.wait("waiting for it")
        until(lambda: re.search(r"waiting for it · \d+ s", screen.raw.getvalue()))
    assert screen.text == ""
