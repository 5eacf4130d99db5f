"""What every stage is told, and how it tells what it found: plain data, importable where nothing is installed."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """From the command line to each stage's process, as JSON."""

    out: Path  # results and logs
    scratch: Path  # large files, in memory where that is large enough
    is_stand_in: bool = False  # CPU stand-in and interpreter, tiny sizes: the script itself is tried
    types: tuple[str, ...] = ()  # that kernels decode; empty: all
    expert_layers: int = 4  # of the slice
    is_small: bool = False  # kernels at tiny sizes on a GPU: each is run, none for long
    fault: str = ""  # "error", "hang", "crash" in place of the stage
    shard: int = 0  # of `num_shards` processes that divide a stage's cases
    num_shards: int = 1

    def sized(self, small: Any, full: Any) -> Any:
        """The stand-in's size of something, or a GPU's."""
        return small if self.is_stand_in else full

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"out": str(self.out), "scratch": str(self.scratch)})

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        fields = json.loads(text)
        paths = {name: Path(fields[name]) for name in ("out", "scratch")}
        return cls(**fields | paths | {"types": tuple(fields["types"])})


def tell(name: str, value: object = None, unit: str = "", is_ok: bool = True, **more: object) -> None:
    """One result: a line of JSON, at once, so that it is there whatever happens next."""
    line = {"name": name, "value": value, "unit": unit, "ok": bool(is_ok)} | more
    print(json.dumps(line, default=_plain), flush=True)


def _plain(value: object) -> object:
    """numpy's and torch's numbers as Python's."""
    return value.item() if hasattr(value, "item") else str(value)


def log(text: str) -> None:
    """For who looks into the stage's log."""
    print(text, file=sys.stderr, flush=True)
