"""Timing programs on a machine that does other things too: interleaved rounds, and disturbed runs dropped.

A round times each workload once, in turn, and the order reverses from round to round; so a slow second or a warm cache
cannot favour one of them, and ratios are taken within rounds. A run is disturbed when other processes kept our threads
waiting (/proc/self/task/*/schedstat) for more than 2 % of it: it is dropped and repeated at once. A round is disturbed,
and dropped, when a run of it stays so, or when the hypervisor stole more than 2 % of it (/proc/stat, which counts in
hundredths of a second, too coarse for a run).
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.threads import Team

MAX_LOST_SHARE = 0.02
_TRIES = 8  # of a run
_ROUNDS_PER_ROUND = 2  # how many rounds may be tried for each that is wanted
_MAX_S = 10.0  # no measurement takes longer
_FEW_ROUNDS = 5  # with fewer undisturbed rounds than this, the least disturbed ones stand in, and the result says so


def is_lost_time_known() -> bool:
    """Whether the system says how long threads waited and what was stolen; elsewhere nothing is ever dropped."""
    return Path("/proc/stat").exists() and Path("/proc/self/schedstat").exists()


def read_stolen_s() -> float:
    """Seconds of CPU time that the hypervisor gave to others since boot, over all cores."""
    if not is_lost_time_known():
        return 0.0
    return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")


def read_waited_s() -> float:
    """Seconds that threads of this process were ready to run and had no core."""
    if not is_lost_time_known():
        return 0.0
    waited_ns = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            waited_ns += int((task / "schedstat").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            continue
    return waited_ns / 1e9


@dataclass(frozen=True, slots=True)
class Rounds:
    """`seconds[name][i]` is the time of workload `name` in kept round i."""

    seconds: Mapping[str, np.ndarray]
    num_runs: int  # timed, whether kept or not
    num_dropped: int  # of them
    is_noisy: bool  # too few rounds were undisturbed, so disturbed ones were kept
    stolen_share: float  # of all CPU time while measuring

    @property
    def num_kept(self) -> int:
        """Rounds."""
        return len(next(iter(self.seconds.values())))

    def median_s(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """How often `name`'s time fits into `other`'s: median, and 10th and 90th percentile over the rounds."""
        low, middle, high = np.percentile(self.seconds[other] / self.seconds[name], (10, 50, 90))
        return float(middle), float(low), float(high)


class _Run(NamedTuple):
    seconds: float
    lost_share: float  # of the team's CPU time in the run
    num_tries: int


def measure(team: Team, workloads: Mapping[str, Sequence[Program]], num_rounds: int) -> Rounds:
    """Times `num_rounds` undisturbed rounds, or gives up after twice as many or ten seconds.

    Runs count through the programs of their workloads together: where those are parts of one large matrix, each run
    reads the part after the last run's, and none finds its weights in the cache.
    """
    names, turn = list(workloads), count()
    for name in names:  # compiled code, page tables, clock frequency
        team.run(workloads[name][0])
    rounds: list[dict[str, _Run]] = []
    lost: list[float] = []  # share of each round
    first_stolen_s, start_s = read_stolen_s(), time.perf_counter()
    while sum(share <= MAX_LOST_SHARE for share in lost) < num_rounds:
        if len(rounds) == _ROUNDS_PER_ROUND * num_rounds or (rounds and time.perf_counter() - start_s > _MAX_S):
            break
        runs, stolen_s, round_s = {}, read_stolen_s(), time.perf_counter()
        for name in names if len(rounds) % 2 == 0 else reversed(names):
            runs[name] = _run_undisturbed(team, workloads[name], turn)
        stolen_share = (read_stolen_s() - stolen_s) / ((time.perf_counter() - round_s) * team.num_threads)
        lost.append(max(stolen_share, *(run.lost_share for run in runs.values())))
        rounds.append(runs)
    elapsed_s = time.perf_counter() - start_s
    return _keep(rounds, np.array(lost), (read_stolen_s() - first_stolen_s) / (elapsed_s * (os.cpu_count() or 1)))


def _run_undisturbed(team: Team, programs: Sequence[Program], turn: Iterator[int]) -> _Run:
    """The first undisturbed run of a few tries, or the least disturbed one."""
    waking, best = Program([]), None
    for num_tries in range(1, _TRIES + 1):
        program = programs[next(turn) % len(programs)]
        team.run(waking)  # sleeping threads are not part of what is measured
        waited_s, start_s = read_waited_s(), time.perf_counter()
        team.run(program)
        seconds = time.perf_counter() - start_s
        share = (read_waited_s() - waited_s) / (seconds * team.num_threads)
        if best is None or share < best.lost_share:
            best = _Run(seconds, share, num_tries)
        if share <= MAX_LOST_SHARE:
            break
    return best._replace(num_tries=num_tries)


def _keep(rounds: Sequence[Mapping[str, _Run]], lost: np.ndarray, stolen_share: float) -> Rounds:
    kept = np.flatnonzero(lost <= MAX_LOST_SHARE)
    is_noisy = len(kept) < min(_FEW_ROUNDS, len(rounds))
    if is_noisy:
        kept = np.argsort(lost, kind="stable")[:_FEW_ROUNDS]
    seconds = {name: np.array([rounds[i][name].seconds for i in kept]) for name in rounds[0]}
    num_runs = sum(run.num_tries for runs in rounds for run in runs.values())
    return Rounds(seconds, num_runs, num_runs - len(kept) * len(rounds[0]), is_noisy, stolen_share)
