"""What the machine really does, learned inside the steps that are run anyway, and the choices that follow from it.

An isolated microbenchmark misleads: alone, copies and kernels do not share the memory's bandwidth. So `ExpertCosts`
fits what an expert costs on either side from real layers, `Tuner` tries values of a setting on real steps, and
`PromotionBudget` weighs the slow-down that promotions cause against the misses they save. Pure arithmetic without a
device; used by `kimi_lite.model.hybrid`.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import median
from typing import NamedTuple

import numpy as np

_MEMORY = 0.98  # weight of what was known, per observation: about the last 50 count
_GAIN = 0.3  # weight of a new observation of the bus, and of either side while the other works
_MOST_CONTENTION = 4.0  # a side that the other slows by more than that is slower alone too
_ALONE = 0.1  # of the CPU's time: less of it while the bus works is as good as none
_MISFIT = 1.15  # times what was seen: what experts and choices are believed to take may be off by so much
_TRIAL_EVERY = 30  # layers: half a chunk of Kimi K2.5
_TRIAL_SHARE = 0.01  # of the time of all layers may be lost by trials
_FIRST_SHARE = 0.03  # the same while the CPU was never seen alone
_MOST_SAVED = 30.0  # layers' time that is saved for a trial
_MIN_GAIN = 0.03  # a setting changes for at least this
_QUIET_EVERY = 16  # steps: one of so many promotes nothing
_NUM_PAIRS, _LEAST_PAIRS = 16, 4  # of neighbouring steps that tell what a promotion costs: two of 16 steps
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 128  # steps without promotions until they are tried again
_TRIAL_STEPS, _TRIAL_PAIRS, _TRIAL_PROMOTIONS = 16, 6, 2  # at most; enough to judge by; in every second step


class Trial(Enum):
    """What a layer shows when it is not divided as is best, but so that costs stay known."""

    CPU = "all on the CPU"
    BUS = "all over the bus"
    BOTH = "some on each side"


@dataclass(slots=True)
class ExpertCosts:
    """Seconds of an expert in a layer of a batch: `stream_s` over the bus, or `cpu_s` + `choice_s` for each token on
    the CPU; and how much slower either side is while the other is at work, since both read the same RAM.

    The first values are guesses of the right order (9 MB at 20 and 60 GB/s, no contention); the first layers replace
    them. Where layers of a model differ in bytes, numbers of experts and choices are in units of a mean layer's. A side
    is believed to be at most `_MOST_CONTENTION` times slower while the other works, so what was seen on one occasion
    bounds what is believed of the other. What was not seen for long is tried again for at most 1 % of the time
    (`trial`).
    """

    stream_s: float = 4.5e-4
    cpu_s: float = 1.5e-4
    choice_s: float = 2.5e-5
    cpu_slowdown: float = 1.0
    num_streams: int = 0
    _stream_beside_s: float = 0.0
    _is_seen_alone: bool = False  # the CPU
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of least squares: 1, n, n^2, s, n * s
    _ages: dict[Trial, int] = field(default_factory=lambda: dict.fromkeys(Trial, _TRIAL_EVERY))  # layers since seen
    _saved_s: float = 0.0  # what trials may cost now

    @property
    def stream_beside_s(self) -> float:
        """Seconds of an expert over the bus while the CPU computes."""
        return min(max(self._stream_beside_s, self.stream_s), _MOST_CONTENTION * self.stream_s)

    def observe_stream(self, num_experts: float, elapsed_s: float, is_beside: bool = False) -> None:
        """`num_experts` came over the bus in this time. is_beside: while the CPU computed others."""
        if num_experts <= 0:
            return
        gain = _GAIN * min(1.0, num_experts) if self.num_streams else 1.0
        each_s = elapsed_s / num_experts
        if is_beside:
            beside_s = self.stream_beside_s
            beside_s += gain * (each_s - beside_s)
            lowest_s = beside_s / _MOST_CONTENTION if self.num_streams else beside_s
            self.stream_s = min(max(self.stream_s, lowest_s), beside_s)
            self._stream_beside_s = beside_s
        else:
            self.stream_s += gain * (each_s - self.stream_s)
        self.num_streams += 1

    def observe_cpu(self, num_experts: float, num_choices: float, elapsed_s: float, beside_s: float = 0.0) -> None:
        """The CPU computed `num_choices` (token, expert) pairs of `num_experts` experts in this time. beside_s: of it,
        while the bus was at work."""
        if num_experts <= 0:
            return
        believed_s = num_experts * self.cpu_s + num_choices * self.choice_s
        beside_s = min(beside_s, elapsed_s)
        if beside_s < _ALONE * elapsed_s:
            if not self._is_seen_alone:
                self._scale(elapsed_s / believed_s)
                self._sums = [_GAIN * value for value in self._sums]  # until now they were bounds
            elif not 1 / _MISFIT < elapsed_s / believed_s < _MISFIT:
                self._scale(1 + _GAIN * (elapsed_s / believed_s - 1))
            self._is_seen_alone = True
            self._fit(num_experts, num_choices, elapsed_s)
            return
        apart_s = elapsed_s - beside_s
        if not self._is_seen_alone:  # it takes no longer alone
            self._fit(num_experts, num_choices, elapsed_s)
            believed_s = num_experts * self.cpu_s + num_choices * self.choice_s
        alone_s = min(max(believed_s, apart_s + beside_s / _MOST_CONTENTION), _MISFIT * elapsed_s)
        self._scale(1 + _GAIN * (alone_s / believed_s - 1))
        speed = min(max((alone_s - apart_s) / beside_s, 1 / _MOST_CONTENTION), 1.0)
        known = 1 / self.cpu_slowdown
        self.cpu_slowdown = 1 / (known + _GAIN * beside_s / elapsed_s * (speed - known))

    def divided(self, num_streamed: int, num_on_cpu: int) -> None:
        """A layer was divided so: what it shows need not be tried soon."""
        for kind in Trial:
            self._ages[kind] += 1
        if num_streamed or num_on_cpu:
            self._ages[Trial.BOTH if num_streamed and num_on_cpu else Trial.BUS if num_streamed else Trial.CPU] = 0

    def split(self, counts: Sequence[int], num_windows: int = 1, trial: Trial | None = None) -> int:
        """How many experts to stream when `counts` (descending) tokens want each, for the least time.

        0: all on the CPU; len(counts): all over the bus. Of equal times the one that streams less. num_windows: how
        often the CPU goes over its experts, because it takes so many tokens at a time. trial: the best of its kind.
        """
        layer_s = self._layer_s(counts, num_windows)
        num_absent = len(counts)
        if trial is Trial.CPU:
            return 0
        if trial is Trial.BUS:
            return num_absent
        if trial is Trial.BOTH and num_absent > 1:
            return 1 + int(np.argmin(layer_s[1:-1]))
        return int(np.argmin(layer_s))

    def trial(self, counts: Sequence[int], num_windows: int = 1) -> Trial | None:
        """What the next layer, of such counts, should show; mostly nothing. The longest unseen that saved time pays."""
        if len(counts) < 2:
            return None
        layer_s = self._layer_s(counts, num_windows)
        best_s = float(layer_s.min())
        share = _TRIAL_SHARE if self._is_seen_alone else _FIRST_SHARE
        self._saved_s = min(self._saved_s + share * best_s, _MOST_SAVED * best_s)
        for kind in sorted(Trial, key=lambda kind: -self._ages[kind]):
            cost_s = float(layer_s[self.split(counts, num_windows, kind)]) - best_s
            if self._ages[kind] < _TRIAL_EVERY or not 0 < cost_s <= _MOST_SAVED * best_s:
                continue
            if cost_s > self._saved_s:
                return None  # it is saved for: cheaper ones would use that up
            self._saved_s -= cost_s
            self._ages[kind] = 0
            return kind
        return None

    def _layer_s(self, counts: Sequence[int], num_windows: int) -> np.ndarray:
        """float64 (n + 1,): seconds if so many are streamed. Both sides are slower until the first of them ends."""
        wanted = np.asarray(counts, float)
        assert (np.diff(wanted) <= 0).all(), counts
        each_s = self.cpu_s * np.minimum(num_windows, wanted) + self.choice_s * wanted
        cpu_s = np.concatenate([np.cumsum(each_s[::-1])[::-1], [0.0]])
        bus_s = self.stream_s * np.arange(len(wanted) + 1)
        bus_slowdown = self.stream_beside_s / self.stream_s
        both_s = np.minimum(cpu_s * self.cpu_slowdown, bus_s * bus_slowdown)
        return both_s + np.maximum(cpu_s - both_s / self.cpu_slowdown, bus_s - both_s / bus_slowdown)

    def _scale(self, ratio: float) -> None:
        """What the CPU takes alone is so many times what was believed, of experts and of choices alike."""
        self.cpu_s, self.choice_s = self.cpu_s * ratio, self.choice_s * ratio
        self._sums[3:] = [ratio * value for value in self._sums[3:]]

    def _fit(self, num_experts: float, num_choices: float, elapsed_s: float) -> None:
        """Least squares of what an expert takes and what a choice does, over the CPU's layers that are remembered."""
        mean = num_choices / num_experts  # every layer counts alike, whatever its size
        each_s = elapsed_s / num_experts
        self._sums = [
            _MEMORY * old + new
            for old, new in zip(self._sums, (1, mean, mean * mean, each_s, mean * each_s), strict=True)
        ]
        count, choices, squares, right, right_choices = self._sums
        hold, hold_choices = 1e-3 * count, 1e-3 * squares  # of what is known, where layers do not tell the two apart
        a, c = count + hold, squares + hold_choices
        b, d = right + hold * self.cpu_s, right_choices + hold_choices * self.choice_s
        determinant = a * c - choices * choices
        self.cpu_s = max((c * b - choices * d) / determinant, 1e-9)
        self.choice_s = max((a * d - choices * b) / determinant, 1e-9)


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


