"""What an architecture is: plain data that says how its numbers are called in GGUF and in config.json, which tensors it
has, in which shapes, and what they are made of in a Hugging Face checkpoint. `arch.deepseek2` is such a table.

Everything that depends on an architecture derives from its table: reading and checking metadata (`arch.config`),
shapes and checks (`arch.tensors`), sizes (`arch.sizes`), config.json (`arch.checkpoint`), what `quantize` writes.

    register(Architecture(name="another", ...))
    find_architecture("deepseek2").rows
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kimi_lite.arch.config import ModelConfig

Attention = Literal["mla"]  # the kinds that model/ has code for
Kind = Literal["whole", "number", "flag", "choice"]
Part = Literal["embedding", "head", "norm", "attention", "dense", "router", "shared", "routed"]
Layers = Literal["none", "every", "dense", "moe"]  # which layers have the tensor; none: it is outside the layers
Cut = Literal["whole", "keys", "values", "keys and values", "experts"]  # of a checkpoint's weight
REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Field:
    """One number of ModelConfig. `key` is the GGUF key below the architecture's prefix, `json` the field of
    config.json; `low`, `high`, `missing` may be functions of the fields read so far. `off` is a value that says the
    same as a missing key."""

    name: str
    key: str
    json: str
    kind: Kind = "whole"
    low: float | Callable[[Mapping], float] = 1
    high: float | Callable[[Mapping], float] = 1 << 20
    missing: object = REQUIRED  # what a file without it means; REQUIRED refuses it
    off: object = None
    choices: Mapping[int, str] = field(default_factory=dict)  # GGUF's numbers


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor of the architecture.

    `name` is the name by which the model's code asks for it, without "blk.N."; `file` its name in GGUF files where that
    is another. Each axis of `shape` (numpy order, the last is the input) is a product of fields of ModelConfig, such as
    "num_heads * qk_head_dim". `weight` is the checkpoint's name below "model.layers.N.", "{expert}" standing for a
    number; `stacked` names the tensor that holds all experts instead, and which of how many parts of its rows.
    """

    name: str
    shape: tuple[str, ...]
    weight: str
    part: Part
    layers: Layers = "every"
    when: str = ""  # a field of ModelConfig that must be set, or "not FIELD"
    cut: Cut = "whole"
    stacked: tuple[str, int, int] | None = None
    file: str = ""
    is_exact: bool = False  # always float32: norms, routers, biases
    is_optional: bool = False  # a file may lack it; `when` says who has it
    replaces: tuple[str, ...] = ()  # the rows that a file with this one may lack

    @property
    def file_name(self) -> str:
        return self.file or self.name

    def shape_in(self, config: "ModelConfig") -> tuple[int, ...]:
        return tuple(prod(_factor(config, factor) for factor in axis.split(" * ")) for axis in self.shape)

    def applies(self, config: "ModelConfig") -> bool:
        """Whether a model of this configuration has it, in the layers where it belongs."""
        if not self.when:
            return True
        return bool(getattr(config, self.when.removeprefix("not "))) != self.when.startswith("not ")

    def num_layers(self, config: "ModelConfig") -> int:
        """How often a model has it."""
        every, dense = config.num_layers, config.num_dense_layers
        return {"none": 1, "every": every, "dense": dense, "moe": every - dense}[self.layers]

    def is_in_layer(self, config: "ModelConfig", layer: int) -> bool:
        is_dense = layer < config.num_dense_layers
        return self.layers == "every" or self.layers == ("dense" if is_dense else "moe")


@dataclass(frozen=True)
class Architecture:
    """`name` is GGUF's general.architecture and the prefix of its keys. `model_types` are those of config.json, with
    what a missing field means there; `wrappers` are types whose text model lies in `text_config`. `fixed` are fields
    of config.json with the only values that the architecture can express, `neutral` the same for GGUF keys."""

    name: str
    family: str  # for people
    attention: Attention
    fields: tuple[Field, ...]
    rows: tuple[Row, ...]
    model_types: Mapping[str, Mapping[str, object]]
    wrappers: tuple[str, ...] = ()
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    neutral: Mapping[str, tuple] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)  # pattern of other tensors of a file -> why they may stay
    unused_weights: Mapping[str, str] = field(default_factory=dict)  # the same of a checkpoint

    @cached_property
    def by_name(self) -> Mapping[str, Row]:
        return {row.name: row for row in self.rows}

    @property
    def conversion_rows(self) -> Iterator[Row]:
        """The rows that a conversion writes: those with a weight in a checkpoint."""
        return (row for row in self.rows if row.weight)

    def num_weights(self, config: "ModelConfig", *parts: Part) -> int:
        """Of all layers together, in these parts of a converted model."""
        known = self._known_numbers.get((config, parts))
        if known is None:
            rows = (row for row in self.conversion_rows if row.part in parts and row.applies(config))
            known = sum(row.num_layers(config) * prod(row.shape_in(config)) for row in rows)
            self._known_numbers[config, parts] = known
        return known

    @cached_property
    def _known_numbers(self) -> dict[tuple["ModelConfig", tuple[Part, ...]], int]:
        """A plan asks thousands of times."""
        return {}


def _factor(config: "ModelConfig", factor: str) -> int:
    return int(factor) if factor.isdecimal() else getattr(config, factor)


_REGISTRY: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Makes it known; a later one of the same name replaces it."""
    _REGISTRY[architecture.name] = architecture
    forget_tables()
    return architecture


def forget_tables() -> None:
    """What is derived from the registry is derived anew."""
    _by_name.cache_clear()
    _rows.cache_clear()


def architectures() -> tuple[Architecture, ...]:
    """All that are known: ours, and what was registered."""
    return tuple(_by_name().values())


def find_architecture(name: object) -> Architecture | None:
    """The one that GGUF files call `name`."""
    return _by_name().get(name) if isinstance(name, str) else None


@cache
def _by_name() -> Mapping[str, Architecture]:
    from kimi_lite.arch.deepseek2 import DEEPSEEK2  # it imports this module

    return {DEEPSEEK2.name: DEEPSEEK2} | _REGISTRY


def find_row(name: str) -> Row | None:
    """The row of a tensor by the name that the model's code uses, with or without "blk.N."."""
    return _rows().get(role_of(name))


@cache
def _rows() -> Mapping[str, Row]:
    """Of all architectures; of the first that has it, where several have a tensor."""
    return {name: row for known in reversed(architectures()) for name, row in known.by_name.items()}


def role_of(name: str) -> str:
    """The name without its layer: "attn_output.weight" of "blk.7.attn_output.weight"."""
    layer = layer_of(name)
    return name if layer < 0 else name.split(".", 2)[2]


def layer_of(name: str) -> int:
    """7 of "blk.7.attn_output.weight", -1 of a tensor outside the layers."""
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if head == "blk" and number.isascii() and number.isdecimal() else -1
