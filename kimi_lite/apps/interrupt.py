"""Ctrl-C while the model works: the first asks it to stop, the second ends the program. Used by `apps.chat` and `apps.run`."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C has come. `again` stops work that began only after it did."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.has_come = False

    def come(self) -> None:
        self.has_come = True
        self._action()

    def again(self) -> None:
        if self.has_come:
            self._action()


@contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[Interrupt]:
    """Inside the block the first Ctrl-C calls `action` and the next raises KeyboardInterrupt."""
    interrupt = Interrupt(action)

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt.come()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def silent_keys() -> Iterator[None]:
    """Inside the block what is typed is not shown; it waits for the next prompt. Nothing where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
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
