"""What a token costs: the bytes that decoding reads. Pure arithmetic over a model's sizes, so that every plan and
`tools.bench` agree. Decode speed is bounded by these bytes over the bandwidth of the place where they lie.
"""

from dataclasses import dataclass

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import ModelSizes


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
    sizes: ModelSizes, depth: float, value_bytes: float, num_sequences: int = 1, is_on_gpu: bool = False
) -> DecodeCost:
    """One step of `num_sequences` sequences with `depth` earlier tokens each; `value_bytes`: of a value in the cache.

    Sequences are taken to choose their experts independently and uniformly; the embedding is one row for each. On a
    gpu the rest of the weights has the types it gets there.
    """
    resident = (sizes.gpu_dense_bytes if is_on_gpu else sizes.dense_bytes) + num_sequences * sizes.embedding_row_bytes
    share = expected_expert_share(sizes.config, num_sequences)
    cache = num_sequences * depth * sizes.config.kv_bytes_per_token(value_bytes)
    return DecodeCost(num_sequences, resident, sizes.expert_bytes * share, cache)


def expected_expert_share(config: ModelConfig, num_tokens: int) -> float:
    """Share of a layer's routed experts that `num_tokens` tokens need together, if each chooses independently and
    uniformly."""
    if not config.num_experts:
        return 0.0
    return 1 - (1 - config.num_experts_used / config.num_experts) ** num_tokens
