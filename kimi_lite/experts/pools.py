"""The slots of the expert cache: a pool for each size, and how a budget is shared out among them. For
`expert_cache`."""

from dataclasses import dataclass, field

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.places import ExpertPlaces
from kimi_lite.experts.policy import HeatPolicy
from kimi_lite.experts.reader import ReadJob, aligned_memory
from kimi_lite.units import gib_apart

SLOTS_PER_CHOICE = 2  # at least: one token's experts of a layer are read while those before are computed


@dataclass(slots=True, eq=False)
class Pool:
    """Slots of one size. By slot: `jobs`, reads on their way; `broken`, what failed to come while somebody waits for
    it; `owners`, the (layer, expert) whose table names the slot."""

    policy: HeatPolicy
    slot_bytes: int
    memory: np.ndarray
    jobs: dict[int, ReadJob] = field(default_factory=dict)
    broken: dict[int, OSError] = field(default_factory=dict)
    owners: dict[int, tuple[int, int]] = field(default_factory=dict)
    unproved: set[int] = field(default_factory=set)  # slots filled by a guess that nobody has asked for yet

    def slot(self, number: int) -> np.ndarray:
        return self.memory[number * self.slot_bytes : (number + 1) * self.slot_bytes]


def make_pools(places: ExpertPlaces, budget_bytes: int, num_choices: int) -> dict[int, Pool]:
    """The budget, shared out by the bytes of each size's layers."""
    num_layers, whole_bytes = max(places.layers) + 1, sum(size * len(layers) for size, layers in places.pools.items())
    counts = {
        size: min(len(layers) * places.num_experts, budget_bytes * len(layers) // whole_bytes)
        for size, layers in places.pools.items()
    }
    least = SLOTS_PER_CHOICE * num_choices
    if min(counts.values()) < least:
        need_bytes = max(-(-least * whole_bytes // len(layers)) for layers in places.pools.values())
        need, have = gib_apart(need_bytes, budget_bytes)
        raise KimiLiteError(
            f"The expert cache needs at least {need} to hold {least} experts of a layer; the budget leaves {have}.",
            f"Give {need} more than now with --ram, or a shorter context with -c.",
        )
    return {
        size: Pool(HeatPolicy(num_layers, places.num_experts, count), size, aligned_memory(count * size))
        for size, count in counts.items()
    }
