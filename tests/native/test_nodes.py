"""Memory nodes read from trees of files as Linux has them, and threads divided over them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.native.cpu.bands import steal_order
from kimi_lite.native.cpu.nodes import (
    Node,
    ThreadGroup,
    divide_threads,
    num_sockets,
    parse_list,
    read_nodes,
    split_rows,
)

KIB, GIB = 1 << 10, 1 << 30


def listed(numbers: Sequence[int]) -> str:
    """As the kernel writes them: runs as 0-3."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def make_tree(
    root: Path,
    cpus: Mapping[int, Sequence[int]],
    sizes_gib: Mapping[int, int],
    distances: Mapping[int, Sequence[int]] | None = None,
    memories: Sequence[int] | None = None,
    offline: Sequence[int] = (),
) -> Path:
    """Files of nodes by number; `offline` ones have a folder and are not in the list."""
    folder = root / "sys/devices/system/node"
    for number in [*cpus, *offline]:
        (folder / f"node{number}").mkdir(parents=True)
        (folder / f"node{number}/cpulist").write_text(listed(cpus.get(number, ())) + "\n")
        total = sizes_gib.get(number, 0) << 20
        caches = f"Node {number} Active(file): {total // 8} kB\nNode {number} Inactive(file): {total // 8} kB\n"
        text = f"Node {number} MemTotal:       {total} kB\nNode {number} MemFree:        {total // 2} kB\n{caches}"
        (folder / f"node{number}/meminfo").write_text(text + f"Node {number} HugePages_Total:     0\n")
        if distances:
            (folder / f"node{number}/distance").write_text(" ".join(map(str, distances.get(number, ()))) + "\n")
    (folder / "online").write_text(listed(list(cpus)) + "\n")
    (root / "proc/self").mkdir(parents=True)
    allowed = listed(list(cpus) if memories is None else memories)
    (root / "proc/self/status").write_text(f"Name:\tpython\nMems_allowed:\t00000003\nMems_allowed_list:\t{allowed}\n")
    return root


TWO = {"cpus": {0: range(4), 1: range(4, 8)}, "sizes_gib": {0: 64, 1: 64}, "distances": {0: (10, 21), 1: (21, 10)}}


def test_this_machine() -> None:
    nodes = read_nodes()
    if not nodes:
        pytest.skip("this system does not tell its memory nodes")
    assert set().union(*(node.cpus for node in nodes)) <= os.sched_getaffinity(0)
    assert sum(node.total_bytes for node in nodes) > 0 and all(n.free_bytes <= n.total_bytes for n in nodes)


def test_two_sockets(tmp_path: Path) -> None:
    nodes = read_nodes(range(8), make_tree(tmp_path, **TWO))
    assert nodes[0] == Node(0, frozenset(range(4)), 64 * GIB, 48 * GIB, ((0, 10), (1, 21)))
    assert (nodes[1].distance(0), nodes[1].distance(1), num_sockets(nodes)) == (21, 10, 2)
    groups = divide_threads(nodes, 8, range(8))
    assert groups == (
        ThreadGroup(0, 0, frozenset(range(4)), 0, 4, ((0, 10), (1, 21))),
        ThreadGroup(1, 1, frozenset(range(4, 8)), 4, 8, ((0, 21), (1, 10))),
    )


def test_eight_nodes_of_two_sockets_stand_in_holes_of_the_numbering(tmp_path: Path) -> None:
    """NPS4; a row of distances has a column for each node that is online, not for each number."""
    numbers = [0, 1, 2, 3, 8, 9, 10, 11]
    row = {n: [10 if m == n else 12 if (m < 8) == (n < 8) else 32 for m in numbers] for n in numbers}
    cpus = {n: (2 * i, 2 * i + 1) for i, n in enumerate(numbers)}
    nodes = read_nodes(range(16), make_tree(tmp_path, cpus, dict.fromkeys(numbers, 32), row, offline=[4]))
    assert [node.number for node in nodes] == numbers and num_sockets(nodes) == 2
    assert nodes[5].distance(8) == 12 and nodes[5].distance(3) == 32
    groups = divide_threads(nodes, 16, range(16))
    assert [group.num_threads for group in groups] == [2] * 8
    team_nodes = [group.node for group in groups for _ in range(group.num_threads)]
    by_node = {group.node: group for group in groups}
    order = steal_order(team_nodes, lambda node, other: by_node[node].distance(other))
    assert order[9].tolist()[:17] == [1, 8, 6, 10, 11, 12, 13, 14, 15, 8, 0, 1, 2, 3, 4, 5, 6]


