"""Reading a model's files into memory: all of it once, nothing that is there already, and no further after a stop."""

import os
from pathlib import Path

import pytest

from kimi_lite.gguf import warm as module
from kimi_lite.gguf.warm import warm


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files, whose last chunks are not whole."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(paths, (5_000_000, 1_234_567), strict=True):
        path.write_bytes(os.urandom(size))
    return paths


def forget(paths: list[Path]) -> None:
    """Ask the system to drop the files from its memory; it may decline."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_progress_is_in_bytes_and_ends_with_all(paths: list[Path]) -> None:
    forget(paths)
    seen: list[tuple[int, int]] = []
    num_read = warm(paths, lambda done, total: seen.append((done, total)), lambda: False)
    assert seen[-1] == (6_234_567, 6_234_567)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert 0 <= num_read <= 6_234_567


def test_what_is_in_memory_is_not_read_again(paths: list[Path]) -> None:
    for path in paths:
        path.read_bytes()
    with paths[0].open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
        except OSError as error:
            pytest.skip(f"this file system cannot say what is in memory: {error}")
    assert warm(paths, lambda done, total: None, lambda: False) == 0


def test_without_that_question_everything_is_read(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_in_memory", lambda chunk: False)
    assert warm(paths, lambda done, total: None, lambda: False) == 6_234_567


def test_a_stop_reads_no_further(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_in_memory", lambda chunk: False)
    assert warm(paths, lambda done, total: None, lambda: True) == 0
