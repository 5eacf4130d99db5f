"""Files that go with a message: text quoted in it, images and videos as content parts."""

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
from kimi_lite.media.medium import MAX_IMAGE_BYTES, Kind, open_regular, url_of
from kimi_lite.options import Options
from kimi_lite.text.placeholders import kind_of
from kimi_lite.units import counted

MAX_TEXT_BYTES = 4_000_000  # about a million tokens: more than any context
MAX_SENT_VIDEO_BYTES = 48 << 20  # to an endpoint, whose requests have limits
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
_VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg")
_PATH_WORD = re.compile(r"""(?<!\S)(?:'[^']+'|"[^"]+"|(?:\\.|[^\s\\])+)""")  # as terminals write a dropped file
_AFTER_WORDS = ".,;:!?)"  # of the sentence, not of the path
_BRANDS = {b"avif": "image/avif", b"heic": "image/heic", b"heix": "image/heic", b"mif1": "image/heif"}
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
}


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file to go with the next message: `text` of a text file, or `url` (data:..., file:...) of what is shown."""

    name: str
    text: str = ""
    url: str = ""
    kind: Kind = "image"  # of what has a URL
    details: str = ""  # for people: "1,036 tokens"

    @property
    def part(self) -> dict[str, Any]:
        """Of an image or a video: OpenAI's content part."""
        return {"type": f"{self.kind}_url", f"{self.kind}_url": {"url": self.url}}

    def describe(self) -> str:
        """`notes.md (12 lines)`, `photo.png (image, 1,036 tokens)`"""
        num_lines = len(self.text.splitlines())
        what = self.kind if self.url else counted(num_lines, "line")
        return f"{self.name} ({', '.join(filter(None, [what, self.details]))})"


def read_text(argument: str) -> Attachment:
    """A text file for the next message; KimiLiteError when it is missing, too large or not text."""
    path = to_path(argument)
    return Attachment(path.name, decode_text(_read(path, MAX_TEXT_BYTES), str(path)))


def read_image(argument: str, max_bytes: int = MAX_IMAGE_BYTES) -> Attachment:
    """An image for the next message; KimiLiteError when it is missing, too large or not an image."""
    path = to_path(argument)
    return image_of(_read(path, max_bytes), path.name, str(path))


def image_of(data: bytes, name: str, source: str = "") -> Attachment:
    """An image's bytes for the next message; KimiLiteError naming `source` where they are none."""
    mime = next((mime for magic, mime in _MAGIC.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        mime = "image/webp"
    if data[4:8] == b"ftyp":
        mime = _BRANDS.get(data[8:12], mime)
    if mime is None:
        raise KimiLiteError(
            f"{source or name} is not a PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF or HEIC image.",
            "Convert it, or use /read for text, /video for a video.",
        )
    return Attachment(name, url=f"data:{mime};base64,{base64.b64encode(data).decode()}")


def read_video(argument: str, is_sent: bool) -> Attachment:
    """A video for the next message: its path, or all of it where it `is_sent` to an endpoint. KimiLiteError when it is
    missing, or too large to be sent."""
    path = to_path(argument)
    if is_sent:
        data = base64.b64encode(_read(path, MAX_SENT_VIDEO_BYTES)).decode()
        suffix = path.suffix.lower().removeprefix(".")
        form = {"": "mp4", "m4v": "mp4", "mov": "quicktime"}.get(suffix, suffix)
        return Attachment(path.name, url=f"data:video/{form};base64,{data}", kind="video")
    open_regular(path).close()
    return Attachment(path.name, url=path.resolve().as_uri(), kind="video")


def attachment_of(kind: Kind, path: str, options: Options) -> Attachment:
    """A file that is to be shown."""
    if kind == "image":
        return read_image(path, options.image_bytes)
    return read_video(path, is_sent=options.endpoint is not None)


def attachments_from(options: Options) -> list[Attachment]:
    """What --image and --video name."""
    named: list[tuple[Kind, str]] = [("image", path) for path in options.images]
    named += [("video", path) for path in options.videos]
    return [attachment_of(kind, path, options) for kind, path in named]


def attachments_of(content: Content) -> list[Attachment]:
    """The images and videos of a message that was sent, to be sent again."""
    if isinstance(content, str):
        return []
    shown = [(kind, url_of(part)) for part in content if (kind := kind_of(part))]
    return [Attachment(f"{kind} {number}", url=url, kind=kind) for number, (kind, url) in enumerate(shown, 1)]


def dropped_files(text: str) -> list[tuple[Kind, str]]:
    """The words of a message that are paths of existing images and videos, as a terminal writes them when a file is
    dropped into it."""
    found: list[tuple[Kind, str]] = []
    for word in _PATH_WORD.findall(text):
        word = word.rstrip(_AFTER_WORDS)
        name = word.strip("'\"").lower()
        kind: Kind = "image" if name.endswith(_IMAGE_SUFFIXES) else "video"
        if name.endswith((*_IMAGE_SUFFIXES, *_VIDEO_SUFFIXES)) and _exists(word):
            found.append((kind, word))
    return found


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
    """A message with its files: text files quoted after it, images and videos as parts before it."""
    quoted = [f"File `{one.name}`:\n{_fence(one.text)}" for one in attachments if not one.url]
    text = "\n\n".join([*filter(None, [text]), *quoted])
    shown = [one.part for one in attachments if one.url]
    return [*shown, {"type": "text", "text": text}] if shown else text


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
    with open_regular(path, limit_bytes) as file:
        return file.read(limit_bytes)
