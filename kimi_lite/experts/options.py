"""How the disk tier is to work: what the loader decides and `model.cpu.tiers` follows. Nothing heavy is imported
here."""

from dataclasses import dataclass
from pathlib import Path

DEFAULT_READERS = 8  # threads: a disk needs several reads under way


@dataclass(frozen=True, slots=True)
class TierOptions:
    """`budget_bytes` is what the slots of routed experts may take."""

    budget_bytes: int
    cache_bias: float = 0.0  # what an expert that is there gains in the router's choice
    num_readers: int = DEFAULT_READERS
    is_direct: bool = True  # past the page cache, where that can be
    heat_path: Path | None = None  # where heat is kept between runs; None: nowhere
    is_loading_all: bool = False  # every expert is read before the first token: `budget_bytes` has room for all
    is_locked: bool = False  # slots are kept in RAM whatever else needs memory
