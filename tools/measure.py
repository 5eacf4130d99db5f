"""Timing programs on a machine that does other things too: interleaved rounds, and disturbed ones dropped.

A round times each workload once, in turn, and the order reverses from round to round; so a slow second or a warm cache cannot
favour one of them, and ratios are taken within rounds. A round is disturbed when the hypervisor stole CPU time (/proc/stat) or
other processes kept our threads waiting (/proc/self/task/*/schedstat) for more than 2 % of it. Used by `tools.kernel_bench`.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from native.cpu.threads import Program, Team

MAX_LOST_SHARE = 0.02
_ATTEMPTS_PER_ROUND = 4
_FEW_ROUNDS = 5  # with fewer undisturbed rounds than this, the least disturbed ones stand in, and the result says so


class LostTime(NamedTuple):
    """Seconds of CPU time so far: stolen from the whole machine, and waited for by this process's threads."""

    stolen_s: float
    waited_s: float


def read_lost_time() -> LostTime:
    """Zero where the system does not say (`is_lost_time_known`)."""
    if not is_lost_time_known():
        return LostTime(0.0, 0.0)
    steal_ticks = int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
    waited_ns = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            waited_ns += int((task / "schedstat").read_text().split()[1])
        except FileNotFoundError:  # a thread that ended meanwhile
            continue
    return LostTime(steal_ticks / os.sysconf("SC_CLK_TCK"), waited_ns / 1e9)


def is_lost_time_known() -> bool:
    return Path("/proc/stat").exists() and Path("/proc/self/schedstat").exists()


@dataclass(frozen=True, slots=True)
class Rounds:
    """`seconds[name][i]` is the time of workload `name` in kept round i."""

    seconds: Mapping[str, np.ndarray]
    num_dropped: int
    is_noisy: bool  # too few rounds were undisturbed, so disturbed ones were kept
    stolen_share: float  # of all CPU time while measuring, dropped rounds included

    def median_s(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """How often `name`'s time fits into `other`'s: median, and 10th and 90th percentile over the rounds."""
        ratios = self.seconds[other] / self.seconds[name]
        low, middle, high = np.percentile(ratios, (10, 50, 90))
        return float(middle), float(low), float(high)


def measure(team: Team, workloads: Mapping[str, Sequence[Program]], num_rounds: int) -> Rounds:
    """Times `num_rounds` undisturbed rounds, or gives up after four times as many.

    Each timed run takes the next of its workload's programs, at places of their own: where those go through parts of one large
    matrix, no run finds its weights in the cache.
    """
    names, waking = list(workloads), Program([])
    for name in names:  # compiled code, page tables, clock frequency
        team.run(workloads[name][0])
    seconds: list[dict[str, float]] = []
    lost: list[float] = []
    start, start_s, turn = read_lost_time(), time.perf_counter(), 0
    while len(seconds) < _ATTEMPTS_PER_ROUND * num_rounds and sum(s <= MAX_LOST_SHARE for s in lost) < num_rounds:
        times, before, before_s = {}, read_lost_time(), time.perf_counter()
        for name in names if len(seconds) % 2 == 0 else reversed(names):
            program = workloads[name][turn % len(workloads[name])]
            turn += 1
            team.run(waking)  # sleeping threads are not part of what is measured
            began_s = time.perf_counter()
            team.run(program)
            times[name] = time.perf_counter() - began_s
        after, round_s = read_lost_time(), time.perf_counter() - before_s
        stolen, waited = (end - begin for end, begin in zip(after, before, strict=True))
        lost.append(max(stolen, waited) / (round_s * team.num_threads))
        seconds.append(times)
    stolen_s = read_lost_time().stolen_s - start.stolen_s
    stolen_share = stolen_s / ((time.perf_counter() - start_s) * (os.cpu_count() or 1))
    return _keep(names, seconds, np.array(lost), stolen_share)


def _keep(names: Sequence[str], seconds: Sequence[Mapping[str, float]], lost: np.ndarray, stolen_share: float) -> Rounds:
    kept = np.flatnonzero(lost <= MAX_LOST_SHARE)
    is_noisy = len(kept) < min(_FEW_ROUNDS, len(seconds))
    if is_noisy:
        kept = np.argsort(lost, kind="stable")[:_FEW_ROUNDS]
    arrays = {name: np.array([seconds[i][name] for i in kept]) for name in names}
    return Rounds(arrays, len(seconds) - len(kept), is_noisy, stolen_share)
