"""Files that go with a message: text quoted in it, images as content parts."""

import base64
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kimi_lite.engine.turns import Content
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import decode_text
from kimi_lite.units import counted

MAX_TEXT_BYTES = 4_000_000  # about a million tokens: more than any context
MAX_IMAGE_BYTES = 20_000_000
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
_PATH_WORD = re.compile(r"""(?<!\S)(?:'[^']+'|"[^"]+"|(?:\\.|[^\s\\])+)""")  # as terminals write a dropped file


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file to go with the next message: `text` of a text file, or `url` (data:...) of an image."""

    name: str
    text: str = ""
    url: str = ""

    def describe(self) -> str:
        """`notes.md (12 lines)`"""
        num_lines = len(self.text.splitlines())
        return f"{self.name} (image)" if self.url else f"{self.name} ({counted(num_lines, 'line')})"


def read_text(argument: str) -> Attachment:
    """A text file for the next message; KimiLiteError when it is missing, too large or not text."""
    path = to_path(argument)
    data = _read(path, MAX_TEXT_BYTES)
    return Attachment(path.name, decode_text(data, str(path)))


def read_image(argument: str) -> Attachment:
    """An image for the next message; KimiLiteError when it is missing, too large or not an image."""
    path = to_path(argument)
    data = _read(path, MAX_IMAGE_BYTES)
    mime = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        mime = "image/webp"
    if mime is None:
        raise KimiLiteError(f"{path} is not a PNG, JPEG, GIF or WebP image.", "Convert it, or use /read for text.")
    return Attachment(path.name, url=f"data:{mime};base64,{base64.b64encode(data).decode()}")


def dropped_images(text: str) -> list[str]:
    """The words of a message that are paths of existing image files, as a terminal writes them when a file is dropped
    into it."""
    return [
        word
        for word in _PATH_WORD.findall(text)
        if word.strip("'\"").lower().endswith(_IMAGE_SUFFIXES) and _exists(word)
    ]


def to_path(argument: str) -> Path:
    """A path as typed or dropped: quoted, with escaped blanks, with ~, or a file:// address."""
    argument = argument.strip()
    if argument.startswith("file://"):
        return Path(unquote(urlsplit(argument).path))
    path = Path(argument).expanduser()
    if path.exists():
        return path
    try:
        words = shlex.split(argument)
    except ValueError:
        return path
    return Path(words[0]).expanduser() if len(words) == 1 else path


def compose(text: str, attachments: list[Attachment]) -> Content:
    """A message with its files: text files quoted after it, images as parts before it."""
    quoted = [f"File `{one.name}`:\n{_fence(one.text)}" for one in attachments if not one.url]
    text = "\n\n".join([*filter(None, [text]), *quoted])
    images: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": one.url}} for one in attachments if one.url
    ]
    return [*images, {"type": "text", "text": text}] if images else text


def _fence(text: str) -> str:
    """The text between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text.removesuffix(chr(10))}\n{fence}"


def _exists(word: str) -> bool:
    try:
        return to_path(word).is_file()
    except OSError:  # a name too long for the file system is not a file
        return False


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        if path.is_dir():
            raise KimiLiteError(f"{path} is a folder.", "Name a file in it.")
        have_bytes = path.stat().st_size
        if have_bytes > limit_bytes:
            raise KimiLiteError(
                f"{path} has {have_bytes:,} bytes; at most {limit_bytes:,} go into a message.", "Take a part of it."
            )
        return path.read_bytes()
    except OSError as error:
        raise KimiLiteError(f"{path} cannot be read: {error.strerror or error}.") from error
