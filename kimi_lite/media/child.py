"""The process that decodes: files from anywhere may be made to break or to stall the libraries that read them.

`serve` answers requests on a Unix socket one after the other. A request is a JSON object and the descriptor of an open
file; the answer is messages of a JSON head and a body: `{"progress"}` while it works, `{"frame"}` with RGB rows, at
last `{"end"}` or `{"failure"}`. The system ends it where it takes too much memory or time; then `media.reader` starts
another one.
"""

import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any, BinaryIO

from kimi_lite.media.image import NAMES, Unreadable, read_image
from kimi_lite.media.video import read_frames

HEADS = struct.Struct("<II")  # bytes of head and of body, before every message
MAX_REQUEST_BYTES = 1 << 16
MAX_MEMORY_BYTES = 3 << 30  # address space
MAX_IMAGE_CPU_S = 20.0
MAX_VIDEO_CPU_S = 600.0


def serve(descriptor: int) -> None:
    """Answer until the other side closes the socket."""
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for who waits
    with socket.socket(fileno=descriptor) as connection:
        while True:
            data, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 1)
            if not data:
                return
            request = json.loads(data)
            limit_s = MAX_VIDEO_CPU_S if request["kind"] == "video" else MAX_IMAGE_CPU_S
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            with os.fdopen(descriptors[0], "rb") as file:
                _answer(connection, request, file)
            signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(connection: socket.socket, request: dict[str, Any], file: BinaryIO) -> None:
    try:
        file.seek(0)
        if request["kind"] == "video":
            _answer_video(connection, request, file)
        else:
            frame = read_image(file, request["max_patches"], request["max_pixels"])
            _send(connection, {"frame": frame.size, "remark": frame.remark, "seconds": 0.0}, frame.rows)
        _send(connection, {"end": True})
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)
    except Unreadable as error:
        _send(connection, {"failure": error.message, "hint": error.hint})
    except ImportError as error:
        _send(connection, {"missing": (error.name or str(error)).partition(".")[0]})
    except MemoryError:
        _send(connection, {"failure": f"needs more than {MAX_MEMORY_BYTES >> 30} GiB to be decoded"})
    except Exception as error:  # whatever the libraries raise at damaged files
        _send(connection, {"failure": _reason(error, request["kind"])})


def _answer_video(connection: socket.socket, request: dict[str, Any], file: BinaryIO) -> None:
    report = lambda done, total: _send(connection, {"progress": [done, total]})  # noqa: E731
    frames = read_frames(file, request["fps"], request["max_frames"], request["max_pixels"], report)
    for seconds, frame in frames:
        _send(connection, {"frame": frame.size, "remark": "", "seconds": seconds}, frame.rows)


def _reason(error: Exception, kind: str) -> str:
    """In words, without the libraries' names for files."""
    name, words = type(error).__name__, " ".join(str(error).split())
    if name == "UnidentifiedImageError":
        return f"is not a {NAMES} image"
    if "truncated" in words or "EOF" in words:
        return "is cut off: the end of its data is missing"
    if type(error).__module__.startswith("av."):
        return "is not a video that can be read, or is damaged"
    return f"cannot be decoded: {words[:200] or name}"


def _send(connection: socket.socket, head: dict[str, Any], body: bytes = b"") -> None:
    data = json.dumps(head).encode()
    connection.sendall(HEADS.pack(len(data), len(body)) + data)
    connection.sendall(body)


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not every system has such limits; time is bounded everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
