"""A program in a pseudo-terminal: type to it, wait for what it shows. For tests of interactive commands."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte

ROOT = Path(__file__).parents[2]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()=>][0-9A-B]?|\x1b\][^\x07]*\x07")
_PROMPT = re.compile(r"(\d+ files? )?❯(\s+(thinking|instant|editing the last message))?")
TIMEOUT_S = 120.0


class Terminal:
    """Runs `python -m MODULE ARGUMENTS` on a terminal; `seen` is all it showed, without escape sequences."""

    def __init__(self, *arguments: str, num_rows: int = 24, num_columns: int = 100, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", num_rows, num_columns, 0, 0))
        env = os.environ | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        command = [sys.executable, "-m", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, **streams, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(slave)
        self.raw = ""
        self._mark = 0
        self.timeout_s = TIMEOUT_S
        self._screen = pyte.Screen(num_columns, num_rows)
        self._stream = pyte.Stream(self._screen)
        self._num_drawn = 0

    @property
    def seen(self) -> str:
        return _ESCAPES.sub("", self.raw).replace("\r", "")

    def type(self, text: str) -> None:
        """As from the keyboard. Wait for the prompt before keys that only it understands."""
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """What was shown since the last call up to `text`; fails with all of it when it does not come."""
        deadline_s = time.monotonic() + self.timeout_s
        while (at := self.seen.find(text, self._mark)) < 0:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"no {text!r} in:\n{self.seen[self._mark :]}"
            if not self._read(min(left_s, 0.2)):
                raise AssertionError(f"ended without {text!r}:\n{self.seen[self._mark :]}")
        shown = self.seen[self._mark : at]
        self._mark = at + len(text)
        return shown

    @property
    def screen(self) -> list[str]:
        """The rows as a person sees them, without the empty ones at the end."""
        self._stream.feed(self.raw[self._num_drawn :])
        self._num_drawn = len(self.raw)
        rows = [row.rstrip() for row in self._screen.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def wait_until(self, is_right: Callable[[list[str]], bool]) -> list[str]:
        """The screen once it is as wanted."""
        deadline_s = time.monotonic() + self.timeout_s
        while not (self.screen and is_right(self.screen)):
            assert self._read(0.1) and time.monotonic() < deadline_s, "not as wanted:\n" + "\n".join(self.screen)
        return self.screen

    def wait_for_prompt(self) -> list[str]:
        """The screen once its last row is an empty prompt and stays so."""
        deadline_s = time.monotonic() + self.timeout_s
        while True:
            before = len(self.raw)
            is_alive = self._read(0.15)
            screen = self.screen
            if len(self.raw) == before and screen and _PROMPT.fullmatch(screen[-1]):
                self._mark = len(self.seen)
                return screen
            assert is_alive and time.monotonic() < deadline_s, "no prompt on:\n" + "\n".join(screen)

    def enter(self, line: str) -> list[str]:
        """Type a line at the prompt; the screen when it is done."""
        self.type(line + "\r")
        self._read(0.3)
        return self.wait_for_prompt()

    def wait(self) -> int:
        """Read to the end; the exit code."""
        deadline_s = time.monotonic() + self.timeout_s
        while self._read(0.2):
            assert time.monotonic() < deadline_s, f"does not end:\n{self.seen[self._mark :]}"
        return self.process.wait(self.timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)

    def _read(self, timeout_s: float) -> bool:
        """Take in what has come; False when the program has closed the terminal."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux: the other end is closed
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)


def _own_terminal() -> None:
    """Make stdin the new session's terminal, so that its Ctrl-C becomes a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
