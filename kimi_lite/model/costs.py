"""What a token costs: the bytes that decoding reads. Pure arithmetic over (configuration, tensors), so that every plan and
`tools.bench` agree. Decode speed is bounded by these bytes over the bandwidth of the place where they lie.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kimi_lite.memory.gguf_store import TensorView
from kimi_lite.model.config import ModelConfig

_ROUTED = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_gate_up_exps.weight", "ffn_down_exps.weight")


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Bytes that one decode step reads, for all its sequences together."""

    num_sequences: int
    resident_bytes: float  # what every step reads once: attention, dense layers, shared experts, routers, norms, head
    expert_bytes: float  # routed experts, each once however many sequences chose it
    cache_bytes: float  # latents of all earlier positions

    @property
    def step_bytes(self) -> float:
        return self.resident_bytes + self.expert_bytes + self.cache_bytes

    @property
    def token_bytes(self) -> float:
        return self.step_bytes / self.num_sequences


def decode_cost(
    config: ModelConfig, tensors: Mapping[str, TensorView], depth: float, value_bytes: float, num_sequences: int = 1
) -> DecodeCost:
    """One step of `num_sequences` sequences with `depth` earlier tokens each; `value_bytes`: of a value in the cache.

    Sequences are taken to choose their experts independently and uniformly; the embedding is one row for each.
    """
    resident, routed = 0.0, 0.0
    for name, tensor in tensors.items():
        if name == "token_embd.weight":
            resident += num_sequences * tensor.data.shape[-1]
        elif name.endswith(_ROUTED):
            routed += tensor.num_bytes
        else:
            resident += tensor.num_bytes
    share = expected_expert_share(config, num_sequences)
    cache = num_sequences * depth * config.kv_bytes_per_token(value_bytes)
    return DecodeCost(num_sequences, resident, routed * share, cache)


def expected_expert_share(config: ModelConfig, num_tokens: int) -> float:
    """Share of a layer's routed experts that `num_tokens` tokens need together, if each chooses independently and uniformly."""
    if not config.num_experts:
        return 0.0
    return 1 - (1 - config.num_experts_used / config.num_experts) ** num_tokens
