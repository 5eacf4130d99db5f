"""How fast decoding could be on this machine: the bytes a token needs by place, and how fast each place can be read.

Printed by `tools.bench` before anything is measured, so that a result is never read without its bound. Today every place is RAM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kimi_lite.model.costs import decode_cost
from kimi_lite.model.sizes import ModelSizes
from native.cpu.threads import Team
from tools.bench_plan import BenchTest
from tools.measure import measure
from tools.workloads import Bench

RAM = "RAM"
_PART_BYTES, _BUFFER_BYTES = 4 << 20, 512 << 20  # each thread's share of a run; larger than the caches of a desktop CPU
_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Of a plain read by all threads."""

    gb_s: float
    is_noisy: bool
    stolen_share: float


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One generation test: bytes a token from each place, what they are, and tokens/s if nothing else took time."""

    test: BenchTest
    bytes_by_place: Mapping[str, float]
    resident_bytes: float
    expert_bytes: float
    cache_bytes: float
    tok_s: float

    @property
    def token_bytes(self) -> float:
        return sum(self.bytes_by_place.values())


def measure_bandwidth(team: Team) -> Bandwidth:
    """Reads memory the way kernels read weights: the same team, tasks from the same counter."""
    part_bytes = _PART_BYTES * team.num_threads
    parts = np.ones((max(2, _BUFFER_BYTES // part_bytes), part_bytes // 4), np.int32)
    bench = Bench(team, 256)
    rounds = measure(team, {"read": [bench.read(part) for part in parts]}, _ROUNDS)
    return Bandwidth(part_bytes / rounds.median_s("read") / 1e9, rounds.is_noisy, rounds.stolen_share)


def find_ceilings(
    sizes: ModelSizes,
    value_bytes: float,
    tests: Sequence[BenchTest],
    gb_s_by_place: Mapping[str, float],
) -> list[Ceiling]:
    """Of the generation tests; prompts are bound by arithmetic, not by memory. Places are read one after the other."""
    ceilings = []
    for test in (test for test in tests if test.kind == "tg"):
        cost = decode_cost(sizes, test.mean_depth, value_bytes, test.num_sequences)
        parts = [part / test.num_sequences for part in (cost.resident_bytes, cost.expert_bytes, cost.cache_bytes)]
        by_place = {RAM: cost.token_bytes}
        seconds = sum(num_bytes / gb_s_by_place[place] / 1e9 for place, num_bytes in by_place.items())
        ceilings.append(Ceiling(test, by_place, *parts, 1 / seconds))
    return ceilings
