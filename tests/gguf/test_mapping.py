"""Files in memory: the same bytes, in huge pages where the file system keeps such."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.files import HUGE_PAGE_BYTES
from kimi_lite.gguf import mapping
from kimi_lite.gguf.mapping import map_file, populate
from kimi_lite.native.cpu.nodes import Node

SIZE = 4 * HUGE_PAGE_BYTES + 12_345


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flags_of(path: Path) -> list[str]:
    """Of this process's mapping of the file, as Linux abbreviates them."""
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            is_it = line.endswith(str(path))
        elif is_it and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_the_bytes_of_the_file_read_only(path: Path) -> None:
    mapped = map_file(path)
    assert mapped.tobytes() == path.read_bytes() and mapped.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's page cache")
def test_populated_bytes_are_in_memory(path: Path) -> None:
    forget(path)
    mapped = map_file(path)
    if not populate(mapped, 0, SIZE):
        pytest.skip("this system cannot populate a mapping")
    with path.open("rb") as file:
        try:
            assert os.preadv(file.fileno(), [bytearray(4096)], SIZE - 4096, os.RWF_NOWAIT) == 4096
        except OSError as error:
            pytest.skip(f"this file system cannot say what is in memory: {error}")
    assert mapped.tobytes() == path.read_bytes()


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
@pytest.mark.parametrize(("num_nodes", "is_asked"), [(0, True), (1, True), (2, False)])
def test_huge_pages_are_asked_for_where_memory_is_one(path: Path, monkeypatch, num_nodes: int, is_asked: bool) -> None:
    nodes = [Node(number, frozenset({number}), 1 << 30) for number in range(num_nodes)]
    monkeypatch.setattr(mapping, "read_nodes", lambda: (*nodes, Node(8, frozenset(), 1 << 30)))  # and memory on a card
    mapped = map_file(path)
    assert ("hg" in flags_of(path)) == is_asked and len(mapped) == SIZE


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's page cache")
def test_what_cannot_be_read_is_not_populated(path: Path) -> None:
    mapped = map_file(path)
    os.truncate(path, 4096)
    assert not populate(mapped, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
