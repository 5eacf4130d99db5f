"""The least loss within a number of bytes, where every unit takes one of its options: exactly.

The multiple-choice knapsack problem by states: units one after another, and of all ways to fill them so far only those
that no other undercuts in both bytes and loss. A price of a byte bounds what the rest can still bring (Dyer, Kayal &
Walker 1984; Pisinger 1995), so a state, or an option, whose bound is above a solution that is known already is dropped:
of hundreds of units with a dozen options few thousand states are left. The first solution and the price are those of
steepest descent along each unit's lower hull (Shoham & Gersho 1988). The result is an optimum, so more bytes never lose
more, and the same question has the same answer.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MOST_STATES = 1 << 17  # beyond it the nearest to the bound are kept; no question of a real model came near it
_SLACK = 1e-9  # of the loss: sums in another order are the same
_ROUNDING = 1e-14  # of what is added up: losses, and bytes times their price, which may be far larger


class Option(NamedTuple):
    """One choice for a unit. `loss`: in whatever is to be small; `num_bytes`: whole."""

    num_bytes: int
    loss: float


class Descent(NamedTuple):
    """`chosen`: an option of each unit; `price`: loss per byte of the first step that did not fit, 0 where all did."""

    chosen: list[int]
    price: float


def solve(units: Sequence[Sequence[Option]], available: int) -> list[int] | None:
    """The place of each unit's option: of all choices within `available` bytes one of the least loss, of these one of
    the fewest bytes; None where even the smallest are too large."""
    if sum(min(option.num_bytes for option in options) for options in units) > available:
        return None
    first = descend(units, available)
    if not first.price:
        return first.chosen  # everything has its best
    known = sum(options[place].loss for options, place in zip(units, first.chosen, strict=True))
    bound = _bound(units, available, first.price)
    gap = known - bound + _SLACK * max(known, 1e-300) + _ROUNDING * len(units) * (known + first.price * available)
    return _best_state(units, available, first.price, gap)


def descend(units: Sequence[Sequence[Option]], available: int) -> Descent:
    """All at their smallest, then the upgrade that lowers the loss most per byte, as long as one fits."""
    hulls = [lower_hull(options) for options in units]
    at = [0] * len(hulls)
    left = available - sum(options[hull[0]].num_bytes for options, hull in zip(units, hulls, strict=True))
    price = 0.0

    def step(index: int) -> tuple[float, int]:
        below, above = (units[index][hulls[index][at[index] + i]] for i in (0, 1))
        return _slope(below, above), index

    steps = [step(index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        slope, index = heapq.heappop(steps)
        options, hull = units[index], hulls[index]
        cost = options[hull[at[index] + 1]].num_bytes - options[hull[at[index]]].num_bytes
        if cost > left:
            price = price or -slope
            continue  # too large a step here; a smaller unit's may still fit
        left -= cost
        at[index] += 1
        if at[index] + 1 < len(hull):
            heapq.heappush(steps, step(index))
    return Descent([hull[place] for hull, place in zip(hulls, at, strict=True)], price)


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Places of the options that are best for some price of a byte, by rising size."""
    hull: list[int] = []
    for place in sorted(range(len(options)), key=lambda place: (options[place].num_bytes, options[place].loss)):
        option = options[place]
        if hull and option.loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(options[hull[-1]], option) <= _slope(options[hull[-2]], options[hull[-1]]):
            hull.pop()
        hull.append(place)
    return hull


def _slope(below: Option, above: Option) -> float:
    return (above.loss - below.loss) / (above.num_bytes - below.num_bytes)


def _bound(units: Sequence[Sequence[Option]], available: int, price: float) -> float:
    """No choice within `available` loses less."""
    return sum(min(_priced(option, price) for option in options) for options in units) - price * available


def _priced(option: Option, price: float) -> float:
    return option.loss + price * option.num_bytes


def _best_state(units: Sequence[Sequence[Option]], available: int, price: float, gap: float) -> list[int]:
    """The best choice among those within `gap` of the bound; one is known to be."""
    num_bytes, losses, excess = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    smallest_left = sum(min(option.num_bytes for option in options) for options in units)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # of each unit's states: the state before, the option taken
    for options in units:
        smallest_left -= min(option.num_bytes for option in options)
        least = min(_priced(option, price) for option in options)
        kept = [place for place, option in enumerate(options) if _priced(option, price) - least <= gap]
        taken = np.repeat(kept, len(num_bytes))
        before = np.tile(np.arange(len(num_bytes)), len(kept))
        num_bytes = np.concatenate([num_bytes + options[place].num_bytes for place in kept])
        losses = np.concatenate([losses + options[place].loss for place in kept])
        excess = np.concatenate([excess + (_priced(options[place], price) - least) for place in kept])
        is_open = (excess <= gap) & (num_bytes + smallest_left <= available)
        best = _undercut_by_none(num_bytes, losses, excess, np.flatnonzero(is_open))
        num_bytes, losses, excess = num_bytes[best], losses[best], excess[best]
        trail.append((before[best], taken[best]))
    state = len(num_bytes) - 1  # the largest has the least loss
    places = []
    for before, taken in reversed(trail):
        places.append(int(taken[state]))
        state = int(before[state])
    return places[::-1]


def _undercut_by_none(num_bytes: np.ndarray, losses: np.ndarray, excess: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Those of `among` that are best for their bytes, by rising bytes and falling losses."""
    order = among[np.lexsort((losses[among], num_bytes[among]))]
    least_before = np.concatenate([[np.inf], np.minimum.accumulate(losses[order])[:-1]])
    best = order[losses[order] < least_before]
    if len(best) > _MOST_STATES:
        best = np.sort(best[np.argpartition(excess[best], _MOST_STATES)[:_MOST_STATES]])
        best = best[np.argsort(num_bytes[best], kind="stable")]
    return best
