"""How fast decoding could be on this machine: the bytes a token needs by place, and how fast each place can be read.

Printed by `tools.bench` before anything is measured, so that a result is never read without its bound. The places are
the plan's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kimi_lite.arch.costs import decode_cost
from kimi_lite.hardware.bandwidth import BUFFER_BYTES, parts_to_read, run_bytes
from kimi_lite.native.cpu.threads import Team
from kimi_lite.plan.types import Plan
from kimi_lite.tools.bench.measure import measure
from kimi_lite.tools.bench.plan import BenchTest
from kimi_lite.tools.bench.workloads import Bench

RAM = "RAM"
_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Of a plain read by all threads."""

    gb_s: float
    is_noisy: bool
    stolen_share: float


@dataclass(frozen=True, slots=True)
class Limit:
    """One generation test: bytes a token from each place, what they are, and the plan's tokens/s."""

    test: BenchTest
    bytes_by_place: Mapping[str, float]
    resident_bytes: float
    expert_bytes: float
    cache_bytes: float
    expected_tok_s: float
    limit_tok_s: float

    @property
    def token_bytes(self) -> float:
        return sum(self.bytes_by_place.values())


def measure_bandwidth(team: Team) -> Bandwidth:
    """Reads memory the way kernels read weights: the same team, tasks handed out alike, on its threads' nodes."""
    part_bytes = run_bytes(team.num_threads)
    parts = parts_to_read(max(2, BUFFER_BYTES // part_bytes), part_bytes, team.groups)
    bench = Bench(team, 256)
    rounds = measure(team, {"read": [bench.read(part) for part in parts]}, _ROUNDS)
    return Bandwidth(part_bytes / rounds.median_s("read") / 1e9, rounds.is_noisy, rounds.stolen_share)


def find_limits(plan: Plan, tests: Sequence[BenchTest]) -> list[Limit]:
    """Of the generation tests, by the plan: prompts have bounds of another kind."""
    limits = []
    for test in (test for test in tests if test.kind == "tg"):
        split, count = plan.split, test.num_sequences
        cost = decode_cost(plan.sizes, test.mean_depth, split.value_bytes, count, split.is_on_gpu)
        parts = [part / count for part in (cost.resident_bytes, cost.expert_bytes, cost.cache_bytes)]
        by_place = {RAM: cost.token_bytes}
        if split.is_on_gpu:
            by_place = {RAM: parts[1], "VRAM": parts[0] + parts[2]}
        if split.ram_share < 1:
            by_place["disk"] = parts[1] * (1 - split.ram_share)
        forecast = plan.decode_at(test.mean_depth, count)
        limits.append(Limit(test, by_place, *parts, forecast.expected_tok_s, forecast.limit_tok_s))
    return limits
