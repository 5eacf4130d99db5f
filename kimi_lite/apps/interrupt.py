"""Ctrl-C while the model works: the first asks it to stop, a later one ends the program."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_S = 1.0  # a Ctrl-C sooner after the first is the same wish, typed twice


class Forced(KeyboardInterrupt):
    """Another Ctrl-C while something works that was asked to stop: the program is to end."""


class Interrupt:
    """Whether Ctrl-C has come. `again` stops work that began only after it did."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.has_come = False
        self._came_s = 0.0

    def come(self) -> None:
        """From the signal's handler."""
        if self.has_come and time.monotonic() - self._came_s >= PATIENCE_S:
            raise Forced
        if not self.has_come:
            self.has_come, self._came_s = True, time.monotonic()
        self._action()

    def again(self) -> None:
        if self.has_come:
            self._action()


@contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[Interrupt]:
    """Inside the block Ctrl-C calls `action`; one that comes `PATIENCE_S` after the first raises Forced."""
    interrupt = Interrupt(action)

    def handle(signum: int, frame: FrameType | None) -> None:
        interrupt.come()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def silent_keys(has_editor: bool = False) -> Iterator[None]:
    """Inside the block what is typed is not shown but kept for the next prompt; at a terminal only.

    has_editor: the prompt reads keys, not lines. Then Ctrl-D is kept as a key, too: in a terminal that reads lines it
    is the end of a line, of which nothing is left for who reads keys later."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    off = termios.ECHO | (termios.ICANON if has_editor else 0)
    silent = [*before[:3], before[3] & ~off, *before[4:]]
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextmanager
def as_exit(*names: str) -> Iterator[None]:
    """Inside the block these signals end the program in order, so that what must be saved is: `SIGTERM`, `SIGHUP`."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
