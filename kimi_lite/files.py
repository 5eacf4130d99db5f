"""Files that appear only when they are complete, whenever the program ends; text that people give us, in the
encodings they have; and the folder of files that can be made again.
"""

import codecs
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

from platformdirs import user_cache_path

from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    import numpy as np

MAX_TEXT_BYTES = 64_000_000  # of one text: more than any context, and a limit to /dev/zero
MAX_CORPUS_BYTES = 2_000_000_000  # of a text to measure or calibrate with
_BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MOST_ZEROS = 0.6  # of every other byte: then it is UTF-16 of mostly Western text
_NO_TEXT = "Name a text file; images go with --image, in a chat with /image."
PARTIAL = ".partial"  # how the names of unfinished files end
HUGE_PAGE_BYTES = 2 << 20


def cache_folder() -> Path:
    """$KIMI_LITE_CACHE, or the platform's cache folder for kimi-lite (XDG_CACHE_HOME counts)."""
    chosen = os.environ.get("KIMI_LITE_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("kimi-lite")


@contextmanager
def whole_file(path: Path, mode: str = "w", permissions: int = 0o666) -> Iterator[IO]:
    """A new file for `path`, "w" (UTF-8) or "wb": written under another name, synced and renamed when the block ends.

    What was at `path` stays until then. An error in the block leaves it as it was and takes the unfinished file away.
    A link stays a link, a device or a pipe (/dev/stdout) is written as it is. A file or link that waits under the other
    name is not used.
    """
    encoding = None if "b" in mode else "utf-8"
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file():
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    partial.unlink(missing_ok=True)  # of a process that had our number
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(partial, flags, permissions)
    try:
        with open(descriptor, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_huge(file: BinaryIO, data: "bytes | memoryview | np.ndarray") -> None:
    """Writes to a file that was opened with a buffer of HUGE_PAGE_BYTES, so that the system gets whole huge pages: in
    such it then keeps them in memory, where the file system can, and reads of them are faster (`gguf.mapping`)."""
    rest = memoryview(data).cast("B")
    while rest:
        num_bytes = HUGE_PAGE_BYTES - file.tell() % HUGE_PAGE_BYTES
        file.write(rest[:num_bytes])
        if len(rest) >= num_bytes:
            file.flush()
        rest = rest[num_bytes:]


def rescue(text: str, suffix: str = ".txt") -> str:
    """Write what must not be lost into the folder for temporary files; a sentence that says where it is."""
    try:
        descriptor, name = tempfile.mkstemp(suffix, "kimi-lite-")  # for its owner only
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        return f"Nor into {tempfile.gettempdir()}: {error.strerror}. It was:\n{text}"
    return f"It is in {name}."


def require_writable(path: Path, what: str) -> None:
    """Refuse, before any work is done, a path that `whole_file` could not write; KimiLiteError naming `what`."""
    try:
        problem = _why_not_writable(path)
    except OSError as error:  # a name that is too long
        problem = error.strerror
    if problem:
        raise KimiLiteError(f"{what} cannot be written to {path}: {problem}.", "Name a file in a folder of yours.")


def _why_not_writable(path: Path) -> str:
    if path.is_dir():
        return "it is a folder"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if path.exists() and not path.is_file():
        return "" if os.access(path, os.W_OK) else "it is not writable"
    return "" if os.access(path.parent, os.W_OK | os.X_OK) else f"the folder {path.parent} is not writable"


def read_text(path: Path, what: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a file that a user names, as `decode_text`; KimiLiteError naming `what` ("The prompt file")."""
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise KimiLiteError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return decode_text(data, f"{what} {path}", max_bytes)


def decode_text(data: bytes, what: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 as Windows writes them; without its byte order mark, lines end in "\\n".

    KimiLiteError naming `what` for other encodings and for what is no text: a guess would change the meaning unseen.
    """
    if len(data) > max_bytes:
        raise KimiLiteError(f"{what} is longer than {max_bytes:,} bytes.", "Take a part of it.")
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding not in ("utf-8", "utf-8-sig"):
            raise KimiLiteError(f"{what} is damaged {encoding.upper()} text: {error.reason}.") from None
        if b"\0" in data:
            raise KimiLiteError(f"{what} is not text: it has NUL bytes.", _NO_TEXT) from None
        byte, before = data[error.start], len(data[: error.start].decode(encoding))
        table = "WINDOWS-1252" if set(range(0x80, 0xA0)) & set(data) else "LATIN1"
        raise KimiLiteError(
            f"{what} is not UTF-8 text: byte 0x{byte:02X} after {before:,} characters.",
            f"If it is Western European text: iconv -f {table} -t UTF-8 FILE > NEW.",
        ) from None
    if "\0" in text:
        raise KimiLiteError(f"{what} is not text: it has NUL bytes.", _NO_TEXT)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def require_no_pointer(path: Path, head: bytes) -> None:
    """Refuse what `git clone` leaves in the place of a large file; `head` is how it begins, 8 bytes or more."""
    if head.startswith(b"version "):
        raise KimiLiteError(f"{path} is a Git LFS pointer, not the file itself.", "Run `git lfs pull` there.")


def encoding_of(head: bytes) -> str:
    """By how a text begins: UTF-8, or what its byte order mark says, or UTF-16 where every other byte is zero, as in
    Western text that Windows pipes."""
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), None)
    if marked:
        return marked
    head = head[: min(len(head), 4096) // 2 * 2]
    for encoding, zeros, others in (("utf-16-le", head[1::2], head[0::2]), ("utf-16-be", head[0::2], head[1::2])):
        if head and zeros.count(0) > _MOST_ZEROS * len(zeros) and not others.count(0):
            return encoding
    return "utf-8"
