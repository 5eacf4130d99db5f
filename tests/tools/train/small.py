"""A model of the architecture that trains in milliseconds."""

from kimi_lite.arch.config import ModelConfig, RopeConfig
from kimi_lite.tools.train.model import Model

SMALL = ModelConfig(
    architecture="deepseek2", name="small", num_layers=3, hidden_size=32, num_heads=2, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, feed_forward_size=64, num_dense_layers=1, num_experts=4,
    num_experts_used=2, num_shared_experts=1, expert_feed_forward_size=16, expert_weights_scale=2.0,
    is_expert_weights_norm=True, expert_gating="sigmoid", num_expert_groups=1, num_expert_groups_used=1,
    rms_norm_eps=1e-6, vocab_size=300, context_length=256, rope=RopeConfig(10_000.0),
)  # fmt: skip


def small_model(seed: int = 0) -> Model:
    return Model(SMALL).initialize(seed)
