"""The shape of a model and what it costs, for Kimi K2 to K2.6 and the rest of the `deepseek2` family.

    config = ModelConfig.from_metadata(store.metadata, store.path.name)

One architecture covers Kimi-K2, K2-Thinking, K2.5, K2.6, Moonlight and Kimi-VL's language model (no query compression),
DeepSeek-V2-Lite (softmax routing), DeepSeek-V3 and R1 (group-limited routing). The costs are here, and only here, so
that the planner, the benchmark and the documentation cannot disagree.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Literal

from kimi_lite.arch import mla, rope
from kimi_lite.arch.architecture import REQUIRED, Architecture, Field, architectures, find_architecture
from kimi_lite.arch.reader import METADATA_HINT, Reader, shown
from kimi_lite.arch.rope import RopeConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import Value, boolean, f32, u32

_ATTENTION = {"mla": mla}  # by Architecture.attention: the code of its sizes in files
_MAY_BE_ZERO = frozenset({
    "q_lora_rank", "num_dense_layers", "num_experts", "num_experts_used", "num_shared_experts",
    "expert_feed_forward_size",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the program knows about a model before it reads a weight. A contradiction raises KimiLiteError."""

    architecture: str
    name: str
    num_layers: int  # without the next-token-prediction layers that some files carry after the last
    hidden_size: int
    num_heads: int
    q_lora_rank: int  # 0: queries come from one matrix, `attn_q`
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    feed_forward_size: int  # of the dense layers
    num_dense_layers: int  # they come first
    num_experts: int  # 0: every layer is dense
    num_experts_used: int
    num_shared_experts: int
    expert_feed_forward_size: int
    expert_weights_scale: float
    is_expert_weights_norm: bool
    expert_gating: Literal["softmax", "sigmoid"]
    num_expert_groups: int
    num_expert_groups_used: int
    rms_norm_eps: float
    vocab_size: int
    context_length: int
    rope: RopeConfig

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], source: str = "the model") -> "ModelConfig":
        """From the metadata of a GGUF file; `source` (the file's name) starts every sentence. Raises KimiLiteError."""
        architecture = _architecture(metadata, source)
        read = Reader(metadata, f"{architecture.name}.", source)
        _check_neutral(architecture, read)
        values = _read_fields(architecture, read)
        num_blocks = values["num_layers"]
        values["num_layers"] -= read.integer("nextn_predict_layers", 0, num_blocks - 1, default=0)
        name = "".join(filter(str.isprintable, str(metadata.get("general.name", ""))[:80]))  # it will be shown
        sizes = _ATTENTION[architecture.attention].read_metadata(read)
        return cls._checked(
            source, architecture=architecture.name, name=name, rope=rope.read_metadata(read), **values, **sizes
        )

    @classmethod
    def from_json(
        cls, content: Mapping[str, object], architecture: Architecture, name: str, source: str, hint: str
    ) -> "ModelConfig":
        """From the text model's fields of a config.json. Raises KimiLiteError."""
        read = Reader(content, "", source, hint, is_null_missing=True)
        values = {}
        for field in architecture.fields:
            values[field.name] = _read_field(field, field.json, read, values, {c: c for c in field.choices.values()})
        _normalise_groups(values)
        sizes = _ATTENTION[architecture.attention].read_json(read)
        positions = rope.read_json(content, source, hint)
        return cls._checked(source, architecture=architecture.name, name=name, rope=positions, **values, **sizes)

    @classmethod
    def _checked(cls, source: str, **values: object) -> "ModelConfig":
        try:
            return cls(**values)
        except KimiLiteError as error:
            raise KimiLiteError(f"{source}: {error.message}", error.hint) from error

    @property
    def table(self) -> Architecture:
        """The architecture's table."""
        found = find_architecture(self.architecture)
        assert found, self.architecture
        return found

    def metadata(self) -> dict[str, Value]:
        """The keys below `general.architecture`'s prefix, with llama.cpp's exact types."""
        keys = {field.key: _value_of(field, getattr(self, field.name)) for field in self.table.fields}
        keys |= _ATTENTION[self.table.attention].metadata(self) | rope.metadata(self)
        return {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def to_json(self) -> dict[str, object]:
        """The fields of a config.json, in the words of the architecture's first model type."""
        keys = {field.json: getattr(self, field.name) for field in self.table.fields}
        return keys | _ATTENTION[self.table.attention].json_fields(self) | rope.json_fields(self.rope)

    def __post_init__(self) -> None:
        _check_relations(self)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_latent_size(self) -> int:
        """Values that the cache keeps for each token and layer: the latent and the rotated key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head), times YaRN's (0.1 * mscale_all_dim * ln(factor) + 1)^2 (modeling_deepseek.py,
        DeepseekV3Attention)."""
        mscale = 1.0
        if self.rope.scaling == "yarn" and self.rope.factor > 1:
            mscale += self.rope.log_multiplier * math.log(self.rope.factor)
        return mscale * mscale / math.sqrt(self.qk_head_dim)

    def kv_bytes_per_token(self, bytes_per_value: float) -> float:
        return self.num_layers * self.kv_latent_size * bytes_per_value

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def kv_head_dim(self) -> int:
        """Rows of one head in the joint matrix of keys and values."""
        return self.qk_nope_head_dim + self.v_head_dim

    @property
    def has_selection_bias(self) -> bool:
        """Whether a conversion may find a bias that chooses experts and weighs nothing."""
        return self.expert_gating == "sigmoid"

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert: gate, up and down."""
        per_layer = self.num_moe_layers * self.num_experts
        return self.routed_parameters // per_layer if per_layer else 0

    @property
    def routed_parameters(self) -> int:
        """Weights of all routed experts of all layers: what does not fit into a GPU."""
        return self.table.num_weights(self, "routed")

    @property
    def shared_parameters(self) -> int:
        """Weights of the shared experts of all layers."""
        return self.table.num_weights(self, "shared")

    @property
    def other_parameters(self) -> int:
        """Everything that every token uses: attention, dense layers, shared experts, routers, norms, embedding and
        head."""
        return self.table.num_weights(self, "embedding", "head", "norm", "attention", "dense", "router", "shared")

    @property
    def total_parameters(self) -> int:
        return self.routed_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Weights that one token multiplies with: all the others and its own experts, less the embedding it only looks
        up."""
        routed = self.num_moe_layers * self.num_experts_used * self.expert_parameters
        return routed + self.other_parameters - self.table.num_weights(self, "embedding")


def _architecture(metadata: Mapping[str, object], source: str) -> Architecture:
    name, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if name is None:
        raise KimiLiteError(f"{source}: the metadata key general.architecture is missing.", METADATA_HINT)
    if not isinstance(kind, str) or kind != "model":
        problem = f"{source}: general.type is {shown(kind)}, and a language model says 'model'"
        raise KimiLiteError(f"{problem}.", "Open the model itself; a vision part (mmproj) lies next to it.")
    found = find_architecture(name) if isinstance(name, str) else None
    if found is None:
        known = [repr(known.name) for known in architectures()]
        which = f"{known[0]} is the one that runs here" if len(known) == 1 else f"{', '.join(known)} run here"
        families = "; ".join(known.family for known in architectures())
        problem = f"{source}: general.architecture is {shown(name)}, and {which}"
        raise KimiLiteError(f"{problem}.", f"That is {families}. Other models run in llama.cpp.")
    return found


def _check_neutral(architecture: Architecture, read: Reader) -> None:
    """Keys that change what a model computes, in ways that the architecture's code does not know."""
    for key, allowed in architecture.neutral.items():
        if read.has(key) and (value := read.value(key)) not in allowed:
            raise read.error(key, value, f"{' or '.join(map(str, allowed))}: other values are not computed here")


def _read_fields(architecture: Architecture, read: Reader) -> dict[str, object]:
    values: dict[str, object] = {}
    for field in architecture.fields:
        if field.name == "vocab_size":
            values[field.name] = _vocab_size(field, read)
        else:
            values[field.name] = _read_field(field, field.key, read, values, field.choices)
    _normalise_groups(values)
    return values


def _normalise_groups(values: dict[str, object]) -> None:
    """Without groups there is nothing to choose among them, whatever a file says."""
    if values["num_expert_groups"] == 1:
        values["num_expert_groups_used"] = 1


def _read_field(field: Field, key: str, read: Reader, values: Mapping, choices: Mapping) -> object:
    """A value of its kind between its bounds. `values`: what was read before, on which bounds and defaults may
    depend."""
    default = field.missing(values) if callable(field.missing) else field.missing
    if not read.has(key) or (field.off is not None and _is_off(read.value(key), field.off)):
        if default is not REQUIRED:
            return default
        if not read.has(key):
            read.value(key)  # raises
    low = field.low(values) if callable(field.low) else field.low
    high = field.high(values) if callable(field.high) else field.high
    if field.kind == "whole":
        return read.integer(key, low, high)
    if field.kind == "number":
        return read.number(key, low, high)
    return read.flag(key) if field.kind == "flag" else read.choice(key, choices)


def _is_off(value: object, off: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == off


def _vocab_size(field: Field, read: Reader) -> int:
    """The stated size, else the number of tokens (as llama.cpp does)."""
    tokens = read.values.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) and tokens else None
    size = read.integer(field.key, 1, field.high, default=num_tokens)
    if num_tokens is not None and num_tokens > size:
        raise read.error(field.key, size, f"at least the {num_tokens:,} entries of tokenizer.ggml.tokens")
    return size


def _value_of(field: Field, value: object) -> Value:
    if field.kind == "choice":
        return u32(next(number for number, meaning in field.choices.items() if meaning == value))
    return {"whole": u32, "number": f32, "flag": boolean}[field.kind](value)


def _check_relations(config: ModelConfig) -> None:
    """What must hold between the fields, wherever they came from: (field, does it hold, what it must be)."""
    c, rope, has_experts = config, config.rope, config.num_experts > 0
    num_groups = max(1, c.num_expert_groups)
    group_size = c.num_experts // num_groups
    reachable = group_size * c.num_expert_groups_used
    numbers = [field.name for field in fields(c) if type(getattr(c, field.name)) in (int, float)]
    rules = [
        *(
            (name, getattr(c, name) > 0 or (getattr(c, name) == 0 and name in _MAY_BE_ZERO), "above 0")
            for name in numbers
        ),
        ("num_dense_layers", c.num_dense_layers <= c.num_layers, f"at most num_layers, {c.num_layers:,}"),
        ("num_experts", has_experts or not c.num_moe_layers, f"above 0, as {c.num_moe_layers:,} layers are not dense"),
        ("num_experts_used", c.num_experts_used <= c.num_experts, f"at most num_experts, {c.num_experts:,}"),
        ("num_experts_used", c.num_experts_used > 0 or not has_experts, "above 0"),
        ("num_expert_groups", c.num_experts % num_groups == 0, f"a divisor of num_experts, {c.num_experts:,}"),
        ("num_expert_groups", num_groups == 1 or group_size > 1, f"at most half of num_experts, {c.num_experts:,}"),
        (
            "num_expert_groups_used",
            c.num_expert_groups_used <= num_groups,
            f"at most num_expert_groups, {num_groups:,}",
        ),
        (
            "num_experts_used",
            c.num_experts_used <= reachable,
            f"at most {reachable:,}, the experts of the groups in use",
        ),
        ("qk_rope_head_dim", c.qk_rope_head_dim % 2 == 0, "even"),
        ("rope.freq_base", rope.freq_base > 1, "above 1"),
        ("rope.factor", rope.factor > 0, "above 0"),
        ("rope.original_context_length", rope.original_context_length > 0 or rope.scaling != "yarn", "above 0"),
        ("rope.beta_fast", rope.beta_fast >= rope.beta_slow > 0, f"at least beta_slow, {rope.beta_slow:g}"),
    ]
    for name, holds, need in rules:
        if not holds:
            raise KimiLiteError(f"{name} is {attrgetter(name)(c):,}, and must be {need}.", METADATA_HINT)
