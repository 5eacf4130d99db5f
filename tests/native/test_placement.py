"""Workers keep to one hardware thread of every core, where there are cores enough."""

import os
from pathlib import Path

import pytest

from kimi_lite.native.cpu import placement
from kimi_lite.native.cpu.placement import keep_to_cores, one_thread_per_core, place_threads
from tests.native.test_nodes import make_tree


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


def test_threads_over_nodes_take_one_hardware_thread_of_each_core(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two sockets of two cores with two hardware threads each; more threads than cores take the second ones, too."""
    make_topology(tmp_path / "sys/devices/system/cpu", {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    make_tree(tmp_path, {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}, {0: 8, 1: 8}, {0: (10, 21), 1: (21, 10)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [group.cpus for group in place_threads(4, tmp_path)] == [{0, 1}, {2, 3}]
    assert [group.cpus for group in place_threads(5, tmp_path)] == [{0, 1, 4, 5}, {2, 3}]
    assert [group.num_threads for group in place_threads(5, tmp_path)] == [3, 2]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5}, raising=False)
    assert place_threads(4, tmp_path) == ()
