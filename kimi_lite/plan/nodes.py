"""Several memory nodes in a plan: what their memory is used for, how much of its bandwidth that brings, and whether
each has the bytes that its threads' rows take.

Threads are divided over the nodes by their cores, and each node holds the rows that its threads read
(`native.cpu.nodes`): of experts read into memory (`--load read`), and of mapped files where the page cache takes them
in by rows. With `--numa off` nothing is divided: what the reading threads' nodes happen to hold is one node's bandwidth
at worst, which is what is planned with.
"""

from collections.abc import Mapping, Sequence

from kimi_lite.hardware.machine import Hardware
from kimi_lite.hardware.nodes import MemoryUse, reach_of
from kimi_lite.native.cpu.nodes import ThreadGroup, divide_threads
from kimi_lite.options import Options
from kimi_lite.plan.types import DENSE, EXPERTS, MemoryRow
from kimi_lite.units import GIB, gib

_DIVIDED = (DENSE, EXPERTS)  # by rows; what else RAM holds lies where it is first touched


def thread_groups(hardware: Hardware, limits: Options, num_threads: int) -> tuple[ThreadGroup, ...]:
    """Where the threads run; () where nothing is divided."""
    if limits.numa == "off":
        return ()
    every = frozenset().union(*(node.cpus for node in hardware.nodes))
    return divide_threads(hardware.nodes, num_threads, every)


def memory_use(hardware: Hardware, limits: Options, num_threads: int) -> MemoryUse:
    """numactl's policy goes before ours."""
    if hardware.memory_policy == "interleaved":
        return "interleaved"
    is_divided = hardware.memory_policy == "local" and thread_groups(hardware, limits, num_threads)
    return "by rows" if is_divided else "one node"


def node_bytes(
    hardware: Hardware, limits: Options, num_threads: int, rows: Sequence[MemoryRow]
) -> dict[int, tuple[int, int]]:
    """By node: bytes of weights that its threads read, and what is free there; empty where nothing is divided."""
    if memory_use(hardware, limits, num_threads) != "by rows":
        return {}
    whole = sum(row.num_bytes for row in rows if row.place == "RAM" and row.part in _DIVIDED)
    free_bytes = {node.number: node.free_bytes for node in hardware.nodes}
    needs: dict[int, int] = {}
    for group in thread_groups(hardware, limits, num_threads):
        needs[group.memory] = needs.get(group.memory, 0) + whole * group.num_threads // num_threads
    return {number: (need, free_bytes[number]) for number, need in needs.items()}


def warn_of_full_node(needs: Mapping[int, tuple[int, int]]) -> str:
    """What lacks on the node that lacks most, of `node_bytes`; empty where each has the memory for its threads'
    rows."""
    lacking = {number: need - free for number, (need, free) in needs.items() if need > free}
    if not lacking:
        return ""
    number = max(lacking, key=lacking.__getitem__)
    need_bytes, free_bytes = needs[number]
    return (
        f"Node {number} has {gib(free_bytes)} of memory free, and its threads read {gib(need_bytes)}: "
        f"{gib(lacking[number])} will lie on other nodes, and come through a slower link."
    )


def explain_use(hardware: Hardware, use: MemoryUse, needs: Mapping[int, tuple[int, int]]) -> str:
    """What of the nodes' bandwidth the plan counts with, and why. needs: as `node_bytes` has them."""
    if use == "by rows":
        weights = " + ".join(f"{need / GIB:.1f}" for need, _ in needs.values())
        free = " + ".join(f"{free / GIB:.1f}" for _, free in needs.values())
        return (
            f"threads are divided over them, and so are the rows of every matrix: {weights} GiB of weights in {free} "
            f"free. The RAM speed is that of all together; on paper, as no such machine was tried"
        )
    if use == "interleaved":
        share = f"{reach_of(hardware.nodes, use):.0%} of all nodes' RAM speed (estimated)"
        return f"numactl spreads the pages over the nodes, which is left so: planned with {share}; without it by rows"
    others = f"{reach_of(hardware.nodes, 'interleaved'):.0%} where numactl --interleave=all spreads the pages"
    return (
        f"not divided: planned with one node's RAM speed, {reach_of(hardware.nodes, use):.0%} of all (estimated; "
        f"{others})"
    )


def describe_nodes(hardware: Hardware) -> str:
    """`2 memory nodes: 32 + 32 cores, 128.0 + 128.0 GiB (120.0 + 121.5 free), 1 without cores`."""
    computing = [node for node in hardware.nodes if node.cpus]
    rest = [node for node in hardware.nodes if not node.cpus]
    cores = " + ".join(str(len(node.cpus)) for node in computing)
    total = " + ".join(f"{node.total_bytes / GIB:.1f}" for node in computing)
    free = " + ".join(f"{node.free_bytes / GIB:.1f}" for node in computing)
    text = f"{len(computing)} memory nodes: {cores} CPUs, {total} GiB ({free} free)"
    if rest:
        text += f"; {gib(sum(node.total_bytes for node in rest))} on {len(rest)} without CPUs"
    return text
