"""Notices an answer that goes in circles: a tail that repeats itself, or the same tool call again and again.

Small and strongly quantized models fall into such loops and would fill the context; coding agents then run for hours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CHECK_EVERY = 32  # tokens; a check takes about 0.2 ms


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """What counts as a loop."""

    num_calls: int = 5  # identical (tool, arguments) in a row, over the turns of the conversation too
    num_repeats: int = 8  # of the same tokens at the end of an answer
    num_tokens: int = 512  # that those repeats cover at least: a table of zeros is no loop yet
    max_period: int = 128  # tokens that repeat


class LoopGuard:
    """One answer's guard. `earlier_calls`: (name, arguments) of the calls before this answer, oldest first."""

    def __init__(self, limits: LoopLimits, earlier_calls: Sequence[tuple[str, str]] = ()) -> None:
        self._limits, self._earlier = limits, tuple(earlier_calls)

    def repeats_itself(self, generated: Sequence[int]) -> bool:
        """Whether the ids generated so far end in a loop. Asked after every token, it looks at every 32nd."""
        if len(generated) % _CHECK_EVERY:
            return False
        return period_of_tail(generated, self._limits) is not None

    def repeats_calls(self, calls: Sequence[tuple[str, str]]) -> bool:
        """Whether the last calls, those of earlier turns included, are one and the same too often."""
        last = (*self._earlier, *calls)[-self._limits.num_calls :]
        return bool(calls) and len(last) == self._limits.num_calls and len(set(last)) == 1


def period_of_tail(ids: Sequence[int], limits: LoopLimits) -> int | None:
    """The number of tokens that repeat at the end of `ids`, or None: the smallest period whose run is long enough."""
    window = limits.num_tokens + limits.num_repeats * limits.max_period
    tail = np.asarray(ids[-window:], np.int64)
    for period in range(1, limits.max_period + 1):
        need = max(limits.num_tokens, limits.num_repeats * period)
        if need > len(tail):
            return None
        if (tail[len(tail) - need + period :] == tail[len(tail) - need : -period]).all():
            return period
    return None
