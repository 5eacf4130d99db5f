"""Multi-head latent attention on the device: absorbed over the paged cache, expanded through torch's fused attention.

Absorbed (decoding): W_UK is moved to the query and W_UV behind the sum, so that all heads read the one latent. Expanded
(prompts): keys and values of some heads at a time are made from the latents, values as wide as keys, since torch takes
its flash kernels only then. DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from kimi_lite.arch.config import ModelConfig
from kimi_lite.model.hybrid.kernels import DenseMatrix, Kernels
from kimi_lite.model.hybrid.step import ExpandedSlice, Step
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.latent_rows import GROUP_VALUES
from kimi_lite.plan.workspace import EXPANDED_BYTES

_LATENT_ROWS = 8192  # of eight bits that become floats at a time
_ABSORBED_ROWS = 256  # that attend at a time: their queries in latent space are 34 MB for Kimi K2.5


class Attention:
    """Weights of one layer, under their GGUF names."""

    def __init__(self, weights: DenseWeights, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        prefix = f"blk.{layer}"
        self.config, self._kernels, self._activation_type = config, kernels, weights.activation_type
        self._is_exact = weights.dense_type == "file"
        self.attn_norm = weights.vector(f"{prefix}.attn_norm.weight")
        first = "attn_q_a" if config.q_lora_rank else "attn_q"
        # One product where they have one type: alone, the few rows of attn_kv_a_mqa are too little for a GPU
        self.attn_q_a_kv_a = weights.matrices(f"{prefix}.{first}.weight", f"{prefix}.attn_kv_a_mqa.weight")
        if config.q_lora_rank:
            self.attn_q_a_norm = weights.vector(f"{prefix}.attn_q_a_norm.weight")
            self.attn_q_b = weights.matrix(f"{prefix}.attn_q_b.weight")
        self.attn_kv_a_norm = weights.vector(f"{prefix}.attn_kv_a_norm.weight")
        self.attn_k_b, self.attn_v_b = weights.heads(config, layer)  # (H, kv_lora, nope), (H, v, kv_lora)
        self.attn_output = weights.matrix(f"{prefix}.attn_output.weight")

    def forward(self, normed: torch.Tensor, storage: torch.Tensor, step: Step) -> torch.Tensor:
        """x (T, D) behind `attn_norm` -> (T, D); the new latents go into `storage` (pages, 64, kv_lora + rope)."""
        c, kernels, eps = self.config, self._kernels, self.config.rms_norm_eps
        dtype = self._activation_type(len(normed))
        q, kv = self._q_and_kv(normed.to(dtype))  # (T, q_lora or H * (nope + rope)), (T, kv_lora + rope)
        kernels.write_latent(kv, self.attn_kv_a_norm, eps, step.angles, storage, step.cache_rows)
        if c.q_lora_rank:
            q = kernels.linear(kernels.rms_norm(q, self.attn_q_a_norm, eps, dtype=dtype), self.attn_q_b)
        q = q.reshape(len(normed), c.num_heads, c.qk_head_dim)
        kernels.rotate(q[..., c.qk_nope_head_dim :], step.angles.cos, step.angles.sin)
        return kernels.linear(self._attend(q, storage, step, dtype), self.attn_output)

    def _q_and_kv(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [self._kernels.linear(normed, matrix) for matrix in self.attn_q_a_kv_a]
        if len(parts) == 1:
            return parts[0][:, : -self.config.kv_latent_size], parts[0][:, -self.config.kv_latent_size :]
        return parts[0], parts[1]

    def _attend(self, q: torch.Tensor, storage: torch.Tensor, step: Step, dtype: torch.dtype) -> torch.Tensor:
        """q (T, H, nope + rope) -> (T, H * v) of `dtype`: every row in its form."""
        c = self.config
        if step.absorbed is None and len(q) <= _ABSORBED_ROWS:
            return self._absorbed(q, storage, step.page_table, step.lengths).to(dtype)
        heads = torch.empty((len(q), c.num_heads * c.v_head_dim), dtype=dtype, device=q.device)
        for first in range(0, len(step.lengths), _ABSORBED_ROWS):
            part = slice(first, first + _ABSORBED_ROWS)
            rows = part if step.absorbed is None else step.absorbed[part]
            heads[rows] = self._absorbed(q[rows], storage, step.page_table[part], step.lengths[part]).to(dtype)
        for piece in step.expanded:
            rows = slice(piece.start, piece.start + piece.length)
            self._expanded(q[rows], storage, piece, heads[rows].view(piece.length, c.num_heads, c.v_head_dim))
        return heads

    def _absorbed(
        self, q: torch.Tensor, storage: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """(T, H, nope + rope) -> (T, H * v)."""
        c, kernels = self.config, self._kernels
        q_latent = kernels.head_linear(q[..., : c.qk_nope_head_dim], self.attn_k_b)  # (T, H, kv_lora)
        q_rope = q[..., c.qk_nope_head_dim :]
        context = kernels.mla_decode(q_latent, q_rope, storage, page_table, lengths, c.softmax_scale)
        return kernels.head_linear(context, self.attn_v_b).reshape(len(q), -1)

    def _expanded(self, q: torch.Tensor, storage: torch.Tensor, piece: ExpandedSlice, out: torch.Tensor) -> None:
        """q (T, H, nope + rope) of one slice -> out (T, H, v)."""
        c, dtype = self.config, self._factor_type(storage)
        rows = storage.index_select(0, piece.pages).view(-1, storage.shape[-1])[: piece.num_positions]
        latent = latent_values(rows, c.kv_latent_size, dtype)  # (P, kv_lora + rope)
        c_kv, k_rope = latent[:, : c.kv_lora_rank], latent[:, c.kv_lora_rank :]  # (P, kv_lora), (P, rope)
        mask = causal_lower_right(piece.length, piece.num_positions)
        count = heads_at_a_time(c, piece.num_positions, latent.element_size())
        keys = torch.empty((count, piece.num_positions, c.qk_head_dim), dtype=dtype, device=q.device)
        values = torch.zeros((count, piece.num_positions, value_width(c)), dtype=dtype, device=q.device)
        for first in range(0, c.num_heads, count):
            heads = slice(first, first + count)
            k, v = keys[: c.num_heads - first], values[: c.num_heads - first]  # (heads, P, nope + rope)
            torch.matmul(c_kv, self._values(self.attn_k_b, heads, dtype), out=k[..., : c.qk_nope_head_dim])
            k[..., c.qk_nope_head_dim :] = k_rope
            w_v = self._values(self.attn_v_b, heads, dtype).transpose(1, 2)
            torch.matmul(c_kv, w_v, out=v[..., : c.v_head_dim])
            queries = q[:, heads].transpose(0, 1).to(dtype)
            inputs = (queries[None], k[None], v[None])
            attended = functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=c.softmax_scale)
            out[:, heads] = attended[0, ..., : c.v_head_dim].transpose(0, 1)

    def _factor_type(self, storage: torch.Tensor) -> torch.dtype:
        """Of expanded keys and values: as the cache holds latents, so that none loses bits; see `mla_decode`."""
        if self._is_exact:
            return torch.float32
        return torch.float16 if storage.dtype == torch.uint8 else storage.dtype

    def _values(self, matrix: DenseMatrix, heads: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some heads' (rows, k) in the type that products use."""
        return self._kernels.dequantize(matrix.data[heads], matrix.layout_name, dtype)


