"""How fast a plan can be: bytes over bandwidth for a token, and for a pass over all experts for a prompt.

Decode, a layer: attention and router on the GPU, then shared experts on the GPU while the CPU computes routed experts,
and a join; the next layer waits. So a token takes the GPU's own time plus the longer of the two sides.

Two numbers with one name each, everywhere. `limit`: what memory, buses and arithmetic allow if nothing else took time,
with as many of the chosen experts found in a cache as the best of the published runs found there (by share of experts
that are resident: 41 % at 4.6 %, 67 % at 12 %, 93 % at 37 %). `expected`: with the mean of those runs' hits, the share
of the bandwidth that our kernels reach, and the time of a layer that is not memory. A speed that was not measured is a
typical one, and both numbers are as good as that assumption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kimi_lite.arch.costs import decode_cost, expected_expert_share
from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.hardware.machine import (
    TILES,
    TYPICAL_CLOCK_HZ,
    TYPICAL_DISK_BYTES_S,
    TYPICAL_GPU_FLOPS_S,
    TYPICAL_PCIE_BYTES_S,
    TYPICAL_RAM_BYTES_S,
    TYPICAL_VRAM_BYTES_S,
    Gpu,
    Hardware,
    Origin,
)
from kimi_lite.hardware.nodes import MemoryUse, reach_of
from kimi_lite.plan.workspace import STEP_TOKENS

# Share of the experts that is resident -> share of choices found there; lowest and highest of the published runs.
HITS_LOW = ((0, 0), (0.046, 0.25), (0.18, 0.435), (0.36, 0.62), (0.54, 0.72), (0.73, 0.79), (1, 1))
HITS_HIGH = ((0, 0), (0.046, 0.408), (0.125, 0.67), (0.25, 0.81), (0.37, 0.93), (1, 1))
# Of the limit, measured on two Zen 4 cores at 2.6 GHz (native/README.md): a slice of K2.5 with TQ1_0 decodes 22.2
# tokens/s where its bytes allow 26.4, the demo 72.8 where they allow 162; prompts of 512 reach 221 of 333 GMAC/s.
_DECODE_SHARE, _PROMPT_SHARE = 0.85, 0.65
_TILE_REACH = 0.08  # of matrix tiles' peak: 512 tokens on K2.5-shaped slices, 191 to 241 tokens/s (tools/LOG.md)
_LAYER_CYCLES = 0.5e6  # of a layer's decode that are not memory: router, norms, barriers, the ends of its products


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes/s, or operations/s, of a place, and how it is known."""

    per_s: float
    origin: Origin


@dataclass(frozen=True, slots=True)
class Rates:
    ram: Rate
    disk: Rate
    vram: Rate
    pcie: Rate
    gpu_flops: Rate
    cpu_macs: Rate  # int8 multiply-accumulates/s, at their peak
    cpu_reach: float  # share of that peak which a prompt's products reach
    clock_hz: float


@dataclass(frozen=True, slots=True)
class Split:
    """Where routed experts lie: shares of all of them. Those on the GPU are copies, so the two do not add up to 1."""

    ram_share: float
    gpu_share: float
    is_on_gpu: bool  # whether attention, dense layers and shared experts are
    num_sequences: int = 1
    depth: float = 0.0
    value_bytes: float = 2.0


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s if nothing else took time, and what sets them: `RAM bandwidth`, `disk`, `VRAM bandwidth`, `PCIe`, `CPU
    arithmetic`, `GPU arithmetic`."""

    tok_s: float
    limited_by: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens/s to expect, and those that cannot be exceeded; `bottleneck`: what the expected speed waits for, as
    `Speed.limited_by`. `hit_share`, `best_hit_share`: of the chosen experts that
    both count as found in a cache (the GPU's, or RAM where the rest comes from disk); 0 where nothing is cached."""

    expected_tok_s: float
    limit_tok_s: float
    bottleneck: str
    hit_share: float = 0.0
    best_hit_share: float = 0.0


