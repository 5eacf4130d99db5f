"""An image or a video as the model will read it, and the files that they come from."""

import base64
import binascii
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from kimi_lite.errors import KimiLiteError
from kimi_lite.model.vision.patches import Patches
from kimi_lite.text.placeholders import kind_of

Kind = Literal["image", "video"]
MAX_IMAGE_BYTES = 20 << 20


class Item(NamedTuple):
    """What becomes one run of placeholders: an image, or up to 4 frames of a video."""

    patches: Patches
    digest: bytes  # 16 bytes that only equal patches share
    stamp: str = ""  # of a video: the time of its first frame, `00:00:01.500`


@dataclass(frozen=True, slots=True, eq=False)
class Medium:
    """One image or video of a message."""

    kind: Kind
    items: tuple[Item, ...]
    remark: str = ""  # what a person should know: "the first frame of an animation"

    @property
    def num_bytes(self) -> int:
        return sum(item.patches.pixels.nbytes for item in self.items)


class Source(NamedTuple):
    """Where a medium comes from: a file, or its bytes."""

    kind: Kind
    name: str  # for messages
    path: Path | None = None
    data: bytes = b""

    def open(self, max_bytes: int | None = None) -> BinaryIO:
        """For reading; KimiLiteError where it is no ordinary file, or too large."""
        if self.path is not None:
            return open_regular(self.path, max_bytes)
        if max_bytes is not None and len(self.data) > max_bytes:
            raise _too_large(self.name, len(self.data), max_bytes)
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        file.write(self.data)
        file.flush()
        return file


def open_regular(path: Path, max_bytes: int | None = None) -> BinaryIO:
    """A file for reading; KimiLiteError for what is none: a device, a pipe, a folder, one that is too large. Links are
    followed."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a device or a pipe"
            raise KimiLiteError(f"{path} is {kind}, not a file.", "Name a file.")
        file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise KimiLiteError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or (max_bytes is not None and status.st_size > max_bytes):
        file.close()
        raise _too_large(str(path), status.st_size, max_bytes or 0)
    return file


def _too_large(name: str, have: int, most: int) -> KimiLiteError:
    hint = "Take a part of it, or make it smaller; --image-size is for images."
    return KimiLiteError(f"{name} has {have:,} bytes; {most:,} can be read.", hint)


def url_of(part: Mapping[str, Any]) -> str:
    """The address in an OpenAI content part that shows something; KimiLiteError where it has none."""
    value = part.get(str(part.get("type")))
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        raise KimiLiteError(f"A part of type {part.get('type')!r:.40} has no URL.")
    return url


def source_of(part: Mapping[str, Any]) -> Source:
    """Of an OpenAI content part that shows something: a `data:` URL, or a `file:` URL that this program wrote.
    KimiLiteError for other addresses."""
    kind, url = kind_of(part), url_of(part)
    assert kind is not None, part.get("type")
    if url.startswith("file://"):
        path = Path(unquote(urlsplit(url).path))
        return Source(kind, path.name, path=path)
    if url.startswith("data:"):
        return Source(kind, f"The {kind}", data=decode_data_url(url))
    raise KimiLiteError(
        f"The {kind} {url[:60]!r} is elsewhere: nothing is fetched from the network.",
        f"Send the {kind} itself: data:...",
    )


def decode_data_url(url: str) -> bytes:
    """The bytes of `data:image/png;base64,...`. The declared type is not believed, and not needed."""
    head, comma, body = url.partition(",")
    if not comma:
        raise KimiLiteError("A data: URL has no comma, so it has no data.")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote(body) if "%" in body else body, validate=True)
    except (binascii.Error, ValueError):
        raise KimiLiteError("A data: URL is not valid base64.", "Encode the file's bytes as they are.") from None
