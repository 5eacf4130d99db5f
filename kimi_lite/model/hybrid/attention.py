"""Multi-head latent attention on the device: absorbed over the paged cache, expanded through torch's fused attention.

Absorbed (decoding): W_UK is moved to the query and W_UV behind the sum, so that all heads read the one latent. Expanded
(prompts): keys and values of some heads at a time are made from the latents. DeepSeek-V2, arXiv 2405.04434, section
2.1.
"""

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from kimi_lite.arch.config import ModelConfig
from kimi_lite.model.hybrid.kernels import DenseMatrix, Kernels
from kimi_lite.model.hybrid.step import ExpandedSlice, Step
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.latent_rows import GROUP_VALUES

EXPANDED_BYTES = 512 * 1024**2  # keys and values that exist at a time


class Attention:
    """Weights of one layer, under their GGUF names."""

    def __init__(self, weights: DenseWeights, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        prefix = f"blk.{layer}"
        self.config, self._kernels = config, kernels
        self._dtype = torch.float32 if weights.dense_type == "file" else torch.bfloat16  # of expanded keys and values
        self.attn_norm = weights.vector(f"{prefix}.attn_norm.weight")
        if config.q_lora_rank:
            self.attn_q_a = weights.matrix(f"{prefix}.attn_q_a.weight")
            self.attn_q_a_norm = weights.vector(f"{prefix}.attn_q_a_norm.weight")
            self.attn_q_b = weights.matrix(f"{prefix}.attn_q_b.weight")
        else:
            self.attn_q = weights.matrix(f"{prefix}.attn_q.weight")
        self.attn_kv_a_mqa = weights.matrix(f"{prefix}.attn_kv_a_mqa.weight")
        self.attn_kv_a_norm = weights.vector(f"{prefix}.attn_kv_a_norm.weight")
        self.attn_k_b, self.attn_v_b = weights.heads(config, layer)  # (H, kv_lora, nope), (H, v, kv_lora)
        self.attn_output = weights.matrix(f"{prefix}.attn_output.weight")

    def forward(self, normed: torch.Tensor, storage: torch.Tensor, step: Step) -> torch.Tensor:
        """x (T, D) behind `attn_norm` -> (T, D); the new latents go into `storage` (pages, 64, kv_lora + rope)."""
        c, kernels, eps = self.config, self._kernels, self.config.rms_norm_eps
        kv = kernels.linear(normed, self.attn_kv_a_mqa)  # (T, kv_lora + rope)
        kernels.write_latent(kv, self.attn_kv_a_norm, eps, step.angles, storage, step.cache_rows)
        q = self._queries(normed).view(len(normed), c.num_heads, c.qk_head_dim)
        q_nope = q[..., : c.qk_nope_head_dim]
        q_rope = kernels.rotate(q[..., c.qk_nope_head_dim :], step.angles.cos, step.angles.sin)  # (T, H, rope)
        return kernels.linear(self._attend(q_nope, q_rope, storage, step), self.attn_output)

    def _queries(self, normed: torch.Tensor) -> torch.Tensor:
        """(T, H * (nope + rope))."""
        if not self.config.q_lora_rank:
            return self._kernels.linear(normed, self.attn_q)
        compressed = self._kernels.linear(normed, self.attn_q_a)
        return self._kernels.linear(
            self._kernels.rms_norm(compressed, self.attn_q_a_norm, self.config.rms_norm_eps), self.attn_q_b
        )

    def _attend(self, q_nope: torch.Tensor, q_rope: torch.Tensor, storage: torch.Tensor, step: Step) -> torch.Tensor:
        """(T, H * v): every row in its form."""
        if step.absorbed is None:
            return self._absorbed(q_nope, q_rope, storage, step)
        c = self.config
        heads = torch.empty((len(q_nope), c.num_heads * c.v_head_dim), dtype=torch.float32, device=q_nope.device)
        if len(step.absorbed):
            heads[step.absorbed] = self._absorbed(q_nope[step.absorbed], q_rope[step.absorbed], storage, step)
        for piece in step.expanded:
            rows = slice(piece.start, piece.start + piece.length)
            heads[rows] = self._expanded(torch.cat([q_nope[rows], q_rope[rows]], dim=-1), storage, piece)
        return heads

    def _absorbed(self, q_nope: torch.Tensor, q_rope: torch.Tensor, storage: torch.Tensor, step: Step) -> torch.Tensor:
        """(T, H, nope), (T, H, rope) -> (T, H * v)."""
        kernels, scale = self._kernels, self.config.softmax_scale
        q_latent = kernels.head_linear(q_nope, self.attn_k_b)  # (T, H, kv_lora)
        context = kernels.mla_decode(q_latent, q_rope, storage, step.page_table, step.lengths, scale)  # (T, H, kv_lora)
        return kernels.head_linear(context, self.attn_v_b).reshape(len(q_nope), -1)

    def _expanded(self, q: torch.Tensor, storage: torch.Tensor, piece: ExpandedSlice) -> torch.Tensor:
        """q (T, H, nope + rope) of one slice -> (T, H * v)."""
        c, dtype = self.config, self._dtype
        rows = storage.index_select(0, piece.pages).view(-1, storage.shape[-1])[: piece.num_positions]
        latent = latent_values(rows, c.kv_latent_size).to(dtype)  # (P, kv_lora + rope)
        c_kv, k_rope = latent[:, : c.kv_lora_rank], latent[:, c.kv_lora_rank :]  # (P, kv_lora), (P, rope)
        mask = causal_lower_right(piece.length, piece.num_positions)
        out = torch.empty((len(q), c.num_heads, c.v_head_dim), dtype=torch.float32, device=q.device)
        count = heads_at_a_time(c, piece.num_positions, latent.element_size())
        for first in range(0, c.num_heads, count):
            heads = slice(first, first + count)
            k_nope = torch.matmul(c_kv, self._values(self.attn_k_b, heads))  # (heads, P, nope)
            keys = torch.cat([k_nope, k_rope.expand(len(k_nope), -1, -1)], dim=-1)
            values = torch.matmul(c_kv, self._values(self.attn_v_b, heads).transpose(1, 2))  # (heads, P, v)
            queries = q[:, heads].transpose(0, 1).to(dtype)
            inputs = (queries[None], keys[None], values[None])
            attended = functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=c.softmax_scale)
            out[:, heads] = attended[0].transpose(0, 1).float()
        return out.view(len(q), -1)

    def _values(self, matrix: DenseMatrix, heads: slice) -> torch.Tensor:
        """Some heads' (rows, k) in the type that products use."""
        return self._kernels.dequantize(matrix.data[heads], matrix.layout_name).to(self._dtype)


def latent_values(rows: torch.Tensor, latent: int) -> torch.Tensor:
    """Cache rows of any dtype (P, row) -> (P, latent) as floats; see `native.latent_rows`."""
    if rows.dtype != torch.uint8:
        return rows
    codes, scales = rows[:, :latent].view(torch.int8), rows[:, latent:].contiguous().view(torch.float16)
    return codes.float() * scales.float().repeat_interleave(GROUP_VALUES, dim=1)[:, :latent]


def heads_at_a_time(config: ModelConfig, num_positions: int, value_bytes: int) -> int:
    """Heads whose keys and values fit into EXPANDED_BYTES, at least one."""
    head_bytes = num_positions * (config.qk_head_dim + config.v_head_dim) * value_bytes
    return max(1, min(config.num_heads, EXPANDED_BYTES // head_bytes))
