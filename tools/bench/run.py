"""Times the tests of `tools.bench`: a first run apart, then warm repeats in turns, disturbed ones dropped and counted.

The rule is `tools.bench.measure`'s: a repeat is disturbed when our threads waited for a core, or the hypervisor stole,
for more than 2 % of it. It is dropped with everything that ran in its turn, and tried again, up to twice as many turns
as were asked for.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kimi_lite.tools.bench.measure import MAX_LOST_SHARE, read_stolen_s, read_waited_s
from kimi_lite.tools.bench.ours import Run, Runner
from kimi_lite.tools.bench.plan import BenchTest


@dataclass(frozen=True, slots=True)
class Sample:
    """A run and what disturbed it."""

    run: Run
    lost_share: float  # of the CPU time of our threads: waited or stolen
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Of one test and one program; `warm[i]` of two programs ran in the same turn."""

    first: Sample
    warm: tuple[Sample, ...]
    num_dropped: int
    is_noisy: bool  # too few turns were undisturbed, so disturbed ones were kept

    def tok_s(self) -> np.ndarray:
        """(warm runs,)"""
        return np.array([sample.run.tok_s for sample in self.warm])


class Prompts(Protocol):
    """What `plan.Passages` does: prompts for each sequence of a test, other ones each time."""

    def prompts(self, test: BenchTest) -> Sequence[Any]: ...


def measure_test(
    test: BenchTest, runners: Mapping[str, Runner], passages: Prompts, num_repeats: int, num_threads: int
) -> dict[str, Samples]:
    """First, then warm runs of each program over the same tokens; the order within a turn reverses from turn to
    turn."""

    def take_turn(order: Sequence[str]) -> dict[str, Sample]:
        prompts = passages.prompts(test)
        return {name: _run(runners[name], test, prompts, num_threads) for name in order}

    names = list(runners)
    first, turns = take_turn(names), []
    while sum(map(_is_undisturbed, turns)) < num_repeats and len(turns) < 2 * num_repeats:
        turns.append(take_turn(names if len(turns) % 2 == 0 else names[::-1]))
    kept, is_noisy = _keep(turns, num_repeats)
    return {
        name: Samples(first[name], tuple(turn[name] for turn in kept), len(turns) - len(kept), is_noisy)
        for name in names
    }


def _is_undisturbed(turn: Mapping[str, Sample]) -> bool:
    return _lost_share(turn) <= MAX_LOST_SHARE


def _lost_share(turn: Mapping[str, Sample]) -> float:
    return max(sample.lost_share for sample in turn.values())


def _keep(turns: Sequence[dict[str, Sample]], num_wanted: int) -> tuple[list[dict[str, Sample]], bool]:
    """The undisturbed turns; where they are less than half of what was asked for, the least disturbed ones."""
    kept = [turn for turn in turns if _is_undisturbed(turn)]
    if len(kept) >= max(1, num_wanted // 2):
        return kept, False
    return sorted(turns, key=_lost_share)[: max(1, num_wanted)], True


def _run(runner: Runner, test: BenchTest, prompts: Sequence[Any], num_threads: int) -> Sample:
    stolen_s, waited_s, disk_bytes, start_s = read_stolen_s(), read_waited_s(), _read_disk_bytes(), time.perf_counter()
    run = runner(test, prompts)
    elapsed_s = time.perf_counter() - start_s
    waited_s = read_waited_s() - waited_s if run.waited_s is None else run.waited_s
    waited_share = waited_s / (elapsed_s * num_threads)
    stolen_share = (read_stolen_s() - stolen_s) / (elapsed_s * (os.cpu_count() or 1))
    return Sample(run, max(0.0, waited_share, stolen_share), _read_disk_bytes() - disk_bytes)


def _read_disk_bytes() -> int:
    """Bytes that this process fetched from disks so far, mapped files included; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)
