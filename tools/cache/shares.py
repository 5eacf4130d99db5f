"""Decoding on machines that are made up: misses by the CPU, by the bus, or as `model.hybrid.adaptive` decides.

The constant share is llama.cpp's (`--moe-cache-cpu-share`): so much of a layer's misses is computed on the CPU, the
rest is uploaded while the layer waits and stays in the cache. Ours is the runtime's own: `Adaptive` watches the steps'
times (with 1 % of noise) and says how many experts a step may promote and what each must bring, `HeatPolicy` which.
Times are `machine.Machine`'s, so what is compared is decisions, on equal kernels and links.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from kimi_lite.arch.known import K2_5
from kimi_lite.experts.costs import ExpertCosts
from kimi_lite.experts.policy import SWAP_WEIGHTS, HeatPolicy
from kimi_lite.experts.recorder import RoutingTrace
from kimi_lite.model.hybrid.adaptive import MAX_PROMOTIONS, Adaptive
from kimi_lite.tools.cache.machine import Machine, Work

MACHINES = (
    "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores",
    "24 GB, PCIe 5.0 x16, 60 GB/s RAM, 16 cores",
    "24 GB, PCIe 3.0 x8, 60 GB/s RAM, 16 cores",
    "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 16 cores, copies 1x",
    "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 6 cores, 20 Gweights/s",
    "24 GB, PCIe 4.0 x16, 60 GB/s RAM, 6 cores, 20 Gweights/s, copies 1x",
    "32 GB, PCIe 5.0 x16, 300 GB/s RAM, 32 cores, 1790 GB/s VRAM",
)
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
_SKIPPED_SHARE, _NOISE = 0.25, 0.01


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokens/s, and copies a token of the own way."""

    machine: str
    uncached_tok_s: float
    constant_tok_s: dict[float, float]
    own_tok_s: float
    own_copies: float


def compare(name: str, machine: Machine, trace: RoutingTrace, bits: float) -> Comparison:
    num_tokens = len(trace.ids)
    scale = trace.num_layers / K2_5.num_moe_layers
    num_slots = round(scale * machine.num_slots(bits))
    nothing = np.zeros(K2_5.num_moe_layers)
    uncached_s = machine.token_s(Work(nothing, nothing + K2_5.num_experts_used, nothing), bits)
    constant = {}
    for share in SHARES:
        works = _constant_share(trace, num_slots, share)
        constant[share] = 1 / float(np.mean([machine.token_s(work, bits) for work in works[_skipped(num_tokens) :]]))
    times_s, copies = own_way(machine, trace, num_slots, bits)
    counted = slice(_skipped(num_tokens), None)
    return Comparison(name, 1 / uncached_s, constant, 1 / float(np.mean(times_s[counted])), np.mean(copies[counted]))


def _skipped(num_tokens: int) -> int:
    return int(num_tokens * _SKIPPED_SHARE)


def _constant_share(trace: RoutingTrace, num_slots: int, share: float) -> list[Work]:
    """Every token's work, scaled to all layers. At first the cache holds the first tokens' experts, as without uploads
    nothing else ever comes in."""
    policy = HeatPolicy(trace.num_layers, trace.num_experts, num_slots)
    owed, works = 0.0, []
    for token, chosen in enumerate(trace.ids.astype(np.int64)):
        hits, uploads = np.zeros((2, trace.num_layers))
        for layer, ids in enumerate(chosen):
            policy.touch(token, layer, ids)
            slots = policy.find(layer, ids)
            missed = ids[slots < 0].tolist()
            owed += (1 - share) * len(missed)
            count = min(int(owed), len(missed))
            owed -= count
            hits[layer], uploads[layer] = len(ids) - len(missed), count
            if num_slots:
                policy.pin(slots)
                fitting = max(count, min(len(missed), policy.num_free))
                for slot in policy.admit(layer, missed[:fitting]):
                    if slot >= 0:
                        policy.commit(slot)
                policy.unpin(slots)
        works.append(_scaled(trace, hits, uploads))
    return works


def own_way(
    machine: Machine, trace: RoutingTrace, num_slots: int, bits: float, noise: float = _NOISE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each token, and copies in it, both scaled to all layers."""
    rng, scale = np.random.default_rng(seed), trace.num_layers / K2_5.num_moe_layers
    experts = _SimulatedExperts(trace, num_slots)
    adaptive = Adaptive(experts, [1], max(1, round(MAX_PROMOTIONS * scale)))
    times_s, copies = [], []
    for token, chosen in enumerate(trace.ids.astype(np.int64)):
        adaptive.begin(1, is_decoding=True)
        hits = np.array([experts.look_up(layer, ids) for layer, ids in enumerate(chosen)], float)
        work = _scaled(trace, hits, np.zeros_like(hits), experts.num_began)
        elapsed_s = machine.token_s(work, bits) * max(0.1, 1 + noise * rng.standard_normal())
        num_missed = round(work.misses.sum())
        experts.costs.observe_cpu(num_missed, num_missed, float(machine.layers_s(work, bits).sum()))
        adaptive.end(1, token + 1, scale * elapsed_s, is_steady=token > 2)
        times_s.append(elapsed_s)
        copies.append(work.promotions)
    return np.array(times_s), np.array(copies)


class _SimulatedExperts:
    """What `Adaptive` sees of `model.hybrid.routed.RoutedExperts`: a promotion arrives before the next step."""

    def __init__(self, trace: RoutingTrace, num_slots: int) -> None:
        policy = HeatPolicy(trace.num_layers, trace.num_experts, num_slots, weights=SWAP_WEIGHTS)
        self.slots, self.costs, self.num_threads = SimpleNamespace(policy=policy, capacity=num_slots), ExpertCosts(), 1
        self.num_began = self._step = 0
        self._on_way: list[int] = []

    def begin_step(self, budget: int, num_tokens: int, least_gain: float) -> int:
        policy = self.slots.policy
        self._step += num_tokens
        for slot in self._on_way:
            policy.commit(slot)
        began = policy.promotions(policy.num_free or budget, 0.0 if policy.num_free else least_gain)
        for promotion in began:
            policy.begin_promotion(promotion)
        self._on_way = [promotion.slot for promotion in began]
        self.num_began = len(began)
        return self.num_began

    def look_up(self, layer: int, ids: np.ndarray) -> int:
        """Hits among a token's experts."""
        self.slots.policy.touch(self._step, layer, ids)
        return int((self.slots.policy.find(layer, ids) >= 0).sum())


def _scaled(trace: RoutingTrace, hits: np.ndarray, uploads: np.ndarray, num_promotions: int = 0) -> Work:
    """A token's work in all of Kimi K2.5's layers, from that in the trace's."""
    misses = trace.ids.shape[2] - hits - uploads
    layers = np.arange(K2_5.num_moe_layers) % trace.num_layers
    scale = K2_5.num_moe_layers / trace.num_layers
    return Work(hits[layers], misses[layers], uploads[layers], scale * num_promotions)
