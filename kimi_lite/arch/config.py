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

from kimi_lite.arch.deepseek2 import METADATA_HINT, read_deepseek2
from kimi_lite.errors import KimiLiteError

_MAY_BE_ZERO = frozenset({
    "q_lora_rank", "num_dense_layers", "num_experts", "num_experts_used", "num_shared_experts",
    "expert_feed_forward_size",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position encoding; everything after `scaling` matters only for the scaling that uses it."""

    freq_base: float
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_context_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0  # 0.1 * mscale_all_dim of the original config.json


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
        values = read_deepseek2(metadata, source)
        try:
            return cls(**values | {"rope": RopeConfig(**values["rope"])})
        except KimiLiteError as error:
            raise KimiLiteError(f"{source}: {error.message}", error.hint) from error

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
    def expert_parameters(self) -> int:
        """Weights of one routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.expert_feed_forward_size

    @property
    def routed_parameters(self) -> int:
        """Weights of all routed experts of all layers: what does not fit beside the GPU."""
        return self.num_moe_layers * self.num_experts * self.expert_parameters

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's attention, with its two inner norms and without `attn_norm`."""
        query_inputs = self.q_lora_rank or self.hidden_size
        compress_query = self.q_lora_rank * (self.hidden_size + 1)
        compress_kv = self.kv_latent_size * self.hidden_size + self.kv_lora_rank
        expand = self.qk_head_dim * query_inputs + (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank
        return compress_query + compress_kv + self.num_heads * (expand + self.v_head_dim * self.hidden_size)

    @property
    def other_parameters(self) -> int:
        """Everything that every token uses: attention, dense layers, shared experts, routers, norms, embedding and
        head."""
        dense = 3 * self.hidden_size * self.feed_forward_size
        selection_bias = self.num_experts if self.expert_gating == "sigmoid" else 0
        router = self.num_experts * self.hidden_size + selection_bias
        shared = self.num_shared_experts * self.expert_parameters
        every_layer = self.attention_parameters + 2 * self.hidden_size
        embedding_and_head = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        moe = self.num_moe_layers * (router + shared)
        return self.num_layers * every_layer + self.num_dense_layers * dense + moe + embedding_and_head

    @property
    def total_parameters(self) -> int:
        return self.routed_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Weights that one token multiplies with: all the others and its own experts, less the embedding it only looks
        up."""
        routed = self.num_moe_layers * self.num_experts_used * self.expert_parameters
        return routed + self.other_parameters - self.vocab_size * self.hidden_size


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
