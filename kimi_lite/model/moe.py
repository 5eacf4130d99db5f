"""The feed-forward half of a layer as kernel operations: dense, or router, routed and shared experts."""

import numpy as np

from kimi_lite.memory.experts import layer_experts
from kimi_lite.memory.gguf_store import GGUFStore
from kimi_lite.model.attention import Op
from kimi_lite.model.buffers import Buffers
from kimi_lite.model.config import ModelConfig
from kimi_lite.model.weights import matrix, vector
from native.cpu.experts import ExpertsOp
from native.cpu.linear import linear_op, rms_norm_op
from native.cpu.router import route_op


class FeedForward:
    """Weights of one layer, under their GGUF names; the experts are `memory.experts`' business."""

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

    def ops(self, run: int, buffers: Buffers) -> list[Op]:
        """x += feed_forward(norm(x))."""
        ops = [Op("ffn_norm", *rms_norm_op(run, buffers.x, self.ffn_norm, buffers.normed, self.config.rms_norm_eps))]
        if not self.is_dense:
            ops += self._route_ops(run, buffers)
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

    def _route_ops(self, run: int, buffers: Buffers) -> list[Op]:
        c = self.config
        choice = route_op(
            *(run, buffers.router_logits, buffers.router_choice, self.exp_probs_b),
            *(buffers.expert_ids, buffers.expert_weights, (c.num_expert_groups, c.num_expert_groups_used)),
            is_sigmoid=c.expert_gating == "sigmoid",
            is_normalized=c.is_expert_weights_norm,
            scale=c.expert_weights_scale,
        )
        logits = linear_op(run, buffers.normed, [(self.ffn_gate_inp.table, buffers.router_logits, False)])
        return [Op("ffn_gate_inp", *logits), Op("choose experts", *choice)]