def test_a_node_of_memory_alone_computes_nothing(tmp_path: Path) -> None:
    """An expansion card (CXL): threads leave its memory alone."""
    tree = make_tree(
        tmp_path,
        {0: range(4), 1: range(4, 8), 2: ()},
        {0: 64, 1: 64, 2: 512},
        {0: (10, 21, 14), 1: (21, 10, 24), 2: (14, 24, 10)},
    )
    nodes = read_nodes(range(8), tree)
    assert not nodes[2].cpus and num_sockets(nodes) == 2
    assert {group.memory for group in divide_threads(nodes, 8, range(8))} == {0, 1}
    one_socket = read_nodes(range(4), tree)
    assert divide_threads(one_socket, 4, range(4)) == ()


def test_cores_without_memory_take_the_nearest(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {0: (0, 1), 1: (2, 3), 2: (4, 5), 3: (6, 7)},
        {0: 32, 2: 32},
        {0: (10, 16, 21, 21), 1: (16, 10, 21, 21), 2: (21, 21, 10, 16), 3: (21, 21, 16, 10)},
    )
    groups = divide_threads(read_nodes(range(8), tree), 8, range(8))
    assert [(group.node, group.memory) for group in groups] == [(0, 0), (1, 0), (2, 2), (3, 2)]


@pytest.mark.parametrize(
    ("allowed", "memories"), [(range(4), (0, 1)), (range(8), (0,)), (range(4, 8), (1,)), (range(8), ())]
)
def test_a_cpuset_that_takes_one_node_away_leaves_nothing_to_divide(
    tmp_path: Path, allowed: Sequence[int], memories: Sequence[int]
) -> None:
    nodes = read_nodes(allowed, make_tree(tmp_path, **TWO, memories=memories))
    assert divide_threads(nodes, 8, allowed) == ()
    assert {node.number for node in nodes if node.total_bytes} == set(memories)


@pytest.mark.parametrize("text", ["", "0-", "zero", "1-0x3", "0,,-"])
def test_files_that_cannot_be_read_are_no_nodes(tmp_path: Path, text: str) -> None:
    tree = make_tree(tmp_path, **TWO)
    (tree / "sys/devices/system/node/online").write_text(text)
    assert read_nodes(range(8), tree) == ()
    assert read_nodes(range(8), tmp_path / "nothing") == ()


def test_without_distances_and_status_others_are_far(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, TWO["cpus"], TWO["sizes_gib"])
    (tree / "proc/self/status").unlink()
    nodes = read_nodes(range(8), tree)
    assert nodes[0].distance(0) == 10 < nodes[0].distance(1) and num_sockets(nodes) == 2
    assert len(divide_threads(nodes, 4, range(8))) == 2


@given(st.sets(st.integers(0, 300), max_size=40))
def test_lists(numbers: set[int]) -> None:
    assert parse_list(listed(sorted(numbers))) == sorted(numbers)


@st.composite
def machines(draw: st.DrawFn) -> tuple[dict[int, list[int]], dict[int, int], set[int]]:
    """CPUs by node (some without), GiB by node (some without), allowed CPUs."""
    numbers = draw(st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True))
    owner = draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=24))
    cpus = {number: [cpu for cpu, node in enumerate(owner) if node == number] for number in sorted(numbers)}
    sizes = {number: draw(st.sampled_from([0, 0, 8, 64])) for number in numbers}
    return cpus, sizes, draw(st.sets(st.integers(0, len(owner) - 1), min_size=1))


@settings(max_examples=60, deadline=None)
@given(machines(), st.integers(1, 40), st.data())
def test_generated_machines(machine: tuple, num_threads: int, data: st.DataObject) -> None:
    """Every thread is on one node, near its memory; no node gets more threads than its cores while another has free
    ones; rows are split without gap by threads."""
    cpus, sizes, allowed = machine
    with TemporaryDirectory() as folder:
        nodes = read_nodes(allowed, make_tree(Path(folder), cpus, sizes))
    assert all(node.cpus <= allowed for node in nodes)
    groups = divide_threads(nodes, num_threads, allowed)
    if not groups:
        computing = [number for number, own in cpus.items() if set(own) & allowed]
        with_memory = [number for number, size in sizes.items() if size]
        assert (
            num_threads == 1
            or len(computing) < 2
            or len(with_memory) < 2
            or num_threads < len(computing)
            or (len({min(with_memory, key=lambda m, n=n: (m != n, m)) for n in computing}) < 2)
        )
        return
    assert [g.first for g in groups] == [0, *(g.stop for g in groups[:-1])] and groups[-1].stop == num_threads
    for group in groups:
        assert group.num_threads > 0 and group.cpus <= set(cpus[group.node]) & allowed
        assert sizes[group.memory] and (group.memory == group.node or not sizes[group.node])
        assert num_threads > len(allowed) or group.num_threads <= len(group.cpus)
    num_rows, step = data.draw(st.integers(1, 5000)), data.draw(st.sampled_from([1, 16, 64]))
    parts = split_rows(groups, num_rows, step)
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert all(part.start % step == 0 for part in parts if part)
    for part, group in zip(parts, groups, strict=True):
        assert abs(len(part) - num_rows * group.num_threads / num_threads) <= step
