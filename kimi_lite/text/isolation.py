"""Chat templates rendered in a process of their own, whatever they do with time and memory.

Templates come with files from anywhere, and no list of forbidden operations keeps Python from using all memory in one
of the others. So `text.sandbox.serve` runs in a child, one for the whole program, which the system ends at its limits;
the next request starts another. A request costs a fraction of a millisecond over rendering here.
"""

import atexit
import hashlib
import io
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from kimi_lite.errors import KimiLiteError
from kimi_lite.isolated import isolated_python
from kimi_lite.text.sandbox import (
    LENGTH,
    MAX_CPU_S,
    MAX_MEMORY_BYTES,
    MAX_SOURCE_CHARS,
    Segment,
    read_message,
    to_message,
)
from kimi_lite.units import one_line

MAX_WAIT_S = 60.0  # on a busy machine the second of work takes longer
MAX_REASON_CHARS = 300
_REMEDY = "The file's template is at fault: use a GGUF of another source, or convert it with the model's own template."


def prepare() -> None:
    """Start the process that renders: it gets ready while other work is done."""
    _worker().start()


class IsolatedTemplate:
    """A chat template of a model whose control tokens are `controls`. KimiLiteError where it does not compile."""

    def __init__(self, source: str, controls: Collection[str]) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise KimiLiteError(f"The chat template has {len(source)} characters; {MAX_SOURCE_CHARS} are allowed.")
        names = sorted(controls)
        key = hashlib.sha256("\0".join([source, *names]).encode("utf-8", "surrogatepass")).hexdigest()
        self._definition = {"key": key, "source": source, "controls": names}
        self._compile()

    def render(self, variables: Mapping[str, object], tokens: Mapping[str, str]) -> list[Segment]:
        """The prompt in order; `tokens` are variables that hold a control token. The template's own failures, its
        `raise_exception` included, become KimiLiteError."""
        request = {"key": self._definition["key"], "variables": variables, "tokens": tokens}
        answer = _worker().ask(request)
        if answer.get("is_unknown"):  # another child than the one that compiled it
            self._compile()
            answer = _worker().ask(request)
        if "failure" in answer:
            raise KimiLiteError(f"The chat template does not accept these messages: {_reason(answer)}")
        return [Segment(*segment) for segment in answer["segments"]]

    def _compile(self) -> None:
        answer = _worker().ask(self._definition)
        if "failure" in answer:
            raise KimiLiteError(f"The file's chat template does not compile: {_reason(answer)}", _REMEDY)


def _reason(answer: Mapping[str, Any]) -> str:
    return one_line(answer["failure"], MAX_REASON_CHARS)


class _Worker:
    """The child and the pipes to it; requests are answered one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that may talk to the child: a fork of ours may not
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            child = self._running()
            try:
                answer = self._exchange(child, to_message(request))
            except BaseException:  # Ctrl-C too: its answer would be taken for the next one
                self._end(child)
                raise
            return answer or {"failure": self._cause_of_death(child)}

    def start(self) -> None:
        """Start the child, so that it is ready when it is needed."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the child, if it is ours."""
        if self._child is not None and self._owner == os.getpid():
            self._end(self._child)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            command = isolated_python("kimi_lite.text.sandbox")
            try:
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                raise KimiLiteError(
                    f"The process that renders chat templates cannot be started: {error.strerror}.",
                    "Allow this user another process.",
                ) from error
            self._owner = os.getpid()
        return self._child

    def _exchange(self, child: "subprocess.Popen[bytes]", message: bytes) -> dict[str, Any] | None:
        """The answer; None where the child ended, or had to be ended, before it was whole."""
        assert child.stdin is not None and child.stdout is not None
        deadline_s = time.monotonic() + MAX_WAIT_S
        try:
            child.stdin.write(message)
            child.stdin.flush()
        except BrokenPipeError:
            return None
        data, need = bytearray(), LENGTH.size
        while len(data) < need:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([child.stdout], [], [], left_s)[0]:
                return None
            part = os.read(child.stdout.fileno(), 1 << 20)
            if not part:
                return None
            data += part
            if len(data) >= LENGTH.size:
                need = LENGTH.size + LENGTH.unpack_from(data)[0]
        return read_message(io.BytesIO(data))

    def _cause_of_death(self, child: "subprocess.Popen[bytes]") -> str:
        """After an exchange without answer."""
        is_ended_here = self._end(child)
        if is_ended_here or child.returncode == -signal.SIGPROF:
            return f"it takes more than {MAX_CPU_S:g} s of work"
        return f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory, or broke the program that renders it"

    def _end(self, child: "subprocess.Popen[bytes]") -> bool:
        """Wait for a child that is ending; end one that is not (then True)."""
        assert child.stdin is not None and child.stdout is not None
        is_killed = False
        with suppress(OSError):
            child.stdin.close()
        try:
            child.wait(0.2)
        except subprocess.TimeoutExpired:
            is_killed = True
            child.kill()
            child.wait()
        child.stdout.close()
        self._child = None
        return is_killed


@cache
def _worker() -> _Worker:
    return _Worker()