def rates_of(
    hardware: Hardware,
    num_threads: int | None = None,
    gpu_shares: Sequence[float] = (1.0,),
    memory_use: MemoryUse = "by rows",
) -> Rates:
    """The machine's speeds, and typical ones where none was measured. Arithmetic is of as many cores as threads run.
    gpu_shares: of the layers, on each GPU; one works after the other, so their times add up. memory_use: where there
    are several memory nodes."""
    share = min(1.0, num_threads / hardware.num_cores) if num_threads else 1.0
    disk, origins = hardware.disk, hardware.origins

    def rate(place: str, known: float | None, typical: float) -> Rate:
        return Rate(known, origins.get(place, "given")) if known else Rate(typical, "assumed")

    def of_gpus(known: Callable[[Gpu], float | None], typical: float) -> float | None:
        """None where it is known of none."""
        each = [known(gpu) for gpu in hardware.gpus]
        if not any(each):
            return None
        times = [share / (per_s or typical) for share, per_s in zip(gpu_shares or (1.0,), each, strict=False)]
        return each[0] if len(each) == 1 else 1 / sum(times)

    flops = of_gpus(lambda gpu: gpu.flops_s, TYPICAL_GPU_FLOPS_S)
    vram_bytes_s = of_gpus(lambda gpu: gpu.vram_bytes_s, TYPICAL_VRAM_BYTES_S)
    pcie_bytes_s = of_gpus(lambda gpu: gpu.pcie_bytes_s, TYPICAL_PCIE_BYTES_S)
    ram = rate("ram", hardware.ram_bytes_s, TYPICAL_RAM_BYTES_S)
    is_as_used = ram.origin == "measured" and hardware.memory_policy != "local"  # numactl set both
    return Rates(
        ram=ram if is_as_used else replace(ram, per_s=ram.per_s * reach_of(hardware.nodes, memory_use)),
        disk=rate("disk", disk.read_bytes_s if disk else None, TYPICAL_DISK_BYTES_S),
        vram=rate("vram", vram_bytes_s, TYPICAL_VRAM_BYTES_S),
        pcie=rate("pcie", pcie_bytes_s, TYPICAL_PCIE_BYTES_S),
        gpu_flops=Rate(flops, "computed") if flops else Rate(TYPICAL_GPU_FLOPS_S, "assumed"),
        cpu_macs=rate("cpu", share * (hardware.cpu_macs_s or 0), share * hardware.assume_macs_s()),
        cpu_reach=_TILE_REACH if hardware.isa == TILES else 1.0,
        clock_hz=hardware.clock_hz or TYPICAL_CLOCK_HZ,
    )


def decode_speed(
    sizes: ModelSizes, split: Split, rates: Rates, gpu_hits: float = 0.0, ram_hits: float | None = None
) -> Speed:
    """All sequences together. `ram_hits`: share of choices that memory holds; default: its share of the experts."""
    cost = decode_cost(sizes, split.depth, split.value_bytes, split.num_sequences, split.is_on_gpu)
    if split.gpu_share >= 1:
        gpu_hits = 1.0
    ram_hits = split.ram_share if ram_hits is None else max(ram_hits, split.ram_share)
    missed_bytes = cost.expert_bytes * (1 - gpu_hits)
    times = {"disk": missed_bytes * (1 - ram_hits) / rates.disk.per_s}
    if not split.is_on_gpu:
        times["RAM bandwidth"] = (cost.resident_bytes + missed_bytes + cost.cache_bytes) / rates.ram.per_s
        return Speed(*_slowest(split.num_sequences, times))
    meanwhile_s = (sizes.shared_expert_bytes + cost.expert_bytes * gpu_hits) / rates.vram.per_s
    alone_s = (cost.resident_bytes + cost.cache_bytes - sizes.shared_expert_bytes) / rates.vram.per_s
    times |= {"RAM bandwidth": missed_bytes / rates.ram.per_s, "VRAM bandwidth": meanwhile_s}
    limited_by = max(times, key=lambda name: times[name] + (alone_s if name == "VRAM bandwidth" else 0))
    return Speed(split.num_sequences / (alone_s + max(times.values())), limited_by)


