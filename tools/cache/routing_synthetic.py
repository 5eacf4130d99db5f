"""Routing traces made up so that experts are used again as published for real models, for sizes of which there is no
recording.

A layer's router scores every expert: how popular it is at all, how well it fits the topic (all layers change it at
once), what the text just now is about (a process that drifts), and noise; the best `top_k` are chosen. The strengths
are fitted to what others measured, as `reuse` finds it again:

    Qwen3-30B (8 of 128): 45 % of a token's experts are used by the next one, 80 % by one of the next 8
    Kimi-Linear (8 of 256): 34 % by the next one; a cache of 6, 12, 24, 48 % of the experts finds 40, 62, 85, 94 %

What is made up stays made up: favourites of single layers, and how topics of real conversations follow each other, are
not in it. `--record-routing` records the real thing, which `tools.cache` replays as well.
"""

from dataclasses import dataclass

import numpy as np

from kimi_lite.experts.recorder import RoutingTrace


@dataclass(frozen=True, slots=True)
class Habits:
    """Standard deviations of what a score is the sum of, and how long its parts last."""

    popularity: float = 0.6
    topic: float = 0.8
    topic_tokens: float = 250.0  # on average
    drift: float = 1.05
    drift_half_life: float = 10.0  # tokens
    noise: float = 0.8


HABITS = Habits()


@dataclass(frozen=True, slots=True)
class Reuse:
    """How a trace uses experts again: shares of all choices."""

    next_token: float  # the token before had chosen it
    within_8: float  # one of the 8 before
    found: tuple[float, ...]  # by an LRU cache of each size, every layer with its own


def make_trace(
    num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0, habits: Habits = HABITS
) -> RoutingTrace:
    """Every token is a pass of its own."""
    rng, shape = np.random.default_rng(seed), (num_layers, num_experts)
    popularity, topic, drift = (rng.standard_normal(shape) for _ in range(3))
    kept = 2 ** (-1 / habits.drift_half_life)
    ids = np.empty((num_tokens, num_layers, top_k), np.int16)
    for token in range(num_tokens):
        drift = kept * drift + (1 - kept**2) ** 0.5 * rng.standard_normal(shape)
        if rng.random() < 1 / habits.topic_tokens:
            topic = rng.standard_normal(shape)
        scores = habits.popularity * popularity + habits.topic * topic + habits.drift * drift
        scores += habits.noise * rng.standard_normal(shape)
        ids[token] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    return RoutingTrace("synthetic", num_experts, ids, np.arange(num_tokens + 1))


def reuse(trace: RoutingTrace, sizes: tuple[float, ...] = ()) -> Reuse:
    """After the first quarter. sizes: of LRU caches, as shares of a layer's experts.

    An LRU cache of n slots finds an expert exactly if it lies among the n most recently used.
    """
    gaps, depths = [], []
    for layer in trace.moe_layers.tolist():
        recent = list(range(trace.num_experts))
        last = np.full(trace.num_experts, -(10**9))
        for token, chosen in enumerate(trace.ids[:, layer].tolist()):
            if token >= len(trace.ids) // 4:
                gaps += [token - last[expert] for expert in chosen]
                depths += [recent.index(expert) for expert in chosen]
            recent = [*chosen, *(expert for expert in recent if expert not in chosen)]
            last[chosen] = token
    gap, depth = np.array(gaps), np.array(depths)
    found = tuple(float((depth < size * trace.num_experts).mean()) for size in sizes)
    return Reuse(float((gap == 1).mean()), float((gap <= 8).mean()), found)
