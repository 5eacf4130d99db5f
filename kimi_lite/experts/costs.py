"""What the machine really does, learned inside the steps that are run anyway, and the choices that follow from it.

An isolated microbenchmark misleads: alone, copies and kernels do not share the memory's bandwidth. So `ExpertCosts`
fits what an expert costs on either side from real layers, `Tuner` tries values of a setting on real steps, and
`PromotionBudget` weighs the slow-down that promotions cause against the misses they save. Pure arithmetic without a
device; used by `kimi_lite.model.hybrid`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

_MEMORY = 0.98  # weight of what was known, per observation: about the last 50 count
_DOUBT = 0.995  # a layer: a quarter less after a chunk of 60
_MIN_GAIN = 0.03  # a setting changes for at least this


@dataclass(slots=True)
class ExpertCosts:
    """Seconds of an expert in a layer of a batch: `stream_s` over the bus, or `cpu_s` + `choice_s` for each token on
    the CPU.

    The first values are guesses of the right order (9 MB at 20 and 60 GB/s); the first layers replace them.
    """

    stream_s: float = 4.5e-4
    cpu_s: float = 1.5e-4
    choice_s: float = 2.5e-5
    num_streams: int = 0
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of least squares: 1, n, n^2, s, n * s

    def observe_stream(self, num_experts: int, elapsed_s: float) -> None:
        """`num_experts` were streamed and multiplied in this time."""
        if num_experts:
            share = 0.3 if self.num_streams else 1.0
            self.stream_s += share * (elapsed_s / num_experts - self.stream_s)
            self.num_streams += 1

    def doubt_stream(self) -> None:
        """A layer streamed nothing: its cost becomes a little less believed, so that a bus that was slow once (the file
        was not in memory yet) is tried again, with a few experts at first."""
        self.stream_s *= _DOUBT

    def observe_cpu(self, num_experts: int, num_choices: int, elapsed_s: float) -> None:
        """The CPU computed `num_choices` (token, expert) pairs of `num_experts` experts in this time."""
        if not num_experts:
            return
        mean = num_choices / num_experts  # every layer counts alike, whatever its size
        each_s = elapsed_s / num_experts
        self._sums = [
            _MEMORY * old + new
            for old, new in zip(self._sums, (1, mean, mean * mean, each_s, mean * each_s), strict=True)
        ]
        count, choices, squares, right, right_choices = self._sums
        hold, hold_choices = (
            1e-3 * count,
            1e-3 * squares,
        )  # of what is known, where the layers so far do not tell the two apart
        a, c = count + hold, squares + hold_choices
        b, d = right + hold * self.cpu_s, right_choices + hold_choices * self.choice_s
        determinant = a * c - choices * choices
        self.cpu_s = max((c * b - choices * d) / determinant, 1e-9)
        self.choice_s = max((a * d - choices * b) / determinant, 1e-9)

    def split(self, counts: Sequence[int], num_windows: int = 1) -> int:
        """How many experts to stream when `counts` (descending) tokens want each: both sides should end together.

        0: all on the CPU; len(counts): all over the bus. Of equal times the one that streams less. num_windows: how
        often the CPU goes over its experts, because it takes so many tokens at a time.
        """
        wanted = np.asarray(counts, float)
        assert (np.diff(wanted) <= 0).all(), counts
        each_s = self.cpu_s * np.minimum(num_windows, wanted) + self.choice_s * wanted
        on_cpu = np.concatenate([np.cumsum(each_s[::-1])[::-1], [0.0]])
        on_bus = self.stream_s * np.arange(len(wanted) + 1)
        return int(np.argmin(np.maximum(on_cpu, on_bus)))


class Tuner:
    """Chooses among a setting's values by the median time of real steps; a new value must be 3 % better than the one in
    use.

    It looks at the neighbours of its value, moves while that pays, and then stays until `restart`: when the context has
    doubled, what was best may have changed.
    """

    def __init__(self, values: Sequence[int], start: int, steps_per_value: int = 8) -> None:
        assert start in values, (start, values)
        self._values, self._num_steps = list(values), steps_per_value
        self._best = self._at = self._values.index(start)
        self._times_s: list[float] = []
        self._measured_s: dict[int, float] = {}
        self.is_final = len(self._values) == 1

    @property
    def value(self) -> int:
        """What the next step should use."""
        return self._values[self._at]

    def observe(self, elapsed_s: float) -> None:
        """A step with `value` took so long. The first step after a change does not count."""
        if self.is_final:
            return
        self._times_s.append(elapsed_s)
        if len(self._times_s) > self._num_steps:
            self._measured_s[self._at] = median(self._times_s[1:])
            self._times_s.clear()
            self._move()

    def restart(self) -> None:
        """Forget the times, keep the value, look again."""
        self._measured_s.clear()
        self._times_s.clear()
        self._at = self._best
        self.is_final = len(self._values) == 1

    def _move(self) -> None:
        best_s = self._measured_s.get(self._best, math.inf)
        if self._measured_s[self._at] < best_s * (1 - _MIN_GAIN):
            self._best = self._at
        near = [i for i in (self._best - 1, self._best + 1) if 0 <= i < len(self._values) and i not in self._measured_s]
        self._at = near[0] if near else self._best
        self.is_final = not near


@dataclass(slots=True)
class PromotionBudget:
    """How many experts a decode step may upload in the background, between 0 and `most`.

    Each is worth the CPU time of the hits it will have (`hits_per_promotion`, as counted) and costs the time by which
    steps that promote are slower than steps that do not. Twice the cost raises the budget, less than the cost lowers
    it. With a budget of 0 every 64th step still promotes one, or a change of topic would never be seen.
    """

    most: int
    budget: int = 2
    _num_steps: int = 0
    _quiet_s: float = math.nan  # a step without promotions
    _cost_s: float = 0.0  # of one promotion, with its noise

    def next(self) -> int:
        """For the step that begins; now and then nothing, to know what a step without promotions takes."""
        self._num_steps += 1
        if self._num_steps % 16 == 0:
            return 0
        if self.budget == 0:
            return int(self._num_steps % 64 == 1 and self.most > 0)
        return min(self.budget, self.most)

    def observe(self, num_promoted: int, elapsed_s: float, hits_per_promotion: float, miss_s: float) -> None:
        """After a step: what it copied, how long it took, and what a promotion has brought so far."""
        if num_promoted == 0:
            self._quiet_s = (
                elapsed_s if math.isnan(self._quiet_s) else self._quiet_s + 0.25 * (elapsed_s - self._quiet_s)
            )
            return
        if math.isnan(self._quiet_s):
            return
        slower_s = (elapsed_s - self._quiet_s) / num_promoted  # may be negative: noise must not add up
        self._cost_s += 0.1 * (slower_s - self._cost_s)
        gain_s = hits_per_promotion * miss_s
        if gain_s > 2 * self.cost_s:
            self.budget = min(self.most, self.budget + 1)
        elif gain_s < self.cost_s:
            self.budget = max(0, self.budget - 1)

    @property
    def cost_s(self) -> float:
        """Of one promotion: the time by which steps that promote were slower."""
        return max(0.0, self._cost_s)


class Growth:
    """Says when the context has doubled since it last said so."""

    def __init__(self, first: int = 4096) -> None:
        self._next = first

    def has_doubled(self, context: int) -> bool:
        is_doubled = context >= self._next
        while self._next <= context:
            self._next *= 2
        return is_doubled
