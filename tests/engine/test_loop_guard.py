"""Loops are noticed, and what only looks like one is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.engine.loop_guard import LoopGuard, LoopLimits, period_of_tail

LIMITS = LoopLimits(num_calls=3, num_repeats=4, num_tokens=40, max_period=16)


@settings(max_examples=200, deadline=None)
@given(
    start=st.lists(st.integers(0, 50), max_size=60),
    period=st.lists(st.integers(0, 50), min_size=1, max_size=16),
    count=st.integers(0, 60),
)
def test_a_tail_is_a_loop_exactly_when_it_is_long_enough(start, period, count):
    ids = start + period * count

    def is_loop(size: int) -> bool:  # the definition, spelled out
        need = max(LIMITS.num_tokens, LIMITS.num_repeats * size)
        return need <= len(ids) and all(ids[-i] == ids[-i - size] for i in range(1, need - size + 1))

    want = next((size for size in range(1, LIMITS.max_period + 1) if is_loop(size)), None)
    assert period_of_tail(ids, LIMITS) == want


def test_a_guard_stops_an_endless_answer_and_no_honest_one():
    rng, guard = np.random.default_rng(0), LoopGuard(LoopLimits())
    honest = rng.integers(0, 1000, 4000).tolist()
    assert not any(guard.repeats_itself(honest[: i + 1]) for i in range(len(honest)))
    zeros = [7, 8] * 200  # 400 tokens of a table
    assert not any(guard.repeats_itself(honest + zeros[:i]) for i in range(1, len(zeros)))
    endless = honest + [7, 8, 9] * 1000
    stopped = next(i for i in range(1, 3000) if guard.repeats_itself(endless[: len(honest) + i]))
    assert stopped <= LoopLimits().num_tokens + 32 + 3


@pytest.mark.parametrize(
    ("earlier", "calls", "is_loop"),
    [
        ([], [("f", "{}")] * 2, False),
        ([], [("f", "{}")] * 3, True),
        ([("f", "{}")] * 2, [("f", "{}")], True),
        ([("f", "{}")] * 9, [], False),
        ([("f", "{}")] * 2, [("f", '{"a":1}')], False),
        ([("f", "{}"), ("g", "{}")], [("f", "{}")], False),
    ],
)
def test_the_same_call_again_and_again(earlier, calls, is_loop):
    assert LoopGuard(LIMITS, earlier).repeats_calls(calls) is is_loop
