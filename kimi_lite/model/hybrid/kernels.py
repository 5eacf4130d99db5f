"""The operations that the hybrid path is made of: one class on `native.gpu`'s Triton kernels, and the protocol it
follows.

Tests put another class in its place that computes the same on a CPU device. Float tensors are float32 unless a comment
says otherwise.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.index import RoutedLayer
from kimi_lite.model.hybrid.turns import Turn
from kimi_lite.native.gpu.arguments import ChoiceRows, Routes
from kimi_lite.native.turn_cells import MAX_TOKENS

MAX_DECODE_TOKENS = MAX_TOKENS  # with float32 activations; steps up to here are captured


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


class Residents(NamedTuple):
    """Which experts of a layer have a slot in VRAM, and what those gain in the router's choice (arXiv 2412.00099)."""

    slot_of: torch.Tensor  # int32 (E,) on the device, live; -1: no slot
    cache_bias: float = 0.0


class Kernels(Protocol):
    """T tokens, K inputs or choices, H heads, R latent, P rotary, D hidden size, E experts.

    `out` is where a result goes, with any stride between rows unless a comment says otherwise; without it the result is
    allocated. `also` is a second place for a result, which may be pinned memory of the host.
    """

    grouped_choices: int  # from so many on `expert_choices` reads x in bfloat16, and takes it so, too

    def dequantize(
        self, data: torch.Tensor, layout_name: str, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """uint8 (..., row_bytes) -> (..., K) of `dtype`; `out` contiguous."""

    def linear(
        self, x: torch.Tensor, matrix: DenseMatrix, out: torch.Tensor | None = None, is_exact: bool = False
    ) -> torch.Tensor:
        """(T, K) float32 or bfloat16 -> (T, rows). is_exact: float32 arithmetic however many tokens."""

    def head_linear(self, x: torch.Tensor, matrix: DenseMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
        """(T, H, K), a matrix of each head -> (T, H, rows)."""

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        delta: torch.Tensor | None = None,
        also: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, K) -> (T, K) of `dtype`, or of `out`'s. x += delta first, where there is one."""

    def swiglu(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        out: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """(T, F) twice -> (T, F) of `dtype`, or of `out`'s."""

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
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, H, R), (T, H, P), int32 (T, pages), int32 (T,) -> (T, H, R), contiguous: each token attends to its
        `lengths` positions."""

    def route(
        self,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        rule: RouterRule,
        residents: Residents | None = None,
        turn: Turn | None = None,
        out: Routes | None = None,
    ) -> Routes:
        """(T, E), (E,) -> what the router says; `slots` with `residents` alone. All contiguous. turn: the CPU is told
        that its x is there, then what was chosen and what of that is missing."""

    def await_answer(self, turn: Turn) -> None:
        """What comes behind this sees the rows that the CPU computed in this turn."""

    def expert_choices(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        form: RoutedLayer,
        slot_of_choice: torch.Tensor,
        token_of_choice: torch.Tensor,
        out: torch.Tensor | None = None,
        is_exact: bool | None = None,
    ) -> torch.Tensor:
        """(T, D), uint8 (slots, slot_bytes), int32 (n,) twice -> `out` (n, D) unweighted. Rows of slot -1 are
        nothing. is_exact: with the CPU's bits (`native.gpu.exact`); None: where that is as fast."""

    def weighted_sum(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        base: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, K, D), (T, K) -> (T, D), choice after choice, then + base (T, D)."""

    def sum_at_places(
        self, rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same of rows (n, D) that lie anywhere: choice k of token t at `places` int32 (T, K)."""

    def join(
        self,
        x: torch.Tensor,
        rows: ChoiceRows,
        weights: torch.Tensor,
        shared: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        out: torch.Tensor | None = None,
        arrivals: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """x (T, D) += weighted sum (T, K) of the rows, choice after choice, + shared (T, D). With `norm` (D,) returns
        rms_norm(x, norm, eps), in `out`; else None. `arrivals`: int32 (T,) of zeros, zeros again afterwards."""


class TritonKernels:
    """`native.gpu`, imported when this is made: it needs Triton and a CUDA device, or Triton's interpreter.

    What has the protocol's form there is taken as it is; the methods take matrices and rules apart.
    """

    def __init__(self) -> None:
        from kimi_lite.native.gpu import dequant, elementwise, experts, join, linear, mla, places, router, turns

        self._dequant, self._linear, self._mla, self._router, self._turns = dequant, linear, mla, router, turns
        self.rms_norm, self.swiglu, self.rotate = elementwise.rms_norm, elementwise.swiglu, elementwise.rope
        self.weighted_sum, self.expert_choices = elementwise.weighted_sum, experts.expert_choices
        self.mla_decode, self.join = mla.mla_decode, join.join
        self.sum_at_places, self.grouped_choices = places.sum_at_places, experts.GROUPED_CHOICES

    def dequantize(
        self, data: torch.Tensor, layout_name: str, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        flat = None if out is None else out.view(-1, out.shape[-1])
        rows = self._dequant.dequantize(data.reshape(-1, data.shape[-1]), layout_name, dtype, flat)
        return rows.view(*data.shape[:-1], -1)

    def linear(
        self, x: torch.Tensor, matrix: DenseMatrix, out: torch.Tensor | None = None, is_exact: bool = False
    ) -> torch.Tensor:
        return self._linear.linear(x, matrix.data, matrix.layout_name, matrix.k, out, is_exact)

    def head_linear(self, x: torch.Tensor, matrix: DenseMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._linear.heads_linear(x, matrix.data, matrix.layout_name, out)

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
        self,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        rule: RouterRule,
        residents: Residents | None = None,
        turn: Turn | None = None,
        out: Routes | None = None,
    ) -> Routes:
        return self._router.route(
            logits,
            bias,
            rule.top_k,
            groups=(rule.num_groups, rule.num_groups_used),
            is_sigmoid=rule.is_sigmoid,
            is_normalized=rule.is_normalized,
            scale=rule.scale,
            slot_of=residents.slot_of if residents else None,
            cache_bias=residents.cache_bias if residents else 0.0,
            out=out,
            posting=turn.posting if turn else None,
        )

    def await_answer(self, turn: Turn) -> None:
        self._turns.await_answer(turn.memory.cells, turn.memory.given_up, turn.first, turn.number)
