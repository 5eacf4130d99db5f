"""Where the threads of a team may run: on one hardware thread of every core, as long as there are cores enough; where
memory is on several nodes, each on the cores of one node.

Two workers that share a core share its vector units, and a team is as fast as its slowest thread. Each worker may use
the whole set, or its node's whole set, so the system can still move it away from a core that another process has taken.
Linux only; elsewhere threads run anywhere.
"""

import os
import warnings
from collections.abc import Collection
from pathlib import Path

from kimi_lite.native.cpu.nodes import ThreadGroup, divide_threads, read_nodes

_TOPOLOGY = Path("/sys/devices/system/cpu")


def one_thread_per_core(allowed: set[int], topology: Path = _TOPOLOGY) -> set[int]:
    """Of the `allowed` logical CPUs the first of every core; all of them where the system does not tell its cores."""
    first_of: dict[str, int] = {}
    for cpu in sorted(allowed):
        try:
            siblings = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            return set(allowed)
        first_of.setdefault(siblings, cpu)
    return set(first_of.values())


def num_allowed_cpus() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_to_cores(num_threads: int) -> None:
    """Keeps the calling thread to one hardware thread per core, if `num_threads` of them need no second ones."""
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    chosen = one_thread_per_core(allowed)
    if num_threads <= len(chosen) < len(allowed):
        keep_to(chosen)


def keep_to(cpus: Collection[int]) -> None:
    """Keeps the calling thread to these logical CPUs; a warning where the system forbids it."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:  # a container's set has just changed, or a sandbox forbids the call
        warnings.warn(f"Threads may share cores, which costs speed: {error.strerror}.", stacklevel=3)


def place_threads(num_threads: int, root: Path = Path("/")) -> tuple[ThreadGroup, ...]:
    """A team's threads over the memory nodes that the calling thread may use; () where there is nothing to divide."""
    if not hasattr(os, "sched_setaffinity"):
        return ()
    allowed = os.sched_getaffinity(0)
    cores = one_thread_per_core(allowed, root / "sys/devices/system/cpu")
    return divide_threads(read_nodes(allowed, root), num_threads, cores)