def latent_values(rows: torch.Tensor, latent: int, dtype: torch.dtype) -> torch.Tensor:
    """Cache rows of any dtype (P, row) -> (P, latent) of `dtype`; see `native.latent_rows`."""
    if rows.dtype != torch.uint8:
        return rows.to(dtype)
    values = torch.empty((len(rows), latent), dtype=dtype, device=rows.device)
    for first in range(0, len(rows), _LATENT_ROWS):
        part = rows[first : first + _LATENT_ROWS]
        codes, scales = part[:, :latent].view(torch.int8), part[:, latent:].contiguous().view(torch.float16)
        wide = scales.float().repeat_interleave(GROUP_VALUES, dim=1)[:, :latent]
        values[first : first + len(part)] = codes.float() * wide
    return values


def value_width(config: ModelConfig) -> int:
    """Of expanded values, zeros at their end: flash kernels want keys and values of one width."""
    return max(config.qk_head_dim, config.v_head_dim)


def heads_at_a_time(config: ModelConfig, num_positions: int, value_bytes: int) -> int:
    """Heads whose keys and values fit into EXPANDED_BYTES, at least one."""
    head_bytes = num_positions * (config.qk_head_dim + value_width(config)) * value_bytes
    return max(1, min(config.num_heads, EXPANDED_BYTES // head_bytes))
