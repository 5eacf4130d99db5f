"""The feed-forward half of a layer as kernel operations: dense, or router, routed and shared experts."""

from typing import NamedTuple

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.attention import Op
from kimi_lite.model.cpu.buffers import Buffers, RouterBuffers
from kimi_lite.model.cpu.experts import layer_experts
from kimi_lite.model.cpu.weights import matrix, vector
from kimi_lite.native.cpu.experts import ExpertsOp
from kimi_lite.native.cpu.linear import linear_op, rms_norm_op
from kimi_lite.native.cpu.router import route_op


class ExpertGroup(NamedTuple):
    """Experts that run in one step: all of them routed, or (`num_always`) all of them everybody's."""

    table: np.ndarray  # int64 (experts, 3, 8): of the layer, so that moved experts are found
    width: int
    num_always: int


class FeedForward:
    """Weights of one layer, under their GGUF names; the experts are `model.cpu.experts`' business."""

    def __init__(self, store: GGUFStore, config: ModelConfig, layer: int) -> None:
        block = f"blk.{layer}"
        self.config = config
        self.ffn_norm = vector(store, f"{block}.ffn_norm.weight")
        self.is_dense = layer < config.num_dense_layers
        self.experts = layer_experts(store, config, layer)
        self.exp_probs_b: np.ndarray | None = None
        if not self.is_dense:
            self.ffn_gate_inp = matrix(store, f"{block}.ffn_gate_inp.weight")
            if f"{block}.exp_probs_b.bias" in store.tensors:
                self.exp_probs_b = vector(store, f"{block}.exp_probs_b.bias")

    def input_kinds(self) -> set[int]:
        """int8 forms that the products with the normed hidden state need."""
        router = set() if self.is_dense else {self.ffn_gate_inp.kind}
        return set().union(router, *(experts.input_kinds for experts in self.experts)) - {0}

    def split_experts(self) -> tuple[ExpertGroup, list[ExpertGroup]]:
        """The routed experts, and those that every token takes: a group or none. Not of a dense layer."""
        assert not self.is_dense
        first, *others = self.experts
        num_routed = len(first.table) - first.num_always
        shared = [ExpertGroup(first.table[num_routed:], first.width, first.num_always)] if first.num_always else []
        shared += [ExpertGroup(each.table, each.width, each.num_always) for each in others]
        return ExpertGroup(first.table[:num_routed], first.width, 0), shared

    def ops(self, run: int, buffers: Buffers) -> list[Op]:
        """x += feed_forward(norm(x))."""
        return [*self.choice_ops(run, buffers.x, buffers.router), *self.expert_ops(run, buffers)]

    def choice_ops(self, run: int, x: np.ndarray, out: RouterBuffers, nudge: np.ndarray | None = None) -> list[Op]:
        """The norm and, where the layer is not dense, the choice of experts. nudge: see `native.cpu.router`."""
        c = self.config
        norm = Op("ffn_norm", *rms_norm_op(run, x, self.ffn_norm, out.normed, c.rms_norm_eps))
        if self.is_dense:
            return [norm]
        choice = route_op(
            *(run, out.logits, out.choice, self.exp_probs_b, out.ids, out.weights),
            (c.num_expert_groups, c.num_expert_groups_used),
            is_sigmoid=c.expert_gating == "sigmoid",
            is_normalized=c.is_expert_weights_norm,
            scale=c.expert_weights_scale,
            nudge=nudge,
        )
        logits = linear_op(run, out.normed, [(self.ffn_gate_inp.table, out.logits, False)])
        return [norm, Op("ffn_gate_inp", *logits), Op("choose experts", *choice)]

    def expert_ops(self, run: int, buffers: Buffers) -> list[Op]:
        """x += the experts of normed x: the chosen ones and those of everybody."""
        ops = []
        for experts in self.experts:
            has_routed = len(experts.matrices) > experts.num_always
            step = ExpertsOp(
                run,
                buffers.normed,
                buffers.x,
                experts.table,
                buffers.hidden(experts.width),
                self.config.num_experts_used if has_routed else 0,
                experts.num_always,
                buffers.expert_ids,
                buffers.expert_weights,
            )
            buffers.keep(step)
            stage = "experts" if has_routed else "dense ffn" if self.is_dense else "shared expert"
            ops.append(Op(stage, step.kernel, step.arguments))
        return ops
