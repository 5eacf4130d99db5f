"""Memory nodes (NUMA): which cores are near to which memory, and how a team's threads are divided over them.

A socket of a server has memory of its own, or several parts of it (NPS4, SNC), and reads another's through a link that
is slower than either. So threads are divided over the nodes by their cores, in the order of the nodes, each kept to the
cores of its own; a thread's rows of a matrix then lie in its node's memory.

    nodes = read_nodes()
    groups = divide_threads(nodes, num_threads=64)  # () where there is nothing to divide: one node, or none known

Read from Linux's /sys/devices/system/node, within the process's CPU affinity and its cgroup's cpuset (Mems_allowed).
Elsewhere, and where those files cannot be read, there are no nodes and everything is as on one.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

_LOCAL, _FAR = 10, 255  # distances: a node to itself, and where none is told
_SAME_SOCKET = 16  # parts of one socket are 11 to 13 apart, sockets 20 to 32


@dataclass(frozen=True, slots=True)
class Node:
    """One memory node as this process may use it. Without CPUs: memory on an expansion card (CXL), or cores that are
    not this process's; without bytes: cores whose channels are empty, or memory that its cpuset leaves out."""

    number: int
    cpus: frozenset[int] = frozenset()
    total_bytes: int = 0
    free_bytes: int = 0  # caches of files count as free
    distances: tuple[tuple[int, int], ...] = ()  # (number, distance) of each node; 10 to itself

    def distance(self, other: int) -> int:
        """To the node of this number."""
        return _look_up(self.distances, self.number, other)


@dataclass(frozen=True, slots=True)
class ThreadGroup:
    """Threads `first` .. `stop` of a team run on `cpus`; `memory` is the nearest node that has any."""

    node: int
    memory: int
    cpus: frozenset[int]
    first: int
    stop: int
    distances: tuple[tuple[int, int], ...] = ()  # the node's

    @property
    def num_threads(self) -> int:
        return self.stop - self.first

    def distance(self, other: int) -> int:
        """To the node of this number."""
        return _look_up(self.distances, self.node, other)


def _look_up(distances: tuple[tuple[int, int], ...], node: int, other: int) -> int:
    return dict(distances).get(other, _LOCAL if other == node else _FAR)


def parse_list(text: str) -> list[int]:
    """ "0-3,8" -> [0, 1, 2, 3, 8]. ValueError for anything else."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def read_nodes(allowed: Collection[int] | None = None, root: Path = Path("/")) -> tuple[Node, ...]:
    """The nodes that are online and that this process may compute on or keep memory in, by number. allowed: logical
    CPUs; default: the calling thread's. () where the system does not tell."""
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    folder = root / "sys/devices/system/node"
    try:
        online = parse_list((folder / "online").read_text())
        memories = _allowed_memories(root, online)
        found = [_read_node(folder / f"node{number}", number, online, allowed, memories) for number in online]
    except (OSError, ValueError):
        return ()
    return tuple(node for node in found if node.cpus or node.total_bytes)


def _allowed_memories(root: Path, online: Sequence[int]) -> set[int]:
    """Numbers of the nodes whose memory the cpuset allows."""
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        return set(online)
    lists = [line.partition(":")[2] for line in lines if line.startswith("Mems_allowed_list:")]
    return set(parse_list(lists[0])) if lists else set(online)


def _read_node(
    folder: Path, number: int, online: Sequence[int], allowed: Collection[int], memories: Collection[int]
) -> Node:
    cpus = frozenset(parse_list((folder / "cpulist").read_text())) & frozenset(allowed)
    total_bytes, free_bytes = _read_memory(folder / "meminfo") if number in memories else (0, 0)
    try:
        row = [int(word) for word in (folder / "distance").read_text().split()]
    except (OSError, ValueError):  # a virtual machine without the table
        row = []
    distances = tuple(zip(online, row, strict=False))  # one for each node that is online, whatever its number
    return Node(number, cpus, total_bytes, free_bytes, distances)


def _read_memory(file: Path) -> tuple[int, int]:
    """Bytes in all and free: of lines as "Node 0 MemTotal:  65536 kB"."""
    found = {}
    for line in file.read_text().splitlines():
        words = line.split()
        if len(words) >= 4 and words[3].isdecimal():
            found[words[2].rstrip(":")] = 1024 * int(words[3])
    caches = found.get("Active(file)", 0) + found.get("Inactive(file)", 0)
    total_bytes = found.get("MemTotal", 0)
    return total_bytes, min(total_bytes, found.get("MemFree", 0) + caches)


def compute_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Those with cores for this process."""
    return [node for node in nodes if node.cpus]


def num_sockets(nodes: Sequence[Node]) -> int:
    """Sockets that the nodes with cores belong to, by their distances."""
    firsts: list[Node] = []
    for node in compute_nodes(nodes):
        if all(first.distance(node.number) >= _SAME_SOCKET for first in firsts):
            firsts.append(node)
    return len(firsts)


def divide_threads(nodes: Sequence[Node], num_threads: int, cores: Collection[int]) -> tuple[ThreadGroup, ...]:
    """A team's threads over the nodes, by their cores. cores: the first logical CPU of each core
    (`placement.one_thread_per_core`); threads run on those alone where a node has enough of them. () where one node
    computes or no memory can be told apart: then threads run anywhere, as on any other machine."""
    with_memory = [node for node in nodes if node.total_bytes]
    computing = compute_nodes(nodes)
    if len(computing) < 2 or len(with_memory) < 2 or num_threads < 2:
        return ()
    counts = _shares(num_threads, [len(node.cpus & frozenset(cores)) or len(node.cpus) for node in computing])
    groups, first = [], 0
    for node, count in zip(computing, counts, strict=True):
        if count:
            near = min(with_memory, key=lambda other: (node.distance(other.number), other.number))
            own = node.cpus & frozenset(cores)
            cpus = own if count <= len(own) else node.cpus
            groups.append(ThreadGroup(node.number, near.number, cpus, first, first + count, node.distances))
        first += count
    return tuple(groups) if len({group.memory for group in groups}) > 1 else ()


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts as near to the weights' shares as can be, the same in every process."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def split_rows(groups: Sequence[ThreadGroup], num_rows: int, step: int = 1) -> list[range]:
    """Rows of a matrix by group, as many as its threads' share; borders are multiples of `step`, the last one the
    end."""
    num_threads, num_steps = groups[-1].stop, -(-num_rows // step)
    ends = [min(num_rows, step * (num_steps * group.stop // num_threads)) for group in groups]
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
