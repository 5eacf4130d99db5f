"""The process between us and an MCP server that we start: `mcp_keeper.command(["npx", "-y", "some-server"])`.

It passes on what the server says to us, within bounds: lines that are no JSON objects go to the log (stderr), and a
line too long ends the server. And it ends the server with all that it started: a moment after our end of its stdin is
closed, as it is however we end, or on SIGTERM.
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from kimi_lite.apps.tools.python_child import become_subreaper, end_descendants

MOST_LINE_BYTES = 16 * 1024**2
MOST_LOG_BYTES = 1024**2
GRACE_S = 1.0  # for ending by itself once its stdin is closed
_POLL_MS, _PIECE = 100, 65536
_START = "import sys; sys.path.insert(0, sys.argv[1]); from kimi_lite.apps.tools.mcp_keeper import main; main()"


def command(server: list[str]) -> list[str]:
    """How to start `server` with a keeper; plain where there are no such processes."""
    if os.name != "posix":
        return server
    return [sys.executable, "-I", "-c", _START, str(Path(__file__).parents[3]), *server]


def main() -> None:
    """Run the server that the command line names, from its third word on, to its end."""
    server = sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    become_subreaper()
    try:
        process = subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        _Relay(process).run()
        code = process.poll()
    except OSError as error:
        print(f"{server[0]} cannot be started: {error.strerror}", file=sys.stderr)
        code = 127
    finally:
        end_descendants()
    sys.exit(128 if code is None or code < 0 else code)


class _Relay:
    """Carries what a server says until it is over."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process, self._line, self._log_bytes = process, bytearray(), 0
        self._out, self._err = process.stdout.fileno(), process.stderr.fileno()

    def run(self) -> None:
        """Until both its outputs are closed, it has ended, or its time is up."""
        poll, end_s, is_open = select.poll(), None, {self._out, self._err}
        for descriptor in is_open:
            poll.register(descriptor, select.POLLIN)
        poll.register(0, 0)  # only that it is closed: what comes is for the server, which reads it itself
        while is_open and (end_s is None or time.monotonic() < end_s):
            events = poll.poll(_POLL_MS)
            if not events and self._process.poll() is not None:
                return  # another process holds its outputs open
            for descriptor, _ in events:
                if descriptor == 0:
                    poll.unregister(0)
                    end_s = time.monotonic() + GRACE_S
                    continue
                piece = os.read(descriptor, _PIECE)
                if not piece:
                    poll.unregister(descriptor)
                    is_open.discard(descriptor)
                elif descriptor == self._err:
                    self._log(piece)
                elif not self._pass_on(piece):
                    return

    def _pass_on(self, piece: bytes) -> bool:
        """Whole lines; False when one is too long or there is no one to pass it to."""
        self._line += piece
        if b"\n" in piece:
            *lines, self._line = self._line.split(b"\n")
            for line in lines:
                if line.lstrip()[:1] == b"{":
                    try:
                        _write(1, line + b"\n")
                    except OSError:
                        return False
                elif line.strip():
                    self._log(line + b"\n")
        if len(self._line) > MOST_LINE_BYTES:
            self._log(f"a line of more than {MOST_LINE_BYTES:,} bytes; ended\n".encode())
            return False
        return True

    def _log(self, piece: bytes) -> None:
        """To our stderr, as much as a log needs."""
        self._log_bytes += len(piece)
        if self._log_bytes <= MOST_LOG_BYTES:
            _write(2, piece)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
