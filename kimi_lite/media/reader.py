"""Reads images and videos in a child process, which the system ends at its limits; the next one starts another.

reader = MediaReader()
medium = reader.read(Source("image", "a.png", path=Path("a.png")))
"""

import atexit
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from kimi_lite.errors import KimiLiteError
from kimi_lite.isolated import isolated_python
from kimi_lite.media.child import HEADS, MAX_IMAGE_CPU_S, MAX_MEMORY_BYTES, MAX_VIDEO_CPU_S
from kimi_lite.media.medium import MAX_IMAGE_BYTES, Item, Kind, Medium, Source
from kimi_lite.media.preprocess import CHUNK_FRAMES, MAX_IMAGE_PATCHES, Size, digest_of, time_stamp, to_patches

MAX_WAIT_S = 60.0  # without a sign of life: on a busy machine the seconds of work take longer
OnFrames = Callable[[int, int], None]  # frames of a video decoded, frames in all
_PACKAGES = {"PIL": "Pillow", "av": "PyAV"}
_INSTALL = "pip install 'kimi-lite[vision]'"


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What is read at all, and how much of a video."""

    max_bytes: int = MAX_IMAGE_BYTES  # of an image's file
    max_pixels: int = 100_000_000  # of an image, or of a frame
    max_patches: int = MAX_IMAGE_PATCHES  # of an image, after resizing
    fps: float = 2.0  # frames of a video a second, at most
    max_frames: int = 128  # of a video


class MediaReader:
    """Turns files into patches, one after the other; any thread may ask."""

    def __init__(self, limits: MediaLimits | None = None) -> None:
        self.limits = limits or MediaLimits()

    def read(self, source: Source, on_frames: OnFrames | None = None) -> Medium:
        """Raises KimiLiteError naming the source where it cannot be read."""
        _require_packages(source.kind)
        limits = self.limits
        request = {"kind": source.kind, "max_patches": limits.max_patches, "max_pixels": limits.max_pixels}
        request |= {"fps": limits.fps, "max_frames": limits.max_frames}
        with source.open(limits.max_bytes if source.kind == "image" else None) as file:
            frames, remark = [], ""
            for head, rows in _worker().ask(request, file.fileno()):
                if "failure" in head:
                    raise KimiLiteError(f"{source.name} {head['failure']}.", head.get("hint", ""))
                if "progress" in head and on_frames:
                    on_frames(*head["progress"])
                if "frame" in head:
                    frames.append((head["seconds"], Size(*head["frame"]), rows))
                    remark = head["remark"]
        return Medium(source.kind, tuple(_items(frames, source.kind)), remark)


def _items(frames: list[tuple[float, Size, bytes]], kind: Kind) -> Iterator[Item]:
    """Chunks of at most 4 consecutive frames; where the size changes another chunk begins."""
    start = 0
    while start < len(frames):
        seconds, size, _ = frames[start]
        group = [rows for _, one, rows in frames[start : start + CHUNK_FRAMES] if one == size]
        patches = to_patches(group, size)
        yield Item(patches, digest_of(patches), time_stamp(seconds) if kind == "video" else "")
        start += len(group)


def _require_packages(kind: Kind) -> None:
    for name in ("PIL", "av") if kind == "video" else ("PIL",):
        if importlib.util.find_spec(name) is None:
            raise _not_installed(name, kind)


def _not_installed(name: str, kind: Kind) -> KimiLiteError:
    return KimiLiteError(f"To read a{'n' if kind == 'image' else ''} {kind}, {_PACKAGES.get(name, name)} is needed, "
                         f"which is not installed.", _INSTALL)  # fmt: skip


class _Worker:
    """The child and the socket to it; requests are answered one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._owner = 0  # the process that may talk to the child: a fork of ours may not
        atexit.register(self.close)

    def ask(self, request: dict[str, Any], descriptor: int) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The messages of an answer, a failure in the place of what the child did not live to say."""
        with self._lock:
            connection, is_whole = self._running(), False
            try:
                socket.send_fds(connection, [json.dumps(request).encode()], [descriptor])
                while not is_whole:
                    head, body = self._receive(connection)
                    is_whole = "end" in head or "failure" in head or "missing" in head
                    if "missing" in head:
                        raise _not_installed(head["missing"], request["kind"])
                    yield head, body
            except (EOFError, BrokenPipeError, ConnectionResetError, TimeoutError):
                is_whole = False
                yield {"failure": self._cause_of_death(request["kind"])}, b""
            finally:
                if not is_whole:  # Ctrl-C too: its answer would be taken for the next one
                    self._end()

    def close(self) -> None:
        """End the child, if it is ours."""
        if self._child is not None and self._owner == os.getpid():
            self._end()

    def _running(self) -> socket.socket:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            ours, theirs = socket.socketpair()
            command = isolated_python("kimi_lite.media.child", theirs.fileno())
            try:
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise KimiLiteError(
                    f"The process that reads images cannot be started: {error.strerror}.",
                    "Allow this user another process.",
                ) from error
            finally:
                theirs.close()
            self._socket, self._owner = ours, os.getpid()
        assert self._socket is not None
        return self._socket

    def _receive(self, connection: socket.socket) -> tuple[dict[str, Any], bytes]:
        head_bytes, body_bytes = HEADS.unpack(_receive_all(connection, HEADS.size))
        return json.loads(_receive_all(connection, head_bytes)), _receive_all(connection, body_bytes)

    def _cause_of_death(self, kind: Kind) -> str:
        """After an answer without end."""
        child = self._child
        assert child is not None
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
        limit_s = MAX_VIDEO_CPU_S if kind == "video" else MAX_IMAGE_CPU_S
        if child.returncode is None or child.returncode == -signal.SIGPROF:
            return f"takes more than {limit_s:g} s to be decoded"
        return f"needs more than {MAX_MEMORY_BYTES >> 30} GiB to be decoded, or broke the program that does it"

    def _end(self) -> None:
        assert self._child is not None and self._socket is not None
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(0.05)
        if self._child.returncode is None:
            self._child.kill()
            self._child.wait()
        self._child = self._socket = None


def _receive_all(connection: socket.socket, num_bytes: int) -> bytes:
    """EOFError where the other side ended before, TimeoutError where it says nothing for too long."""
    data, until_s = bytearray(num_bytes), time.monotonic() + MAX_WAIT_S
    view = memoryview(data)
    while view:
        if not select.select([connection], [], [], max(until_s - time.monotonic(), 0))[0]:
            raise TimeoutError
        received = connection.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return bytes(data)


@cache
def _worker() -> _Worker:
    return _Worker()