class _Step(NamedTuple):
    """A decode step that was measured."""

    num_tokens: int
    num_promoted: int
    elapsed_s: float


class PromotionBudget:
    """How many experts a decode step may upload in the background, between 0 and `most`.

    A promotion is worth the CPU time of the hits that it will have, and costs the time by which a step that promotes is
    slower than its neighbour that does not (of as many tokens: contexts grow, and pairs of neighbours do not see that).
    The cost is the median of the last pairs, so that no step that was slow for another reason counts, however slow.
    Half of the gain raises the budget; more than the gain, beyond doubt, lowers it. With a budget of 0 there is a trial
    of a few steps now and then, whose pairs alone decide: what the machine did before is forgotten. It is forgotten as
    well where nothing was promoted for long because no expert would have repaid the cost.
    """

    def __init__(self, most: int, budget: int = 2) -> None:
        self.most, self.budget = most, min(budget, most)
        self._num_steps = 0
        self._last: _Step | None = None
        self._costs_s: deque[float] = deque(maxlen=_NUM_PAIRS)  # of one promotion, by pairs of steps
        self._paired_at = 0  # the step of the last pair
        self._trial_at, self._pause = _FIRST_PAUSE, _FIRST_PAUSE  # steps; where the budget is 0

    def next(self) -> int:
        """For the step that begins; now and then nothing, to know what a step without promotions takes."""
        self._num_steps += 1
        if self.budget > 0:
            if self._num_steps - self._paired_at > _LONGEST_PAUSE:
                self._costs_s.clear()
            return 0 if self._num_steps % _QUIET_EVERY == 0 else min(self.budget, self.most)
        into_trial = self._num_steps - self._trial_at
        if into_trial >= _TRIAL_STEPS:  # too few of its steps could be measured
            self._end_trial()
        return min(_TRIAL_PROMOTIONS, self.most) if 0 <= into_trial < _TRIAL_STEPS and into_trial % 2 == 0 else 0

    def observe(self, num_tokens: int, num_promoted: int, elapsed_s: float, gain_s: float) -> None:
        """After a step: what it copied, how long it took, and the CPU time that a promotion saves until it must go."""
        last, self._last = self._last, _Step(num_tokens, num_promoted, elapsed_s)
        if last is None or last.num_tokens != num_tokens or last.num_promoted == num_promoted:
            return
        self._paired_at = self._num_steps
        self._costs_s.append((elapsed_s - last.elapsed_s) / (num_promoted - last.num_promoted))
        if self.budget > 0:
            self._adjust(gain_s)
        elif len(self._costs_s) >= _TRIAL_PAIRS:
            is_worth_it = self.cost_s < gain_s
            self._end_trial()
            self.budget = int(is_worth_it and self.most > 0)

    def interrupt(self) -> None:
        """A step came that is no measure: kernels were compiled, graphs captured, a prompt ran. No pair spans it."""
        self._last = None

    @property
    def cost_s(self) -> float:
        """Of one promotion: the time by which steps that promote were slower; 0 until there are some pairs."""
        return max(0.0, median(self._costs_s)) if len(self._costs_s) >= _LEAST_PAIRS else 0.0

    def _adjust(self, gain_s: float) -> None:
        """Half as many again, or half, where promotions go on."""
        if gain_s > 2 * self.cost_s:
            self.budget = min(self.most, max(self.budget + 1, self.budget * 3 // 2))
            self._pause = _FIRST_PAUSE
        elif len(self._costs_s) >= _TRIAL_PAIRS and gain_s < self.cost_s - self._doubt_s:
            self.budget //= 2
            if self.budget == 0:
                self._pause //= 2
                self._end_trial()

    def _end_trial(self) -> None:
        """The next one comes after a pause that grows as long as promotions do not pay."""
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._trial_at = self._num_steps + self._pause
        self._costs_s.clear()

    @property
    def _doubt_s(self) -> float:
        """Standard error of the median, from the median deviation."""
        deviation = median(abs(cost_s - self.cost_s) for cost_s in self._costs_s)
        return 1.25 * 1.48 * deviation / math.sqrt(len(self._costs_s))


def promotion_words(budget: int, cost_s: float, gain_s: float) -> str:
    """What a `PromotionBudget` has decided, and why: for `/experts` and the log."""
    if budget == 0:
        return "none, since a copy costs more time than it saves here; tried again now and then"
    cost = f"a copy costs {1e3 * cost_s:.2f} ms" if cost_s > 0 else "a copy costs nothing that could be measured"
    return f"up to {budget} a step: {cost} and saves about {1e3 * gain_s:.2f} ms"


class Growth:
    """Says when the context has doubled since it last said so."""

    def __init__(self, first: int = 4096) -> None:
        self._next = first

    def has_doubled(self, context: int) -> bool:
        is_doubled = context >= self._next
        while self._next <= context:
            self._next *= 2
        return is_doubled
