"""The arithmetic that places a dense grouped-query Llama into the K2.5 architecture so that its function is kept.

Input: the weights of SmolLM2-135M under their llama.cpp names, float32. Output: tensors of a `deepseek2` GGUF. No
training. Let a = sqrt(576/768) and x^ the hidden state at unit RMS. Why each part works:

- Width. 576 is not a multiple of 256, so every width of the residual stream is padded with zeros to 768. The mean
  square over 768 is a^2 times that over 576, so an RMSNorm gives x^ / a; gains and the two latent projections carry the
  a back.
- Latents. `attn_q_a` and the latent rows of `attn_kv_a_mqa` are a [I 0]: their output is x^, whose RMS is one already,
  so the latent norms (weights one) change nothing, and the old projections move into `attn_q_b` and `attn_v_b`.
- Position. MLA has one rotary key for all heads, here of 192 dimensions: 96 pairs with frequencies theta^(-j/96).
  SmolLM2 has three key groups of 32 pairs at theta^(-i/32). Pair j = 3i + g holds pair i of group g: exact for g = 0,
  slowed by theta^(-1/96) = 0.887 and 0.787 for the others. Such a linear interpolation of position costs about one per
  cent of perplexity. A query head is zero outside its own group's pairs, so it sees its own keys alone.
- Scale. MLA divides scores by sqrt(32 + 192), the source by sqrt(64): queries are multiplied by sqrt(224/64).
- Experts. The 1536 neurons of a feed-forward are six slices of 256. One is the shared expert; each other is two equal
  routed experts, whose router rows are +100,000 r and -100,000 r for a random direction r. A sigmoid saturates there,
  so exactly one of each pair is chosen for each token, with weight 1/5 x 5 = 1: real routing that leaves the sum as it
  was.
"""

from collections.abc import Mapping

import numpy as np

from kimi_lite.arch.config import ModelConfig, RopeConfig

HIDDEN, PADDED, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, FFN = 576, 768, 30, 9, 3, 64, 1536
Q_LORA = KV_LORA = HIDDEN
NOPE, ROPE = 32, NUM_KV_HEADS * HEAD_DIM
NUM_EXPERTS, TOP_K, EXPERT_FFN = 10, 5, 256
ROUTER_GAIN = 100_000.0
SHRINK = np.float32((HIDDEN / PADDED) ** 0.5)  # a

CONFIG = ModelConfig(
    architecture="deepseek2",
    name="SmolLM2-135M-Instruct in the Kimi K2.5 architecture",
    num_layers=NUM_LAYERS,
    hidden_size=PADDED,
    num_heads=NUM_HEADS,
    q_lora_rank=Q_LORA,
    kv_lora_rank=KV_LORA,
    qk_nope_head_dim=NOPE,
    qk_rope_head_dim=ROPE,
    v_head_dim=HEAD_DIM,
    feed_forward_size=FFN,
    num_dense_layers=1,
    num_experts=NUM_EXPERTS,
    num_experts_used=TOP_K,
    num_shared_experts=1,
    expert_feed_forward_size=EXPERT_FFN,
    expert_weights_scale=float(TOP_K),
    is_expert_weights_norm=True,
    expert_gating="sigmoid",
    num_expert_groups=1,
    num_expert_groups_used=1,
    rms_norm_eps=1e-5,
    vocab_size=49152,
    context_length=8192,
    rope=RopeConfig(100_000.0),
)

Weights = Mapping[str, np.ndarray]  # a layer's tensors without their "blk.N." prefix, float32


def rehouse_globals(embedding: np.ndarray, output_norm: np.ndarray) -> dict[str, np.ndarray]:
    """The three tensors outside the layers, from the tied embedding (V, 576) and the last norm's gain (576,)."""
    wide = _widen(embedding)  # (V, 768)
    return {"token_embd.weight": wide, "output_norm.weight": _widen(output_norm * SHRINK), "output.weight": wide}


