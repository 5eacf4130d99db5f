"""Kimi K2.5's dimensions, and slices of it: the same model with fewer layers, experts or tokens.

Numbers: config.json of moonshotai/Kimi-K2.5, `text_config`. For `tools.make.slice` (files) and `tools.bench.predict`
(costs).
"""

from dataclasses import dataclass

from kimi_lite.arch.config import ModelConfig
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.source.metadata import model_metadata

K25_VOCAB_SIZE = 163_840


@dataclass(frozen=True, slots=True)
class KimiDims:
    """What `ModelConfig` calls the same; tests make it small."""

    num_dense_layers: int = 1
    num_expert_layers: int = 60
    num_experts: int = 384
    vocab_size: int = K25_VOCAB_SIZE
    hidden_size: int = 7168
    feed_forward_size: int = 18_432
    expert_feed_forward_size: int = 2048
    num_heads: int = 64
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    def to_checkpoint_config(self) -> dict[str, object]:
        """The fields of a config.json, as `quantize.source.metadata` reads them."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.feed_forward_size,
            "moe_intermediate_size": self.expert_feed_forward_size,
            "num_hidden_layers": self.num_dense_layers + self.num_expert_layers,
            "first_k_dense_replace": self.num_dense_layers,
            "num_attention_heads": self.num_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "n_routed_experts": self.num_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.827,
            "scoring_func": "sigmoid",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262_144,
            "rope_theta": 50_000.0,
            "rope_scaling": {
                **{"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096},
                **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            },
        }

    def to_model_config(self) -> ModelConfig:
        """The runtime's view of the same metadata. Raises KimiLiteError where the dimensions contradict each other."""
        metadata = model_metadata(self.to_checkpoint_config(), "Kimi K2.5 slice", BY_NAME["Q8_0"])
        return ModelConfig.from_metadata({key: value.value for key, value in metadata.items()})
