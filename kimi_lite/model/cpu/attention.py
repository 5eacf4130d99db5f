"""Multi-head latent attention of one layer as kernel operations: absorbed for decoding, expanded for prompts."""

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.buffers import Buffers
from kimi_lite.model.cpu.ops import LayerOp, Reads, by_head, every_token
from kimi_lite.model.cpu.weights import key_value_matrices, matrix, vector
from kimi_lite.native.cpu.attention import attention_op
from kimi_lite.native.cpu.attention_prefill import prefill_attention_op
from kimi_lite.native.cpu.latent import write_latent_op
from kimi_lite.native.cpu.linear import Product, linear_op, quantize_op, rms_norm_op
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.latent_rows import MlaShape


def mla_shape(config: ModelConfig) -> MlaShape:
    """The sizes that the kernels want to know."""
    return MlaShape(
        heads=config.num_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        kv_lora=config.kv_lora_rank,
        value=config.v_head_dim,
    )


class Attention:
    """Weights of one layer, under their GGUF names."""

    def __init__(self, store: GGUFStore, config: ModelConfig, layer: int) -> None:
        self._prefix = f"blk.{layer}."
        self.config, self.shape = config, mla_shape(config)
        self.attn_norm = vector(store, self._name("attn_norm"))
        if config.q_lora_rank:
            self.attn_q_a = matrix(store, self._name("attn_q_a"))
            self.attn_q_a_norm = vector(store, self._name("attn_q_a_norm"))
            self.attn_q_b = matrix(store, self._name("attn_q_b"))
        else:
            self.attn_q = matrix(store, self._name("attn_q"))
        self.attn_kv_a_mqa = matrix(store, self._name("attn_kv_a_mqa"))
        self.attn_kv_a_norm = vector(store, self._name("attn_kv_a_norm"))
        self.attn_k_b, self.attn_v_b = key_value_matrices(store, layer, config.num_heads, config.qk_nope_head_dim)
        self.attn_output = matrix(store, self._name("attn_output"))

    def _name(self, tensor: str) -> str:
        return f"{self._prefix}{tensor}.weight"

    def input_kinds(self) -> set[int]:
        """int8 forms that the products with the normed hidden state need."""
        first = self.attn_q_a if self.config.q_lora_rank else self.attn_q
        return {first.kind, self.attn_kv_a_mqa.kind} - {0}

    def ops(self, run: RunTable, buffers: Buffers, storage: np.ndarray, kv_dtype: str) -> list[LayerOp]:
        """x += attention(norm(x)). `storage`: this layer's cache pages (P, 64, row)."""
        b, eps = buffers, self.config.rms_norm_eps
        write = write_latent_op(run, b.kv, self.attn_kv_a_norm, storage, self.shape, eps, kv_dtype)
        output = linear_op(run, b.heads, Product(self.attn_output, b.x, is_added=True))
        return [
            LayerOp("attn_norm", rms_norm_op(run, b.x, self.attn_norm, b.normed, eps)),
            *self._query_ops(run, b),
            LayerOp("attn_kv_a_norm", write),
            *self._attend_ops(run, b, storage, kv_dtype),
            LayerOp("quantize heads", quantize_op(run, b.heads)),
            LayerOp("attn_output", output, (self._reads(every_token(b.heads.values), "attn_output"),)),
        ]

    def _reads(self, inputs, *tensors: str, is_after: bool = False) -> Reads:
        return Reads(tuple(self._name(tensor) for tensor in tensors), inputs, is_after)

    def _query_ops(self, run: RunTable, buffers: Buffers) -> list[LayerOp]:
        """Queries of all heads (T, heads * (nope + rope)) and the new latents (T, kv_lora + rope)."""
        b, latent, normed = buffers, Product(self.attn_kv_a_mqa, buffers.kv), every_token(buffers.normed.values)
        if not self.config.q_lora_rank:
            both = linear_op(run, b.normed, Product(self.attn_q, b.q), latent)
            return [LayerOp("attn_q, kv_a", both, (self._reads(normed, "attn_q", "attn_kv_a_mqa"),))]
        compressed = b.q_compressed
        both = linear_op(run, b.normed, Product(self.attn_q_a, compressed.values), latent)
        norm = rms_norm_op(run, compressed.values, self.attn_q_a_norm, compressed, self.config.rms_norm_eps)
        query = linear_op(run, compressed, Product(self.attn_q_b, b.q))
        return [
            LayerOp("attn_q_a, kv_a", both, (self._reads(normed, "attn_q_a", "attn_kv_a_mqa"),)),
            LayerOp("attn_q_a_norm", norm),
            LayerOp("attn_q_b", query, (self._reads(every_token(compressed.values), "attn_q_b"),)),
        ]

    def _attend_ops(self, run: RunTable, buffers: Buffers, storage: np.ndarray, kv_dtype: str) -> list[LayerOp]:
        """Rows in the absorbed form, then those in the expanded one; a batch may have both."""
        b, shape, scale = buffers, self.shape, self.config.softmax_scale
        k_b, v_b = self.attn_k_b, self.attn_v_b
        absorbed = attention_op(run, b.q, k_b, v_b, storage, b.attention, b.heads, shape, scale, kv_dtype)
        expanded = prefill_attention_op(run, b.q, k_b, v_b, storage, b.heads, shape, scale, kv_dtype)

        def queries(num_tokens: int) -> np.ndarray:
            """(T, heads, nope): what is not rotated."""
            return b.q[:num_tokens].reshape(num_tokens, shape.heads, -1)[:, :, : shape.nope]

        def contexts(num_tokens: int) -> np.ndarray:
            """(rows, heads, kv_lora): each head's mean latent, of the rows that attended last in the absorbed form."""
            num_rows = min(num_tokens, b.attention.capacity)
            return b.attention.context.values[: num_rows * shape.heads].reshape(num_rows, shape.heads, -1)

        return [
            LayerOp(
                "attend",
                absorbed,
                (
                    self._reads(by_head(queries), "attn_k_b"),
                    self._reads(by_head(contexts), "attn_v_b", is_after=True),
                ),
            ),
            LayerOp("attend, expanded", expanded),
        ]
