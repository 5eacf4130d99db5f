"""Reading a model's files into memory: all of it once, nothing that is there already, and no further after a stop."""

import os
import threading
from pathlib import Path

import pytest

from kimi_lite.gguf import warm as module
from kimi_lite.gguf.warm import Run, warm


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


def test_where_a_mapping_cannot_be_populated_files_are_read(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, "populate", lambda mapped, start, num_bytes: asked.append(num_bytes))
    monkeypatch.setattr(module, "_is_in_memory", lambda chunk: False)
    assert warm(paths, lambda done, total: None, lambda: False) == 6_234_567 == sum(asked)


def test_a_stop_reads_no_further(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_in_memory", lambda chunk: False)
    assert warm(paths, lambda done, total: None, lambda: True) == 0


def test_runs_are_read_by_threads_of_their_node(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte once: runs by threads that are kept to their CPUs, what is between them by any."""
    read, lock, local = [], threading.Lock(), threading.local()
    monkeypatch.setattr(module, "keep_to", lambda cpus: setattr(local, "cpus", set(cpus)))

    def note(chunk: module._Chunk, should_stop: object) -> int:
        with lock:
            read.append((chunk.descriptor, chunk.offset, chunk.offset + chunk.num_bytes, getattr(local, "cpus", set())))
        return chunk.num_bytes

    monkeypatch.setattr(module, "_read", note)
    first, second = paths
    runs = [Run(first, 4096, 2_500_000, {0, 1}), Run(first, 2_500_000, 3_000_000, {2}), Run(second, 0, 1000, {2})]
    assert warm(paths, lambda done, total: None, lambda: False, runs=runs) == 6_234_567
    descriptors = sorted({descriptor for descriptor, *_ in read})
    by_file = {path: sorted(r[1:] for r in read if r[0] == d) for path, d in zip(paths, descriptors, strict=True)}
    for path, chunks in by_file.items():
        assert [start for start, _, _ in chunks] == [0, *(stop for _, stop, _ in chunks[:-1])]
        assert chunks[-1][1] == path.stat().st_size
        for start, stop, cpus in chunks:
            own = next((run.cpus for run in runs if run.path == path and run.start <= start < run.stop), set())
            assert cpus == own and (not own or stop <= next(r.stop for r in runs if r.path == path and start < r.stop))


def test_runs_end_where_the_file_does(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_in_memory", lambda chunk: False)
    cpus = os.sched_getaffinity(0)
    seen: list[tuple[int, int]] = []
    runs = [Run(path, 10, path.stat().st_size, cpus) for path in paths]
    assert warm(paths, lambda done, total: seen.append((done, total)), lambda: False, runs=runs) == 6_234_567
    assert seen[-1] == (6_234_567, 6_234_567)
