"""The choice of types under a number of bytes: against all combinations, and what must hold for any question."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.quantize.recipe.knapsack import Option, descend, lower_hull, solve

BITS = (50, 54, 56, 66, 72, 84, 110, 144, 176, 210, 272)  # bytes of 256 weights in the types there are


@st.composite
def questions(draw) -> list[list[Option]]:
    """A few units: some alike as experts' tensors are, some of sizes and losses of any kind, also useless options."""
    kinds = draw(
        st.lists(
            st.lists(
                st.builds(
                    Option,
                    st.integers(1, 60) | st.integers(10**9, 10**9 + 50),
                    st.floats(0, 9) | st.sampled_from([0.0, 0.5, 1.0, 1e-12]),
                ),
                min_size=1,
                max_size=5,
            ),
            min_size=1,
            max_size=3,
        )
    )
    return [list(draw(st.sampled_from(kinds))) for _ in range(draw(st.integers(1, 5)))]


def best_of_all(units: list[list[Option]], available: int) -> float | None:
    every = itertools.product(*units)
    return min(
        (sum(o.loss for o in combo) for combo in every if sum(o.num_bytes for o in combo) <= available), default=None
    )


def taken(units: list[list[Option]], places: list[int]) -> list[Option]:
    return [options[place] for options, place in zip(units, places, strict=True)]


@settings(max_examples=300, deadline=None)
@given(questions(), st.data())
def test_nothing_loses_less_within_the_bytes(units, data):
    sizes = [sum(o.num_bytes for o in combo) for combo in itertools.product(*units)]
    available = data.draw(st.sampled_from(sizes)) + data.draw(st.integers(-2, 2))
    places, best = solve(units, available), best_of_all(units, available)
    if best is None:
        assert places is None
        return
    chosen = taken(units, places)
    assert sum(option.num_bytes for option in chosen) <= available
    assert sum(option.loss for option in chosen) == pytest.approx(best, rel=1e-8, abs=1e-12)
    assert solve(units, available) == places


def test_bytes_may_weigh_far_more_than_losses():
    """A price of 9 a byte times 10^9 bytes: rounded, it is wrong by more than the losses differ."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        sizes, losses = 10**9 + rng.integers(0, 50, (3, 4)), rng.uniform(0, 9, (3, 4))
        kinds = [list(map(Option, *each)) for each in zip(sizes.tolist(), losses.tolist(), strict=True)]
        units = [kinds[index] for index in rng.integers(0, 3, rng.integers(1, 5))]
        combos = [sum(option.num_bytes for option in combo) for combo in itertools.product(*units)]
        available = int(rng.choice(combos))
        places, best = solve(units, available), best_of_all(units, available)
        assert sum(option.loss for option in taken(units, places)) == pytest.approx(best, rel=1e-8, abs=1e-12)


def real_units(rng: np.random.Generator, num_units: int, num_sizes: int) -> list[list[Option]]:
    """Tensors with sensitivities of their own, in types that lose 4^-bits."""
    weights = rng.integers(1, 400, num_sizes) * 256 * 100
    units = []
    for index in range(num_units):
        size, harm = int(weights[index % num_sizes]), float(np.exp(rng.normal(0, 1)))
        noise = rng.uniform(0.8, 1.25, len(BITS))
        units.append([Option(size // 256 * b, harm * 4 ** (-b / 32) * n) for b, n in zip(BITS, noise, strict=True)])
    return units


@pytest.mark.parametrize("num_sizes", [1, 3, 60])
def test_more_bytes_never_lose_more_and_the_price_bounds_the_rest(num_sizes):
    """At the size of a real model: 180 units, near the bound that no choice is below."""
    units = real_units(np.random.default_rng(num_sizes), 180, num_sizes)
    small, large = (sum(size(o.num_bytes for o in options) for options in units) for size in (min, max))
    before, start_s = float("inf"), time.process_time()
    for share in (0, 0.03, 0.0301, 0.1, 0.5, 0.97, 1):
        available = int(small + share * (large - small))
        chosen = taken(units, solve(units, available))
        loss = sum(option.loss for option in chosen)
        assert sum(option.num_bytes for option in chosen) <= available and loss <= before * (1 + 1e-12)
        descent = sum(option.loss for option in taken(units, descend(units, available).chosen))
        assert loss <= descent * (1 + 1e-12)
        before = loss
    assert time.process_time() - start_s < 20


def test_alike_units_are_no_harder():
    """Every unit the same: as many equal choices as there can be."""
    options = [Option(b, 4 ** (-b / 32)) for b in BITS]
    units = [options] * 120
    chosen = taken(units, solve(units, 120 * 70))
    assert sum(option.num_bytes for option in chosen) <= 120 * 70
    mixed = 120 * float(np.interp(70, BITS, [option.loss for option in options]))  # of any share of two neighbours
    step = max(a.loss - b.loss for a, b in itertools.pairwise(options))
    assert mixed * (1 - 1e-9) <= sum(option.loss for option in chosen) <= mixed + step


def test_the_hull_drops_what_no_price_would_buy():
    sizes_and_losses = [(10, 5.0), (12, 4.9), (14, 2.0), (15, 3.0), (20, 1.0), (20, 0.5)]
    options = [Option(size, loss) for size, loss in sizes_and_losses]
    assert [options[place] for place in lower_hull(options)] == [(10, 5.0), (14, 2.0), (20, 0.5)]
