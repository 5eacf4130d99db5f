"""Which runs count: order, repetition of disturbed runs, and what is said when nothing else is left."""

import numpy as np
import pytest

from kimi_lite.tools.bench import measure as module
from kimi_lite.tools.bench.measure import measure, read_stolen_s, read_waited_s


class FakeTeam:
    """Runs nothing; notes the programs, and lets the test's clocks advance: a run takes 1 s, plus what `lose` says."""

    num_threads = 2

    def __init__(self, monkeypatch, lose=lambda run: 0.0, steal=lambda run: 0.0):
        self.ran, self.now_s, self.waited_s, self.stolen_s = [], 0.0, 0.0, 0.0
        self._lose, self._steal = lose, steal
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(module, "read_waited_s", lambda: self.waited_s)
        monkeypatch.setattr(module, "read_stolen_s", lambda: self.stolen_s)
        monkeypatch.setattr(module, "Program", lambda ops: None)  # the one that wakes the team
        monkeypatch.setattr(module, "_MAX_S", 1e9)

    def run(self, program):
        if program is None:
            return
        lost_s = self._lose(len(self.ran))
        self.ran.append(program)
        self.now_s += {"a": 1.0, "b": 3.0}[program[0]] + lost_s
        self.waited_s += lost_s
        self.stolen_s += self._steal(len(self.ran))


PROGRAMS = {"a": ["a0", "a1", "a2", "a3"], "b": ["b0", "b1", "b2", "b3"]}
WARM_UP = 2  # runs


def test_rounds_interleave_in_alternating_order_through_all_parts(monkeypatch):
    team = FakeTeam(monkeypatch)
    rounds = measure(team, PROGRAMS, 4)
    assert team.ran[WARM_UP:] == ["a0", "b1", "b2", "a3", "a0", "b1", "b2", "a3"]
    assert rounds.seconds["a"].tolist() == [1.0] * 4 and rounds.ratio("a", "b") == (3.0, 3.0, 3.0)
    assert (rounds.num_runs, rounds.num_dropped, rounds.num_kept, rounds.is_noisy) == (8, 0, 4, False)


def test_disturbed_runs_are_repeated_and_do_not_count(monkeypatch):
    """Every third run loses half a second: the times kept are those of the others."""
    team = FakeTeam(monkeypatch, lose=lambda run: 0.5 * (run % 3 == 0))
    rounds = measure(team, PROGRAMS, 10)
    assert rounds.seconds["a"].tolist() == [1.0] * 10 and rounds.seconds["b"].tolist() == [3.0] * 10
    assert not rounds.is_noisy
    assert rounds.num_runs == len(team.ran) - WARM_UP == 20 + rounds.num_dropped
    assert rounds.num_dropped == 10


def test_small_losses_are_none(monkeypatch):
    rounds = measure(FakeTeam(monkeypatch, lose=lambda run: 0.01), PROGRAMS, 3)
    assert (rounds.num_dropped, rounds.is_noisy) == (0, False)


def test_when_all_is_disturbed_the_least_disturbed_rounds_are_kept_and_it_says_so(monkeypatch):
    team = FakeTeam(monkeypatch, lose=lambda run: 1.0 if run % 5 else 0.2)
    rounds = measure(team, PROGRAMS, 10)
    assert rounds.is_noisy and rounds.num_kept == 5
    assert rounds.seconds["a"] == pytest.approx([1.2] * 5)
    assert len(team.ran) == WARM_UP + 20 * 2 * 8  # 20 rounds of 2 runs, 8 tries each
    assert rounds.num_dropped == rounds.num_runs - 10


def test_stolen_time_drops_its_round(monkeypatch):
    """10 ms stolen in a round of 4 s x 2 threads is nothing; a second is."""
    team = FakeTeam(monkeypatch, steal=lambda run: {4: 1.0, 7: 0.01}.get(run, 0.0))
    rounds = measure(team, PROGRAMS, 6)
    assert rounds.num_kept == 6 and rounds.num_dropped == 2
    assert 0 < rounds.stolen_share < 1


def test_it_ends_in_time(monkeypatch):
    team = FakeTeam(monkeypatch)
    monkeypatch.setattr(module, "_MAX_S", 10.0)
    rounds = measure(team, PROGRAMS, 1000)
    assert rounds.num_kept == 3


@pytest.mark.skipif(not module.is_lost_time_known(), reason="no /proc/stat and schedstat here")
def test_the_systems_counters_only_grow():
    first = read_stolen_s(), read_waited_s()
    np.linalg.norm(np.ones((500, 500)) @ np.ones((500, 500)))
    assert read_stolen_s() >= first[0] and read_waited_s() >= first[1] > 0


def test_where_the_system_says_nothing_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(module, "is_lost_time_known", lambda: False)
    assert (read_stolen_s(), read_waited_s()) == (0.0, 0.0)