def forecast_decode(sizes: ModelSizes, split: Split, rates: Rates) -> Forecast:
    """All sequences together; each has `split.depth` earlier tokens."""
    is_gpu_cache = 0 < split.gpu_share < 1
    is_cached = bool(sizes.num_experts) and (is_gpu_cache or split.ram_share < 1)

    def hits(share: float) -> tuple[float, float]:
        """Of the mean and of the best published run; by choice alone `share` is found."""
        low, best = (max(share, interpolate(curve, share)) for curve in (HITS_LOW, HITS_HIGH))
        return (low + best) / 2, best

    on_gpu = hits(split.gpu_share) if is_cached and is_gpu_cache else (0.0, 0.0)
    in_ram = hits(split.ram_share) if is_cached and split.ram_share < 1 else (1.0, 1.0)
    usual, best = (decode_speed(sizes, split, rates, *shares) for shares in zip(on_gpu, in_ram, strict=True))
    layers_s = sizes.config.num_layers * _LAYER_CYCLES / rates.clock_hz
    step_s = split.num_sequences / usual.tok_s / _DECODE_SHARE + layers_s
    found = (on_gpu if is_gpu_cache else in_ram) if is_cached else (0.0, 0.0)
    return Forecast(split.num_sequences / step_s, best.tok_s, usual.limited_by, *found)


def forecast_prompt(sizes: ModelSizes, split: Split, rates: Rates, chunk_tokens: int) -> Forecast:
    """Of a long prompt in chunks."""
    limit = prompt_speed(sizes, split, rates, chunk_tokens)
    reached = replace(rates.cpu_macs, per_s=rates.cpu_reach * rates.cpu_macs.per_s)
    usual = prompt_speed(sizes, split, replace(rates, cpu_macs=reached), chunk_tokens)
    return Forecast(_PROMPT_SHARE * usual.tok_s, limit.tok_s, usual.limited_by)


def prompt_speed(sizes: ModelSizes, split: Split, rates: Rates, chunk_tokens: int) -> Speed:
    """Of a long prompt in chunks. On the GPU every expert that a chunk needs is streamed once, or computed by the CPU
    meanwhile, whichever ends sooner; both read it from memory."""
    config = sizes.config
    products = config.active_parameters - config.vocab_size * config.hidden_size  # the head is for the last token only
    if not split.is_on_gpu:
        step = STEP_TOKENS
        needed = sizes.expert_bytes * expected_expert_share(config, step)
        times = {
            "CPU arithmetic": step * products / rates.cpu_macs.per_s,
            "RAM bandwidth": (sizes.dense_bytes + needed) / rates.ram.per_s,
            "disk": needed * (1 - split.ram_share) / rates.disk.per_s,
        }
        return Speed(*_slowest(step, times))
    needed = sizes.expert_bytes * expected_expert_share(config, chunk_tokens) * (1 - split.gpu_share)
    routed = config.num_moe_layers * config.num_experts_used * config.expert_parameters * (1 - split.gpu_share)
    stream_s, cpu_s = needed / rates.pcie.per_s, chunk_tokens * routed / rates.cpu_macs.per_s
    times = {
        "PCIe": 1 / (1 / stream_s + 1 / cpu_s) if needed else 0.0,
        "RAM bandwidth": needed / rates.ram.per_s,
        "disk": needed * (1 - split.ram_share) / rates.disk.per_s,
        "GPU arithmetic": 2 * chunk_tokens * (products - routed) / rates.gpu_flops.per_s,
    }
    return Speed(*_slowest(chunk_tokens, times))


def _slowest(num_tokens: int, times: dict[str, float]) -> tuple[float, str]:
    limit = max(times, key=lambda name: times[name])
    return num_tokens / times[limit], limit


def interpolate(curve: tuple[tuple[float, float], ...], at: float) -> float:
    """Between the points of a rising curve that starts at 0 and ends at 1."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return 1.0
