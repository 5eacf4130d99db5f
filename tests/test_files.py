"""Files that are whole or not there."""

import io
import os
import stat
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite import files
from kimi_lite.arch.checkpoint import read_json_object
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import MAX_TEXT_BYTES, decode_text, read_text, require_writable, whole_file
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.quantize.source.kimi_tokenizer import read_ranks
from kimi_lite.quantize.source.shards import read_header

WITH_MARK = ("utf-8-sig", "utf-16", "utf-32")
WESTERN = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1)


def test_it_appears_at_the_end_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as file:
        file.write("größer")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "größer"
    with whole_file(path, "wb", permissions=0o600) as file:
        file.write(b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.write("half", 1)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "missing" / "b"):
        pass


def test_a_link_stays_a_link_and_what_waits_under_the_unfinished_name_is_left_alone(tmp_path: Path) -> None:
    real, link, victim = tmp_path / "real", tmp_path / "link", tmp_path / "victim"
    victim.write_text("precious")
    link.symlink_to(real)
    for path in (link, tmp_path / "plain"):
        (tmp_path / f"{path.name}.{os.getpid()}.partial").symlink_to(victim)
        (tmp_path / f"real.{os.getpid()}.partial").unlink(missing_ok=True)
        (tmp_path / f"real.{os.getpid()}.partial").symlink_to(victim)
        with whole_file(path) as file:
            file.write("new")
        assert path.read_text() == "new"
    assert link.is_symlink()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["a", "there", "no/such", ".", "there/below", "x" * 300])
def test_a_path_is_refused_beforehand_exactly_when_it_could_not_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").write_text("old")
    path = tmp_path / name
    with pytest.raises(KimiLiteError) if name not in ("a", "there") else nullcontext() as refused:
        require_writable(path, "The answer")
    with pytest.raises(OSError, match="Errno") if refused else nullcontext(), whole_file(path) as file:
        file.write("new")
    assert not refused or "Errno" not in str(refused.value)


@given(st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"])), st.sampled_from(WITH_MARK))
def test_text_with_a_byte_order_mark_is_read_without_it(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding), "It") == text
    big = "utf-16-be"
    assert decode_text(("\ufeff" + text).encode(big), "It") == text
    assert decode_text(text.replace("\n", "\r\n").encode(encoding), "It") == text


@given(WESTERN)
def test_western_text_as_windows_pipes_it_is_read_without_a_mark_too(text: str) -> None:
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        assert decode_text(text.encode(encoding), "It") == text


@given(st.binary())
def test_any_bytes_are_text_or_a_sentence(data: bytes) -> None:
    with suppress(KimiLiteError):
        text = decode_text(data, "It")
        assert "\0" not in text
        assert "\r" not in text
        text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "caf\u00e9".encode("latin-1"),
            "byte 0xE9 after 3 characters.\nIf it is Western European text: iconv",
        ),
        ("\u201ccaf\u00e9".encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8"),
        (b"\x7fELF\x02\x01\x01\0\0", "is not text: it has NUL bytes"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "images go with --image"),
        (b"\xff\xfea", "is damaged UTF-16 text"),
        (b"x" * (MAX_TEXT_BYTES + 1), "is longer than"),
    ],
)
def test_what_is_no_text_is_a_sentence(data: bytes, message: str) -> None:
    with pytest.raises(KimiLiteError) as error:
        decode_text(data, "It")
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "x\0y"):
        with pytest.raises(KimiLiteError, match=r"The file .* cannot be read: ") as error:
            read_text(path, "The file")
        assert "Errno" not in str(error.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("read", [GGUFStore.open, read_json_object, read_header, read_ranks])
def test_a_git_lfs_pointer_is_named_by_every_reader_of_large_files(tmp_path, read):
    file = tmp_path / "model"
    file.write_bytes(POINTER)
    with pytest.raises(KimiLiteError, match="Git LFS pointer") as caught:
        read(file)
    assert "git lfs pull" in caught.value.hint


class Raw(io.RawIOBase):
    """A file that remembers what it was given at once."""

    def __init__(self, at):
        self.at, self.writes, self.content = at, [], b""

    def writable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        return self.at

    def write(self, data):
        self.writes.append((self.at, len(data)))
        self.content += bytes(data)
        self.at += len(data)
        return len(data)


@given(start=st.integers(0, 40), sizes=st.lists(st.integers(0, 40), max_size=20))
def test_huge_pages_are_written_whole(start, sizes):
    """However the pieces come, and wherever they begin; pages of 16 bytes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "HUGE_PAGE_BYTES", 16)
        raw = Raw(start)
        with io.BufferedWriter(raw, 16) as file:
            data = [os.urandom(size) for size in sizes]
            for piece in data:
                files.write_huge(file, piece)
            file.flush()
            assert raw.content == b"".join(data)
        end = start + sum(sizes)
        for at, size in raw.writes:
            assert at == start or at % 16 == 0
            assert (at + size) % 16 == 0 or at + size == end
