"""Prompts on machines that are made up: which of a layer's experts the CPU computes and which cross the bus.

A constant share is compared with the runtime's own `ExpertCosts`, which sees of the machine what it sees of a real one:
noisy times of either side, apart and together. Both sides read the same RAM; where they want more than it
delivers, both are slowed alike. Times are of the experts alone: nothing is requested ahead during attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kimi_lite.arch.known import K2_5
from kimi_lite.experts.costs import ExpertCosts
from kimi_lite.tools.cache.machine import COPY_GB_S_PER_CORE, Machine, expert_gb

PROMPT_TOKENS, PROMPT_SHARES = (64, 512, 4096), (1.0, 0.75, 0.5, 0.25, 0.0)
WINDOW_TOKENS = 512  # that the CPU takes at a time
_LEARNING = 60  # layers: a chunk of Kimi K2.5
_NOISE = 0.03


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of one layer: both sides at once, then the one that is left."""

    both_s: float
    cpu_s: float  # when the CPU ends, 0 without work
    bus_s: float
    num_beside: float  # experts that came meanwhile

    @property
    def layer_s(self) -> float:
        return max(self.cpu_s, self.bus_s)


@dataclass(frozen=True, slots=True)
class PromptMachine:
    """cold: the bus is so many times slower in the first `num_cold` layers, as when the file is not in memory yet."""

    machine: Machine
    bits: float
    cold: float = 1.0
    num_cold: int = 0

    def times(self, layer: int, counts: np.ndarray, num_streamed: int) -> LayerTimes:
        """counts: int (n,), descending, tokens that want each expert; the first `num_streamed` cross the bus."""
        m, each_gb, wanted = self.machine, expert_gb(self.bits), counts[num_streamed:]
        read_gb = float(np.minimum(-(-counts.sum() // (WINDOW_TOKENS * K2_5.num_experts_used)), wanted).sum()) * each_gb
        macs_s = float(wanted.sum()) * K2_5.expert_parameters / (m.core_gweights_s * 1e9 * m.num_cores)
        cpu_s = max(read_gb / m.ram_gb_s, macs_s)
        copy_gb_s = min(m.pcie_gb_s, m.ram_gb_s / m.copy_traffic, COPY_GB_S_PER_CORE * m.num_cores)
        each_s = each_gb / copy_gb_s * (self.cold if layer < self.num_cold else 1.0)
        bus_s = num_streamed * each_s
        if not cpu_s or not bus_s:
            return LayerTimes(0.0, cpu_s, bus_s, 0.0)
        asked_gb_s = read_gb / cpu_s + m.copy_traffic * each_gb / each_s
        slowdown = max(1.0, asked_gb_s / m.ram_gb_s)
        work_s = min(cpu_s, bus_s)  # of both, done meanwhile
        both_s = work_s * slowdown
        return LayerTimes(both_s, both_s + cpu_s - work_s, both_s + bus_s - work_s, work_s / each_s)


@dataclass(frozen=True, slots=True)
class PromptComparison:
    """Mean seconds of a layer's experts, after the first chunk."""

    machine: str
    num_tokens: int
    constant_s: dict[float, float]
    own_s: float
    own_share: float  # of the experts, on the CPU


def layer_counts(num_tokens: int, num_layers: int, seed: int = 0, num_experts: int = K2_5.num_experts) -> Iterator:
    """int (n,) of each layer, descending: how many tokens want each expert that any wants; some are wanted more."""
    rng = np.random.default_rng(seed)
    for _ in range(num_layers):
        likely = rng.dirichlet(np.full(num_experts, 2.0))
        counts = np.minimum(rng.multinomial(num_tokens * K2_5.num_experts_used, likely), num_tokens)
        yield np.sort(counts[counts > 0])[::-1]


def constant_s(machine: PromptMachine, layers: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Seconds of each layer with this share of its experts, those that the fewest tokens want, on the CPU."""
    return np.array(
        [machine.times(i, counts, round((1 - share) * len(counts))).layer_s for i, counts in enumerate(layers)]
    )


def own_prompt(
    machine: PromptMachine, layers: Sequence[np.ndarray], noise: float = _NOISE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each layer, and the share of its experts on the CPU."""
    rng, costs, times_s, shares = np.random.default_rng(seed), ExpertCosts(), [], []
    for i, counts in enumerate(layers):
        num_windows = -(-int(counts.sum()) // (WINDOW_TOKENS * K2_5.num_experts_used))
        num_streamed = costs.split(counts.tolist(), num_windows, costs.trial(counts.tolist(), num_windows))
        wanted = counts[num_streamed:]
        costs.divided(num_streamed, len(wanted))
        times = machine.times(i, counts, num_streamed)
        seen = np.maximum(0.5, 1 + noise * rng.standard_normal(3))
        costs.observe_stream(times.num_beside, seen[0] * times.both_s, is_beside=True)
        num_reads = int(np.minimum(num_windows, wanted).sum())
        costs.observe_cpu(num_reads, int(wanted.sum()), seen[1] * times.cpu_s, seen[1] * times.both_s)
        costs.observe_stream(num_streamed - times.num_beside, seen[2] * (times.bus_s - times.both_s))
        times_s.append(times.layer_s)
        shares.append(len(wanted) / len(counts))
    return np.array(times_s), np.array(shares)


def compare_prompts(name: str, machine: Machine, num_tokens: int, bits: float, num_layers: int) -> PromptComparison:
    layers, made = list(layer_counts(num_tokens, num_layers + _LEARNING)), PromptMachine(machine, bits)
    counted = slice(_LEARNING, None)
    constant = {share: float(constant_s(made, layers, share)[counted].mean()) for share in PROMPT_SHARES}
    times_s, shares = own_prompt(made, layers)
    return PromptComparison(name, num_tokens, constant, float(times_s[counted].mean()), float(shares[counted].mean()))
