"""Workers keep to one hardware thread of every core, where there are cores enough."""

import os
from pathlib import Path

import pytest

from kimi_lite.native.cpu import placement
from kimi_lite.native.cpu.placement import keep_to_cores, one_thread_per_core


def make_topology(folder: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        (folder / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(text + "\n")
    return folder


def test_one_of_each_core(tmp_path: Path) -> None:
    """Two cores of two threads, and two small ones without a second thread, as hybrid CPUs have them."""
    topology = make_topology(tmp_path, {0: "0-1", 1: "0-1", 2: "2,6", 6: "2,6", 3: "3", 4: "4"})
    assert one_thread_per_core({0, 1, 2, 6, 3, 4}, topology) == {0, 2, 3, 4}
    assert one_thread_per_core({1, 6}, topology) == {1, 6}  # what this process may use
    assert one_thread_per_core({0, 1, 9}, topology) == {0, 1, 9}  # unknown


@pytest.mark.parametrize(("num_threads", "expected"), [(2, {0, 2}), (3, None), (4, None)])
def test_only_while_there_are_cores_enough(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, expected: set[int] | None
) -> None:
    set_to = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: set_to.append(cpus), raising=False)
    monkeypatch.setattr(placement, "one_thread_per_core", lambda allowed: {0, 2})
    keep_to_cores(num_threads)
    assert set_to == ([] if expected is None else [expected])


def test_a_system_that_forbids_it_costs_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, cpus: set[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    monkeypatch.setattr(placement, "one_thread_per_core", lambda allowed: {0})
    with pytest.warns(UserWarning, match="not permitted"):
        keep_to_cores(1)
