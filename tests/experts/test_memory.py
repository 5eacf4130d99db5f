"""Memory for slots: what the system may put into huge pages."""

import sys
from pathlib import Path

import pytest

from kimi_lite.experts.memory import BLOCK_BYTES, aligned_memory


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
def test_slots_may_lie_in_huge_pages() -> None:
    """The mapping is private, as `shmem_enabled` is never by default, and huge pages are asked for."""
    memory = aligned_memory(8 << 20)
    mappings, fields = [], []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ":" not in line.split()[0]:
            fields = []
            mappings.append((line.split(), fields))
        fields.append(line.split())
    [(header, flags)] = [
        (header, next(each for each in fields if each[0] == "VmFlags:"))
        for header, fields in mappings
        if int(header[0].split("-")[0], 16) <= memory.ctypes.data < int(header[0].split("-")[1], 16)
    ]
    assert header[1] == "rw-p", header
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags, flags


def test_zeros_on_a_border_that_a_disk_writes_to() -> None:
    for num_bytes in (0, 1, BLOCK_BYTES + 1, 5 << 20):
        memory = aligned_memory(num_bytes)
        assert memory.ctypes.data % BLOCK_BYTES == 0 and len(memory) >= num_bytes and not memory.any()
