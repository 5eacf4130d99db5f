"""What the memory of several nodes (sockets, or parts of them) delivers to threads on all of them, by where bytes lie.

Each node's memory gives its own threads its whole bandwidth. A socket's link to the others carries less: `LINK_SHARE`
of what its own memory delivers. Xeon 8160 with two links: 34 of 112 GB/s (J. McCalpin, Intel's forum); newer sockets
have three or four links and half as much again of memory each. So, of the sum of all nodes:

    by rows       all of it: each thread reads what its own node holds
    interleaved   of s sockets each fetches (s - 1) / s of its bytes through its link: link * s / (s - 1) at most
    one node      that node's bandwidth, as its own threads take over what the link keeps from the others

An estimate: no machine with two sockets has been measured. `tools.bench.predict --sockets 2` simulates the same three.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from kimi_lite.native.cpu.nodes import Node, compute_nodes, num_sockets

MemoryUse = Literal["by rows", "interleaved", "one node"]
MemoryPolicy = Literal["local", "interleaved", "bound"]  # as numactl sets it for a process that it starts
LINK_SHARE = 0.4  # of a socket's own bandwidth that comes through its link from the others; 0.3 to 0.5
LOCAL_DISTANCE, REMOTE_DISTANCE = 10, 21  # as firmware tells them of two sockets


def reach(num_nodes: int, sockets: int, use: MemoryUse, link_share: float = LINK_SHARE) -> float:
    """Share of the nodes' summed bandwidth."""
    assert num_nodes >= sockets >= 1, (num_nodes, sockets)
    if use == "one node":
        return 1 / num_nodes
    if use == "interleaved" and sockets > 1:
        return min(1.0, link_share * sockets / (sockets - 1))
    return 1.0


def reach_of(nodes: Sequence[Node], use: MemoryUse) -> float:
    """As `reach`, of these nodes; 1 where only one computes and has memory."""
    computing = [node for node in compute_nodes(nodes) if node.total_bytes]
    return reach(len(computing), num_sockets(nodes), use) if len(computing) > 1 else 1.0


def described_nodes(num_nodes: int, num_cores: int, total_bytes: int, free_bytes: int) -> tuple[Node, ...]:
    """Sockets that share cores and memory evenly."""
    numbers = range(num_nodes)
    borders = [num_cores * number // num_nodes for number in range(num_nodes + 1)]
    return tuple(
        Node(
            number,
            frozenset(range(borders[number], borders[number + 1])),
            total_bytes // num_nodes,
            free_bytes // num_nodes,
            tuple((other, LOCAL_DISTANCE if other == number else REMOTE_DISTANCE) for other in numbers),
        )
        for number in numbers
    )


def with_memory(nodes: Sequence[Node], total_bytes: int, free_bytes: int) -> tuple[Node, ...]:
    """The same nodes on a machine with so much memory, each with its old share of it."""
    whole, free = (max(1, sum(sizes)) for sizes in zip(*((n.total_bytes, n.free_bytes) for n in nodes), strict=True))
    return tuple(
        replace(
            node,
            total_bytes=total_bytes * node.total_bytes // whole,
            free_bytes=free_bytes * node.free_bytes // free,
        )
        for node in nodes
    )