def rehouse_layer(layer: int, source: Weights) -> dict[str, np.ndarray]:
    """All tensors of one layer; layer 0 is dense, the others are mixtures of experts."""
    tensors = {"attn_norm.weight": np.ones(PADDED, np.float32), **_rehouse_attention(source)}
    tensors["ffn_norm.weight"] = _widen(source["ffn_norm.weight"] * SHRINK)
    gate, up, down = (source[f"ffn_{part}.weight"] for part in ("gate", "up", "down"))
    tensors |= _rehouse_dense(gate, up, down) if layer == 0 else _rehouse_experts(layer, gate, up, down)
    return {f"blk.{layer}.{name}": np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def _rehouse_attention(source: Weights) -> dict[str, np.ndarray]:
    """The norm's gain moves into the projections behind it. llama.cpp's Llama files already keep the two rows of a
    rotary pair next to each other, as this architecture wants them."""
    gain = source["attn_norm.weight"]
    q = (source["attn_q.weight"] * gain).reshape(NUM_HEADS, HEAD_DIM // 2, 2, HIDDEN)
    k = (source["attn_k.weight"] * gain).reshape(NUM_KV_HEADS, HEAD_DIM // 2, 2, HIDDEN)
    v = (source["attn_v.weight"] * gain).reshape(NUM_KV_HEADS, HEAD_DIM, HIDDEN)
    identity = _widen(np.eye(HIDDEN, dtype=np.float32)) * SHRINK  # (576, 768)
    q_rope = np.zeros((NUM_HEADS, HEAD_DIM // 2, NUM_KV_HEADS, 2, HIDDEN), np.float32)  # pair j = 3i + g
    group_of_head = np.arange(NUM_HEADS) // (NUM_HEADS // NUM_KV_HEADS)
    for head, group in enumerate(group_of_head):
        q_rope[head, :, group] = q[head] * ((NOPE + ROPE) / HEAD_DIM) ** 0.5
    q_nope = np.zeros((NUM_HEADS, NOPE, HIDDEN), np.float32)
    k_rope = np.moveaxis(k, 0, 1).reshape(ROPE, HIDDEN) * SHRINK  # (i, g, 2, 576) -> (192, 576)
    return {
        "attn_q_a.weight": identity,
        "attn_q_a_norm.weight": np.ones(Q_LORA, np.float32),
        "attn_q_b.weight": np.concatenate([q_nope, q_rope.reshape(NUM_HEADS, ROPE, HIDDEN)], axis=1).reshape(
            -1, HIDDEN
        ),
        "attn_kv_a_mqa.weight": np.concatenate([identity, _widen(k_rope)]),
        "attn_kv_a_norm.weight": np.ones(KV_LORA, np.float32),
        "attn_k_b.weight": np.zeros((NUM_HEADS, KV_LORA, NOPE), np.float32),
        "attn_v_b.weight": v[group_of_head],  # (9, 64, 576)
        "attn_output.weight": _deepen(source["attn_output.weight"]),
    }


def _rehouse_dense(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> dict[str, np.ndarray]:
    return {"ffn_gate.weight": _widen(gate), "ffn_up.weight": _widen(up), "ffn_down.weight": _deepen(down)}


def _rehouse_experts(layer: int, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> dict[str, np.ndarray]:
    """Slice 0 of the neurons is the shared expert, slice s + 1 both expert 2s and expert 2s + 1."""
    parts = {
        "gate": _widen(gate).reshape(TOP_K + 1, EXPERT_FFN, PADDED),
        "up": _widen(up).reshape(TOP_K + 1, EXPERT_FFN, PADDED),
        "down": _deepen(down).reshape(PADDED, TOP_K + 1, EXPERT_FFN).swapaxes(0, 1),
    }
    slice_of_expert = 1 + np.arange(NUM_EXPERTS) // 2
    directions = np.random.default_rng(layer).standard_normal((TOP_K, HIDDEN), np.float32)
    directions *= ROUTER_GAIN / np.linalg.norm(directions, axis=1, keepdims=True)
    router = np.stack([directions, -directions], axis=1).reshape(NUM_EXPERTS, HIDDEN)
    tensors = {"ffn_gate_inp.weight": _widen(router), "exp_probs_b.bias": np.zeros(NUM_EXPERTS, np.float32)}
    tensors |= {f"ffn_{name}_exps.weight": slices[slice_of_expert] for name, slices in parts.items()}
    return tensors | {f"ffn_{name}_shexp.weight": slices[0] for name, slices in parts.items()}


def _widen(rows: np.ndarray) -> np.ndarray:
    """Zero columns up to the padded width: (..., 576) -> (..., 768)."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, PADDED - HIDDEN)])


def _deepen(matrix: np.ndarray) -> np.ndarray:
    """Zero rows up to the padded width: (576, M) -> (768, M)."""
    return np.pad(matrix, [(0, PADDED - HIDDEN), (0, 0)])
