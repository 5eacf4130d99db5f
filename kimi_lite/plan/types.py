"""What a plan says: what lies where and how much of it is allocated, how fast it is expected to be and can be at most,
a verdict. Made by `plan.plan`, shown by `plan.view`, followed by `engine`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.machine import Hardware
from kimi_lite.hardware.nodes import MemoryUse
from kimi_lite.options import Options
from kimi_lite.plan.speed import Forecast, Rates, Split, forecast_decode

Place = Literal["VRAM", "RAM", "disk"]
Verdict = Literal["fits", "tight", "from disk", "refused"]

# Parts, as the rows call them.
DENSE, EMBEDDING, KV, SPILL, VISION, EXPERTS = (
    *("dense weights", "embedding", "KV cache", "KV pages in RAM", "vision", "experts"),
)
WORK, PINNED, PROGRAM, SLOTS, MARGIN = (
    *("compute buffers", "pinned buffers", "Python + libraries", "cached experts", "safety margin"),
)


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What a plan is made for: a model in its types, a machine, what the user asks."""

    sizes: ModelSizes
    hardware: Hardware
    limits: Options = field(default_factory=Options)
    file_bytes: int = 0  # what must still be written to the machine's disk; 0 for a file that is there

    @property
    def is_on_gpu(self) -> bool:
        return self.hardware.gpu is not None and self.limits.allows_gpu

    @property
    def is_one_by_one(self) -> bool:
        """Whether only one request may run at a time: on a GPU bits depend on what else is in a batch."""
        return self.limits.is_reproducible and self.is_on_gpu

    @property
    def num_running(self) -> int:
        """Requests at the same time, each with a whole context."""
        return 1 if self.is_one_by_one else self.limits.num_sequences


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One thing in one place."""

    place: Place
    part: str
    num_bytes: int
    gpu: int = 0  # of VRAM: whose, by its number among the plan's GPUs


@dataclass(frozen=True, slots=True)
class Budget:
    """What a place may take, and what set that: `free` memory, or the user's flag."""

    place: Place
    have_bytes: int
    source: str
    gpu: int = 0  # as a row's


@dataclass(frozen=True, slots=True)
class GpuPart:
    """What one of the GPUs gets of the model."""

    layers: range  # one after the other
    num_slots: int  # for their routed experts


