"""How far X^T X is believed: what is chosen on inputs that were kept out holds on others, with few tokens and with
many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.calibrate.strength import (
    ALIKE,
    IMPORTANCE,
    STRENGTHS,
    Seen,
    choose_strength,
    held_out_chunks,
)

K, Q2_0 = 128, BY_NAME["Q2_0"]


class Inputs:
    """Rows whose columns are of unequal size, and mixed from a few directions where they are `related`."""

    def __init__(self, seed: int, is_related: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.sizes = self.rng.gamma(1.0, size=K) + 0.1
        self.mixing = self.rng.standard_normal((8, K)) if is_related else np.zeros((8, K))

    def draw(self, count: int) -> np.ndarray:
        mixed = self.rng.standard_normal((count, 8)) @ self.mixing + self.rng.standard_normal((count, K))
        return (mixed * self.sizes).astype(np.float32)


def seen_of(inputs: Inputs, num_fitted: int, num_held_out: int) -> Seen:
    seen = Seen(K)
    seen.add(inputs.draw(num_fitted), is_held_out=False)
    seen.add(inputs.draw(num_held_out), is_held_out=True)
    return seen


def product_error(weights: np.ndarray, seen: Seen, strength: float, others: np.ndarray) -> float:
    decoded = dequantize(seen.coding(strength).encode(Q2_0, weights), "Q2_0")
    return float((((decoded - weights) @ others.T) ** 2).sum())


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([8, 24, 100, 2000]), st.booleans())
def test_never_much_worse_than_without_feedback(seed, num_fitted, is_related):
    """Whatever the inputs and however few: on yet other inputs, at most a twentieth is lost to importance alone or to
    nothing at all."""
    inputs = Inputs(seed, is_related)
    weights = inputs.rng.standard_normal((24, K)).astype(np.float32)
    seen, others = seen_of(inputs, num_fitted, 64), inputs.draw(400)
    chosen = product_error(weights, seen, choose_strength(Q2_0, weights, seen), others)
    assert chosen < 1.05 * min(product_error(weights, seen, each, others) for each in (IMPORTANCE, ALIKE))


def test_many_related_inputs_are_believed_and_few_are_not():
    weights = np.random.default_rng(0).standard_normal((24, K)).astype(np.float32)
    many = seen_of(Inputs(1, is_related=True), 3000, 300)
    strength = choose_strength(Q2_0, weights, many)
    assert strength in STRENGTHS and strength <= 1
    others = Inputs(1, is_related=True).draw(400)
    assert product_error(weights, many, strength, others) < 0.7 * product_error(weights, many, IMPORTANCE, others)
    misled = Seen(K)  # what is kept out has other directions than what may be fitted to
    misled.add(Inputs(2, is_related=True).draw(300), is_held_out=False)
    misled.add(Inputs(3, is_related=True).draw(300), is_held_out=True)
    assert choose_strength(Q2_0, weights, misled) in (max(STRENGTHS), IMPORTANCE, ALIKE)


def test_without_inputs_kept_out_the_usual_strength_is_taken():
    weights = np.zeros((4, K), np.float32)
    assert choose_strength(Q2_0, weights, seen_of(Inputs(0, True), 100, 4)) == STRENGTHS[0]
    assert Seen(K).num_inputs == 0 and (Seen(K).coding(ALIKE).importance == 1).all()


@pytest.mark.parametrize(("num_chunks", "want"), [(1, 0), (3, 0), (4, 1), (10, 2), (64, 13)])
def test_chunks_kept_out(num_chunks, want):
    kept = held_out_chunks(num_chunks)
    assert len(kept) == num_chunks and sum(kept) == want and kept == held_out_chunks(num_chunks)
