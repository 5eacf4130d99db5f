"""The operations that the hybrid path is made of: one class on `native.gpu`'s Triton kernels, and the protocol it
follows.

Tests put another class in its place that computes the same on a CPU device. Float tensors are float32 unless a comment
says otherwise; every operation allocates its result.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.index import RoutedLayer

MAX_DECODE_TOKENS = 16  # rows that the matrix-vector kernels take, in float32; steps up to here are captured


@dataclass(frozen=True, slots=True, eq=False)
class DenseMatrix:
    """(rows, k) weights in the bytes of a GGUF type, on the device."""

    data: torch.Tensor  # uint8 (rows, row_bytes), or (heads, rows, row_bytes)
    layout_name: str
    k: int

    def by_head(self, num_heads: int) -> "DenseMatrix":
        """(heads * rows, row_bytes) as (heads, rows, row_bytes)."""
        return DenseMatrix(self.data.view(num_heads, -1, self.data.shape[-1]), self.layout_name, self.k)


class Angles(NamedTuple):
    """Of each token's position, (T, P / 2)."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class RouterRule:
    """How scores become a choice; see `native.cpu.router`."""

    top_k: int
    num_groups: int
    num_groups_used: int
    is_sigmoid: bool
    is_normalized: bool
    scale: float

    @classmethod
    def of(cls, config: ModelConfig) -> "RouterRule":
        return cls(
            top_k=config.num_experts_used,
            num_groups=max(1, config.num_expert_groups),
            num_groups_used=max(1, config.num_expert_groups_used),
            is_sigmoid=config.expert_gating == "sigmoid",
            is_normalized=config.is_expert_weights_norm,
            scale=config.expert_weights_scale,
        )


class Kernels(Protocol):
    """T tokens, K inputs or choices, H heads, R latent, P rotary, D hidden size."""

    def dequantize(self, data: torch.Tensor, layout_name: str) -> torch.Tensor:
        """uint8 (..., row_bytes) -> (..., K)."""

    def linear(self, x: torch.Tensor, matrix: DenseMatrix) -> torch.Tensor:
        """(T, K) -> (T, rows)."""

    def head_linear(self, x: torch.Tensor, matrix: DenseMatrix) -> torch.Tensor:
        """(T, H, K), a matrix of each head -> (T, H, rows)."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """(T, K) -> (T, K)."""

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """(T, F) twice -> (T, F)."""

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(T, H, P) and (T, P / 2): neighbouring pairs turned in place; returns x."""

    def write_latent(
        self,
        kv: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        angles: Angles,
        storage: torch.Tensor,
        cache_rows: torch.Tensor,
    ) -> None:
        """(T, R + P) -> storage (pages, 64, R + P) at `cache_rows` int64 (T,): normed latent and rotated key; -1 is
        skipped."""

    def mla_decode(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        storage: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """(T, H, R), (T, H, P), int32 (T, pages), int32 (T,) -> (T, H, R): each token attends to its `lengths`
        positions."""

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: RouterRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, E) -> int32 (T, top_k) and weights (T, top_k)."""

    def expert_choices(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        form: RoutedLayer,
        slot_of_choice: torch.Tensor,
        token_of_choice: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D), uint8 (slots, slot_bytes), int32 (n,) twice -> `out` (n, D) unweighted. Rows of slot -1 are
        nothing."""

    def weighted_sum(self, rows: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """(T, K, D), (T, K) -> (T, D), choice after choice, then + base (T, D)."""


class TritonKernels:
    """`native.gpu`, imported when this is made: it needs Triton and a CUDA device, or Triton's interpreter.

    What has the protocol's form there is taken as it is; the methods take matrices and rules apart.
    """

    def __init__(self) -> None:
        from kimi_lite.native.gpu import dequant, elementwise, experts, linear, mla, router

        self._dequant, self._linear, self._mla, self._router = dequant, linear, mla, router
        self.rms_norm, self.swiglu, self.rotate = elementwise.rms_norm, elementwise.swiglu, elementwise.rope
        self.weighted_sum, self.expert_choices = elementwise.weighted_sum, experts.expert_choices
        self.mla_decode = mla.mla_decode

    def dequantize(self, data: torch.Tensor, layout_name: str) -> torch.Tensor:
        rows = self._dequant.dequantize(data.reshape(-1, data.shape[-1]), layout_name)
        return rows.view(*data.shape[:-1], -1)

    def linear(self, x: torch.Tensor, matrix: DenseMatrix) -> torch.Tensor:
        return self._linear.linear(x, matrix.data, matrix.layout_name, matrix.k)

    def head_linear(self, x: torch.Tensor, matrix: DenseMatrix) -> torch.Tensor:
        return self._linear.heads_linear(x, matrix.data, matrix.layout_name)

    def write_latent(
        self,
        kv: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        angles: Angles,
        storage: torch.Tensor,
        cache_rows: torch.Tensor,
    ) -> None:
        self._mla.write_latent(kv, weight, eps, angles.cos, angles.sin, storage, cache_rows)

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: RouterRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = (rule.num_groups, rule.num_groups_used)
        return self._router.route(logits, bias, rule.top_k, groups, rule.is_sigmoid, rule.is_normalized, rule.scale)
