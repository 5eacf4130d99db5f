"""What a plan says: rows of bytes by place, budgets, slots, ceilings, a verdict. Made by `plan.plan`, shown by
`apps`."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.probe import Hardware
from kimi_lite.options import Options
from kimi_lite.plan.speed import Expectation, Rates, Speed, Split, decode_speed

Place = Literal["VRAM", "RAM", "disk"]
Verdict = Literal["fits", "tight", "from disk", "refused"]

# Parts, as the rows call them.
DENSE, EMBEDDING, KV, VISION, EXPERTS = "dense weights", "embedding", "KV cache", "vision", "experts"
WORK, PINNED, PROGRAM, SLOTS, MARGIN = "work", "pinned buffers", "program", "expert slots", "margin"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing in one place."""

    place: Place
    part: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What a place may take, and what set that: `free` memory, or the user's flag."""

    place: Place
    have_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why it cannot run: `problem` has need and have, `remedies` are (flags or action, what they give)."""

    problem: str
    remedies: tuple[tuple[str, str], ...]

    @property
    def hint(self) -> str:
        return "\n".join(f"Try {action}: {effect}." for action, effect in self.remedies)


@dataclass(frozen=True, slots=True)
class Plan:
    """`rows` add up to what each place holds. Where `refusal` is set, rows are what would be needed."""

    sizes: ModelSizes
    hardware: Hardware
    limits: Options
    context_length: int
    is_on_gpu: bool
    rows: tuple[Row, ...]
    budgets: tuple[Budget, ...]
    num_vram_slots: int  # experts that have a place on the GPU
    ram_expert_bytes: int  # experts that memory holds
    disk_expert_bytes: int  # experts that do not fit, read from disk when they are chosen
    prompt_chunk_tokens: int
    num_threads: int
    split: Split
    rates: Rates
    decode: Speed  # a ceiling: no hits in the GPU's cache, experts chosen uniformly, an empty context
    decode_full: Speed  # the same at the end of the context
    prompt: Speed
    expert_pass_s: float  # in which all experts would cross the bus; 0 without a GPU
    expected: Expectation | None  # decode with the hits of published runs
    first_limit: str
    verdict: Verdict
    refusal: Refusal | None = None

    def decode_at(self, depth: float, num_sequences: int = 1) -> Speed:
        """The ceiling for several sequences together, each with so many earlier tokens."""
        return decode_speed(self.sizes, replace(self.split, depth=depth, num_sequences=num_sequences), self.rates)

    def place_bytes(self, place: Place) -> int:
        return sum(row.num_bytes for row in self.rows if row.place == place)

    def have_bytes(self, place: Place) -> int:
        return next((budget.have_bytes for budget in self.budgets if budget.place == place), 0)

    def part_bytes(self, place: Place, part: str) -> int:
        return sum(row.num_bytes for row in self.rows if (row.place, row.part) == (place, part))

    @property
    def process_bytes(self) -> int:
        """Memory that the process comes to hold when every weight and the whole context has been used."""
        return self.place_bytes("RAM") - self.part_bytes("RAM", MARGIN)

    def require(self) -> "Plan":
        """Raises KimiLiteError where the plan cannot be; returns itself otherwise."""
        if self.refusal:
            raise KimiLiteError(self.refusal.problem, self.refusal.hint)
        return self

    def to_json(self) -> dict:
        """JSON-ready: everything that the tables show, in bytes, bytes/s and tokens/s."""
        plain = (
            "context_length",
            "is_on_gpu",
            "num_vram_slots",
            "ram_expert_bytes",
            "disk_expert_bytes",
            "prompt_chunk_tokens",
        )
        more = ("num_threads", "expert_pass_s", "first_limit", "verdict")
        nested = ("rates", "decode", "decode_full", "prompt", "expected", "refusal")
        return {
            "model": self.sizes.config.name,
            "types": self.sizes.label,
            "weights_bytes": self.sizes.total_bytes,
            "kv_dtype": self.limits.kv_dtype,
            "slot_bytes": self.sizes.slot_bytes,
            "num_experts": self.sizes.num_experts,
            "process_bytes": self.process_bytes,
            "hardware": hardware_json(self.hardware),
            "rows": [asdict(row) for row in self.rows],
            "budgets": [asdict(budget) for budget in self.budgets],
            **{name: getattr(self, name) for name in (*plain, *more)},
            **{name: asdict(value) if (value := getattr(self, name)) else None for name in nested},
        }


def hardware_json(hardware: Hardware) -> dict:
    """JSON-ready."""
    gpu, disk = hardware.gpu, hardware.disk
    plain = (
        "cpu_name",
        "num_cores",
        "isa",
        "ram_total_bytes",
        "ram_free_bytes",
        "ram_bytes_s",
        "clock_hz",
        "is_described",
    )
    return {
        **{name: getattr(hardware, name) for name in plain},
        "gpu": asdict(gpu) if gpu else None,
        "disk": asdict(disk) | {"path": str(disk.path)} if disk else None,
        "origins": dict(hardware.origins),
    }
