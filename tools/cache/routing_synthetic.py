"""Routing traces made up from published reuse statistics, for machines and sizes of which there is no recording yet.

Peers publish how many experts an LRU cache of so many slots finds (models with 256 to 512 fine-grained experts; 384
here). An LRU cache of s slots finds an expert exactly if it lies among the s most recently used: so the curve is the
distribution of depths in that list, and drawing depths from it gives a trace with that curve. What it cannot give is
anything beyond the curve: there are no favourites that outlast the list, so policies that count frequency have nothing
to find.
"""

import numpy as np

from kimi_lite.experts.recorder import RoutingTrace

LRU_CURVE = (
    (0.0, 0.0),
    (0.005, 0.04),
    (0.046, 0.408),
    (0.125, 0.67),
    (0.25, 0.81),
    (0.37, 0.93),
    (1.0, 1.0),
)  # share of slots, hits


def make_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """Every layer has a list of its own; the first is in random order."""
    rng = np.random.default_rng(seed)
    shares, hits = np.array(LRU_CURVE).T
    depths = np.interp(rng.random((num_tokens, num_layers, 2 * top_k)), hits, shares) * num_experts
    ids = np.full((num_tokens, num_layers, top_k), -1, np.int16)
    for layer in range(num_layers):
        recent = rng.permutation(num_experts)
        for token in range(num_tokens):
            wanted = np.unique(np.minimum(depths[token, layer].astype(int), num_experts - 1))
            wanted = rng.permutation(wanted)[:top_k]
            if len(wanted) < top_k:
                others = np.setdiff1d(np.arange(num_experts), wanted)
                wanted = np.concatenate([wanted, others[: top_k - len(wanted)]])
            chosen = recent[np.sort(wanted)]
            ids[token, layer] = chosen
            recent = np.concatenate([chosen, np.delete(recent, wanted)])
    return RoutingTrace("synthetic", num_experts, ids, np.arange(num_tokens + 1))
