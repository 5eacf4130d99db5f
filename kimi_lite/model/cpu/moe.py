"""The feed-forward half of a layer as kernel operations: dense, or router, routed and shared experts."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.buffers import Buffers, RouterBuffers
from kimi_lite.model.cpu.experts import LayerExperts, layer_experts
from kimi_lite.model.cpu.ops import LayerOp, Reads, by_choice, by_pair, every_token, side_by_side
from kimi_lite.model.cpu.weights import matrix, vector
from kimi_lite.native.cpu.defer import divide_op
from kimi_lite.native.cpu.experts import experts_op, few_tokens_each
from kimi_lite.native.cpu.linear import Product, linear_op, rms_norm_op
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.router import route_op
from kimi_lite.native.cpu.run import RunTable


class ExpertGroup(NamedTuple):
    """Experts that run in one step: all of them routed, or all (`num_always`) taken by every token."""

    table: np.ndarray  # int64 (experts, 3, 9): of the layer, so that moved experts are found
    width: int
    num_always: int
    owner: LayerExperts  # of the bytes


class FeedForward:
    """Weights of one layer, under their GGUF names; the experts are `model.cpu.experts`' business."""

    def __init__(self, store: GGUFStore, config: ModelConfig, layer: int) -> None:
        self._prefix = f"blk.{layer}."
        self.config, self.layer = config, layer
        self.ffn_norm = vector(store, self._name("ffn_norm"))
        self.is_dense = layer < config.num_dense_layers
        self.experts = layer_experts(store, config, layer)
        self.exp_probs_b: np.ndarray | None = None
        if not self.is_dense:
            self.ffn_gate_inp = matrix(store, self._name("ffn_gate_inp"))
            if f"{self._prefix}exp_probs_b.bias" in store.tensors:
                self.exp_probs_b = vector(store, f"{self._prefix}exp_probs_b.bias")

    def _name(self, tensor: str) -> str:
        return f"{self._prefix}{tensor}.weight"

    def input_kinds(self) -> set[int]:
        """int8 forms that the products with the normed hidden state need."""
        router = set() if self.is_dense else {self.ffn_gate_inp.kind}
        return set().union(router, *(experts.input_kinds for experts in self.experts)) - {0}

    def split_experts(self) -> tuple[ExpertGroup, list[ExpertGroup]]:
        """The routed experts, and those that every token takes: a group or none. Not of a dense layer."""
        assert not self.is_dense
        first, *others = self.experts
        num_routed = first.num_routed
        shared = [ExpertGroup(each.table, each.width, each.num_always, each) for each in others]
        if first.num_always:
            shared.insert(0, ExpertGroup(first.table[num_routed:], first.width, first.num_always, first))
        return ExpertGroup(first.table[:num_routed], first.width, 0, first), shared

    def ops(self, run: RunTable, buffers: Buffers) -> list[LayerOp]:
        """x += feed_forward(norm(x))."""
        return [*self.choice_ops(run, buffers.x, buffers.router), *self.expert_ops(run, buffers)]

    def choice_ops(
        self, run: RunTable, x: np.ndarray, out: RouterBuffers, nudge: np.ndarray | None = None
    ) -> list[LayerOp]:
        """The norm and, where the layer is not dense, the choice of experts. nudge: see `native.cpu.router`."""
        c = self.config
        norm = LayerOp("ffn_norm", rms_norm_op(run, x, self.ffn_norm, out.normed, c.rms_norm_eps))
        if self.is_dense:
            return [norm]
        choice = route_op(
            run,
            out.logits,
            out.choice,
            self.exp_probs_b,
            out.ids,
            out.weights,
            groups=(c.num_expert_groups, c.num_expert_groups_used),
            is_sigmoid=c.expert_gating == "sigmoid",
            is_normalized=c.is_expert_weights_norm,
            scale=c.expert_weights_scale,
            nudge=nudge,
        )
        logits = linear_op(run, out.normed, Product(self.ffn_gate_inp, out.logits))
        reads = Reads((self._name("ffn_gate_inp"),), every_token(out.normed.values))
        return [norm, LayerOp("ffn_gate_inp", logits, (reads,)), LayerOp("choose experts", choice)]

    def deferring_ops(
        self, run: RunTable, buffers: Buffers, num_deferred: int, before: "FeedForward | None"
    ) -> list[LayerOp]:
        """`ops`, of which the last-ranked `num_deferred` experts of a generated token are left to the next layer; and
        what `before`, the layer before this one, has left is added. Not for importance matrices."""
        own, others = (buffers.deferral[(self.layer + i) % 2] for i in range(2))
        ops = self.choice_ops(run, buffers.x, own.router)
        ids = own.router.ids
        if num_deferred:
            ops.append(LayerOp("defer experts", divide_op(run, ids, own.now, own.later, num_deferred)))
            ids = own.now
        for experts in self.experts:
            router = own.router._replace(ids=ids) if experts.num_routed else buffers.no_router
            ops.append(
                LayerOp("experts", self._experts_op(run, buffers, experts, router._replace(normed=own.router.normed)))
            )
        if before is not None:
            group, _ = before.split_experts()
            left = others.router._replace(ids=others.later)
            op = self._experts_op(run, buffers, group.owner, left, group.table, num_always=0)
            ops.append(LayerOp("deferred experts", op))
        return ops

    def _experts_op(
        self,
        run: RunTable,
        buffers: Buffers,
        experts: LayerExperts,
        router: RouterBuffers,
        table: np.ndarray | None = None,
        num_always: int | None = None,
    ) -> Op:
        """x += the experts of `router.normed` that it names."""
        return experts_op(
            run,
            router.normed,
            buffers.x,
            experts.table if table is None else table,
            buffers.hidden(experts.width),
            router.ids,
            router.weights,
            num_always=experts.num_always if num_always is None else num_always,
            weights_owner=experts,
            has_few_each=few_tokens_each(buffers.capacity, self.config.num_experts_used, self.config.num_experts),
        )

    def expert_ops(self, run: RunTable, buffers: Buffers) -> list[LayerOp]:
        """x += the experts of normed x: the chosen ones and those that every token takes."""
        ops = []
        for experts in self.experts:
            has_routed = experts.num_routed > 0
            op = self._experts_op(run, buffers, experts, buffers.router if has_routed else buffers.no_router)
            stage = "experts" if has_routed else "dense ffn" if self.is_dense else "shared expert"
            ops.append(LayerOp(stage, op, tuple(self._expert_reads(experts, buffers, has_routed))))
        return ops

    def _expert_reads(self, experts: LayerExperts, buffers: Buffers, has_routed: bool) -> Iterator[Reads]:
        """What gate and up take, and down, of the experts in one step."""
        normed, hidden = buffers.normed.values, buffers.hidden(experts.width).values
        ids, num_experts = buffers.router.ids, self.config.num_experts
        if has_routed:
            into = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")
            yield Reads(tuple(map(self._name, into)), by_choice(normed, ids, num_experts))
            yield Reads((self._name("ffn_down_exps"),), by_pair(hidden, ids, num_experts), is_after=True)
        if experts.num_always:
            into = ("ffn_gate", "ffn_up") if self.is_dense else ("ffn_gate_shexp", "ffn_up_shexp")
            down = "ffn_down" if self.is_dense else "ffn_down_shexp"
            yield Reads(tuple(map(self._name, into)), every_token(normed))
            first_pair = ids.shape[1] if has_routed else 0
            whole = side_by_side(hidden, first_pair, experts.num_always)
            yield Reads((self._name(down),), whole, is_after=True)