@dataclass(frozen=True, slots=True)
class Remedy:
    """Something that makes a plan run, tried on the very model and machine. `flags` are added to the command; where
    `action` is set instead, it is no flag: other memory, another disk."""

    flags: str
    effect: str
    action: str = ""

    def __str__(self) -> str:
        return f"Try {self.flags or self.action}: {self.effect}."


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why it cannot run: `problem` has need and have."""

    problem: str
    remedies: tuple[Remedy, ...]

    @property
    def hint(self) -> str:
        return "\n".join(map(str, self.remedies))

    @property
    def has_flags(self) -> bool:
        """Whether it runs on this very machine with other flags."""
        return any(remedy.flags for remedy in self.remedies)


@dataclass(frozen=True, slots=True)
class Plan:
    """`rows` add up to what each place holds. What follows them is what the engine allocates: nothing decides again.
    Where `refusal` is set, rows are what would be needed."""

    situation: PlanInputs
    is_on_gpu: bool
    dense_type: str  # in VRAM, of the weights that every token uses: one of arch.dense's
    rows: tuple[MemoryRow, ...]
    budgets: tuple[Budget, ...]
    # What is allocated
    context_length: int  # tokens of one sequence
    num_cache_pages: int  # pages of the KV cache, for all sequences
    num_spill_pages: int  # pages in RAM for those that a GPU's cache has no place for; 0 without a GPU
    num_vram_slots: int  # experts that have a place on a GPU
    prompt_chunk_tokens: int  # of a prompt in one forward pass
    ram_expert_bytes: int  # experts that RAM holds: all, or in slots those that VRAM does not hold
    disk_expert_bytes: int  # experts that fit nowhere, read from disk when they are chosen
    expert_capacity_bytes: int  # experts of this size that would fit: in RAM, or all of them in VRAM
    num_threads: int
    # What comes of it
    split: Split
    rates: Rates
    decode: Forecast  # with an empty context
    decode_full: Forecast  # at the end of the context
    prompt: Forecast
    bottleneck: str
    verdict: Verdict
    memory_use: MemoryUse = "by rows"  # of several memory nodes
    node_bytes: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # by node: weights, and what is free
    gpu_parts: tuple[GpuPart, ...] = ()  # of the GPUs, the first layers' first; none without a GPU
    warnings: tuple[str, ...] = ()
    refusal: Refusal | None = None
    # With the weights that every token uses in the next finer and coarser type, where that was the plan's choice
    finer: "Plan | None" = None
    coarser: "Plan | None" = None

    @property
    def sizes(self) -> ModelSizes:
        """In the types that weights get here."""
        return self.situation.sizes.with_dense_type(self.dense_type)

    @property
    def hardware(self) -> Hardware:
        return self.situation.hardware

    @property
    def limits(self) -> Options:
        return self.situation.limits

    @property
    def has_ram_slots(self) -> bool:
        """RAM does not hold all experts: it has slots for some of them, and what VRAM holds needs none."""
        return self.disk_expert_bytes > 0 or 0 < self.ram_expert_bytes < self.sizes.expert_bytes

    @property
    def ram_budget_bytes(self) -> int | None:
        """RAM for experts where not all of them fit there; None: they do."""
        return self.ram_expert_bytes if self.has_ram_slots else None

    def fits_in(self, place: Place) -> bool:
        """Whether the place holds its rows; one without a budget holds any."""
        return all(self.budget_bytes(budget) <= budget.have_bytes for budget in self.budgets if budget.place == place)

    def budget_bytes(self, budget: Budget) -> int:
        """What the rows take of it."""
        return sum(row.num_bytes for row in self.rows if (row.place, row.gpu) == (budget.place, budget.gpu))

    def budget_of(self, place: Place, gpu: int = 0) -> Budget:
        return next(budget for budget in self.budgets if (budget.place, budget.gpu) == (place, gpu))

    def name_of(self, place: Place, gpu: int = 0) -> str:
        """`VRAM 1` where there are several GPUs."""
        return f"{place} {gpu}" if place == "VRAM" and len(self.gpu_parts) > 1 else place

    def of_gpu(self, number: int) -> "Plan":
        """What is allocated for the layers of this GPU: their slots, and their share of what RAM has for experts."""
        part, ram_bytes, config = self.gpu_parts[number], self.ram_expert_bytes, self.sizes.config
        if self.has_ram_slots:
            num_routed = sum(layer >= config.num_dense_layers for layer in part.layers)
            ram_bytes = ram_bytes * num_routed // config.num_moe_layers
        return replace(self, num_vram_slots=part.num_slots, ram_expert_bytes=ram_bytes)

    def decode_at(self, depth: float, num_sequences: int = 1) -> Forecast:
        """Decode of several sequences together, each with so many earlier tokens."""
        return forecast_decode(self.sizes, replace(self.split, depth=depth, num_sequences=num_sequences), self.rates)

    def place_bytes(self, place: Place) -> int:
        return sum(row.num_bytes for row in self.rows if row.place == place)

    def have_bytes(self, place: Place) -> int:
        return sum(budget.have_bytes for budget in self.budgets if budget.place == place)

    def part_bytes(self, place: Place, part: str) -> int:
        return sum(row.num_bytes for row in self.rows if (row.place, row.part) == (place, part))

    @property
    def process_bytes(self) -> int:
        """RAM that the process comes to hold when every weight and the whole context has been used."""
        return self.place_bytes("RAM") - self.part_bytes("RAM", MARGIN)

    def require(self) -> "Plan":
        """Raises KimiLiteError where the plan cannot be; returns itself otherwise."""
        if self.refusal:
            raise KimiLiteError(self.refusal.problem, self.refusal.hint)
        return self

    def to_json(self) -> dict:
        """JSON-ready: everything that the tables show, in bytes, bytes/s and tokens/s. A refused plan has no speeds."""
        plain = (
            *("context_length", "is_on_gpu", "dense_type", "num_cache_pages", "num_spill_pages", "num_vram_slots"),
            *(
                "ram_expert_bytes",
                "disk_expert_bytes",
                "has_ram_slots",
                "prompt_chunk_tokens",
                "num_threads",
                "bottleneck",
                "verdict",
            ),
        )
        speeds = ("decode", "decode_full", "prompt")
        return {
            "model": self.sizes.config.name,
            "types": self.sizes.label,
            "weights_bytes": self.sizes.total_bytes,
            "kv_dtype": self.limits.kv_dtype,
            "num_sequences": self.situation.num_running,
            "slot_bytes": self.sizes.slot_bytes,
            "num_experts": self.sizes.num_experts,
            "process_bytes": self.process_bytes,
            "hardware": hardware_json(self.hardware),
            "rows": [asdict(row) for row in self.rows],
            "budgets": [asdict(budget) for budget in self.budgets],
            **{name: getattr(self, name) for name in plain},
            "rates": asdict(self.rates),
            **{name: None if self.refusal else asdict(getattr(self, name)) for name in speeds},
            "gpu_parts": [
                {"first_layer": part.layers.start, "num_layers": len(part.layers), "num_slots": part.num_slots}
                for part in self.gpu_parts
            ],
            "memory_use": self.memory_use if self.hardware.has_nodes else None,
            "node_weights_bytes": {number: need for number, (need, _) in self.node_bytes.items()},
            "warnings": list(self.warnings),
            "refusal": asdict(self.refusal) if self.refusal else None,
        }


def hardware_json(hardware: Hardware) -> dict:
    """JSON-ready."""
    gpu, disk = hardware.gpu, hardware.disk
    plain = (
        *("cpu_name", "num_cores", "isa", "ram_total_bytes", "ram_free_bytes", "ram_bytes_s", "clock_hz"),
        *("cpu_macs_s", "is_described", "has_assumed_cpu"),
    )
    return {
        **{name: getattr(hardware, name) for name in plain},
        "cores": asdict(hardware.cores) if hardware.cores else None,
        "gpu": asdict(gpu) if gpu else None,
        "memory_policy": hardware.memory_policy,
        "nodes": [
            {"number": n.number, "num_cpus": len(n.cpus), "total_bytes": n.total_bytes, "free_bytes": n.free_bytes}
            for n in hardware.nodes
        ],
        "more_gpus": [asdict(other) for other in hardware.more_gpus],
        "disk": asdict(disk) | {"path": str(disk.path)} if disk else None,
        "origins": dict(hardware.origins),
    }
