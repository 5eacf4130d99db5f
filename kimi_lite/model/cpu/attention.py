"""Multi-head latent attention of one layer as kernel operations: absorbed for decoding, expanded for prompts."""

from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.buffers import Buffers
from kimi_lite.model.cpu.weights import key_value_matrices, matrix, vector
from kimi_lite.native.cpu.attention import attention_ops
from kimi_lite.native.cpu.attention_prefill import prefill_attention_op
from kimi_lite.native.cpu.latent import write_latent_op
from kimi_lite.native.cpu.linear import linear_op, quantize_op, rms_norm_op


class Op(NamedTuple):
    """One operation of a program. `stage` is the name that traces show: the weights it reads, or what it does."""

    stage: str
    kernel: int  # address
    arguments: np.ndarray


class Attention:
    """Weights of one layer, under their GGUF names."""

    def __init__(self, store: GGUFStore, config: ModelConfig, layer: int) -> None:
        block = f"blk.{layer}"
        self.config = config
        self.attn_norm = vector(store, f"{block}.attn_norm.weight")
        if config.q_lora_rank:
            self.attn_q_a = matrix(store, f"{block}.attn_q_a.weight")
            self.attn_q_a_norm = vector(store, f"{block}.attn_q_a_norm.weight")
            self.attn_q_b = matrix(store, f"{block}.attn_q_b.weight")
        else:
            self.attn_q = matrix(store, f"{block}.attn_q.weight")
        self.attn_kv_a_mqa = matrix(store, f"{block}.attn_kv_a_mqa.weight")
        self.attn_kv_a_norm = vector(store, f"{block}.attn_kv_a_norm.weight")
        self.attn_k_b, self.attn_v_b = key_value_matrices(store, layer, config.num_heads, config.qk_nope_head_dim)
        self.attn_output = matrix(store, f"{block}.attn_output.weight")

    def input_kinds(self) -> set[int]:
        """int8 forms that the products with the normed hidden state need."""
        first = self.attn_q_a if self.config.q_lora_rank else self.attn_q
        return {first.kind, self.attn_kv_a_mqa.kind} - {0}

    def ops(self, run: int, buffers: Buffers, storage: int, kv_dtype: str) -> list[Op]:
        """x += attention(norm(x)). `storage`: address of this layer's cache pages."""
        c, eps = self.config, self.config.rms_norm_eps
        sizes = (c.kv_lora_rank, c.qk_rope_head_dim)
        return [
            Op("attn_norm", *rms_norm_op(run, buffers.x, self.attn_norm, buffers.normed, eps)),
            *self._query_ops(run, buffers),
            Op("attn_kv_a_norm", *write_latent_op(run, buffers.kv, self.attn_kv_a_norm, storage, sizes, eps, kv_dtype)),
            *self._attend_ops(run, buffers, storage, kv_dtype),
            Op("quantize heads", *quantize_op(run, buffers.heads)),
            Op("attn_output", *linear_op(run, buffers.heads, [(self.attn_output.table, buffers.x, True)])),
        ]

    def _query_ops(self, run: int, buffers: Buffers) -> list[Op]:
        """Queries of all heads (T, heads * (nope + rope)) and the new latents (T, kv_lora + rope)."""
        latent = (self.attn_kv_a_mqa.table, buffers.kv, False)
        if not self.config.q_lora_rank:
            return [
                Op("attn_q, kv_a", *linear_op(run, buffers.normed, [(self.attn_q.table, buffers.q, False), latent]))
            ]
        compressed = buffers.q_compressed
        return [
            Op(
                "attn_q_a, kv_a",
                *linear_op(run, buffers.normed, [(self.attn_q_a.table, compressed.values, False), latent]),
            ),
            Op(
                "attn_q_a_norm",
                *rms_norm_op(run, compressed.values, self.attn_q_a_norm, compressed, self.config.rms_norm_eps),
            ),
            Op("attn_q_b", *linear_op(run, compressed, [(self.attn_q_b.table, buffers.q, False)])),
        ]

    def _attend_ops(self, run: int, buffers: Buffers, storage: int, kv_dtype: str) -> list[Op]:
        """Rows in the absorbed form in three steps, then those in the expanded one; a batch may have both."""
        c = self.config
        shape = (c.num_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank, c.v_head_dim)
        matrices = (self.attn_k_b.table, self.attn_v_b.table)
        rest = (shape, c.softmax_scale, kv_dtype)
        absorbed = attention_ops(run, buffers.q, matrices, storage, buffers.attention, buffers.heads, *rest)
        expanded = prefill_attention_op(run, buffers.q, matrices, storage, buffers.heads, *rest)
        stages = ("attn_k_b", "attend", "attn_v_b", "attend, expanded")
        return [Op(stage, *op) for stage, op in zip(stages, [*absorbed, expanded], strict=True)]
