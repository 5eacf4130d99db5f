"""The layers of a model whose routed experts do not fit into RAM: the CPU path with a disk behind it.

Every layer runs in steps: attention and router in one program, then the experts, as `experts.ram` has or gets
them. A few tokens (decoding): experts that are there are computed while the disk brings the others; each leaves its
products in rows of its own, and a join adds them in expert order. Many tokens (a prompt): nearly every expert is
needed, so they pass through the slots in order, some being read while others are computed. Either way the result has
the same bits as with all experts in memory.

While a layer's experts run, the next one's are guessed: its router is applied to the hidden state before this layer's
experts have added to it, and what it names is read when nothing else is.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.ram import ExpertRequest, RamSlots
from kimi_lite.model.batch import Cancelled
from kimi_lite.model.cpu.buffers import RouterBuffers
from kimi_lite.model.cpu.layers import Layers
from kimi_lite.model.cpu.moe import ExpertGroup
from kimi_lite.model.cpu.ops import LayerOp, make_program
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.experts import experts_op, few_tokens_each
from kimi_lite.native.cpu.join import join_op
from kimi_lite.native.cpu.program import Program

MAX_CHOICE_TOKENS = 8  # up to here experts are computed as they come; longer batches take them in order
_MAX_GUESSES = 32  # experts of the next layer that are read ahead of a prompt


class _Steps:
    """One layer as programs; `before` is all that a dense layer has."""

    def __init__(self, before: Program) -> None:
        self.before = before
        self.whole = self.first = self.more = self.join = self.group = self.shared = before


class TieredLayers:
    """Runs embedding and layers of a batch that `Transformer` has prepared."""

    def __init__(self, slots: RamSlots, config: ModelConfig, layers: Layers, cache_bias: float) -> None:
        """slots: named by the layers' tables. cache_bias: what experts that are there gain at the router."""
        self.config, self.slots = config, slots
        self._cache_bias, self._layers = cache_bias, layers
        self._run, self._buffers, self._team = layers.run, layers.buffers, layers.team
        self._feed_forward = layers.feed_forward
        self.programs: list[tuple[Program, list[tuple[str, str]]]] = []  # with (part, stage) of each operation
        self._nudges = {layer: np.zeros(config.num_experts, np.float32) for layer in slots.index.layers if cache_bias}
        self._make_buffers()
        self._embed = self._program("embedding", layers.embedding_ops())
        self._steps = [self._lay_out(layer) for layer in range(config.num_layers)]

    def run(
        self,
        num_tokens: int,
        should_stop: Callable[[], bool] | None = None,
        on_choice: Callable[[int, np.ndarray], None] | None = None,
    ) -> None:
        """All layers. Raises `Cancelled` between layers of a long batch, KimiLiteError where the disk fails."""
        is_long = num_tokens > MAX_CHOICE_TOKENS
        should_stop = should_stop if is_long and should_stop else lambda: False
        if should_stop():
            raise Cancelled
        self.slots.begin(num_tokens)
        self._team.run(self._embed)
        self._layers.place_features()
        for layer, steps in enumerate(self._steps):
            if should_stop():
                raise Cancelled
            if layer in self._nudges:
                np.multiply(self.slots.residents(layer), self._cache_bias, out=self._nudges[layer], casting="unsafe")
            self._team.run(steps.before)
            if steps.whole is steps.before:
                continue
            ids = self._buffers.router.ids[:num_tokens]
            if on_choice:
                on_choice(layer, ids)
            with self.slots.request(layer, ids, is_ordered=is_long) as request:
                if not is_long:
                    self._guess_next(layer, num_tokens)
                if request.is_all_there:
                    self._team.run(steps.whole)
                elif is_long:
                    self._run_in_order(layer, request, ids)
                else:
                    self._run_as_they_come(steps, request, ids)

    def _run_as_they_come(self, steps: _Steps, request: ExpertRequest, ids: np.ndarray) -> None:
        """What is there and the shared experts, then what the disk brings; the join puts them in order."""
        program = steps.first
        if not request.has_some_there:
            self._ids[: len(ids)] = -1
            self._team.run(program)
            program = steps.more
        while experts := request.take():
            self._choose(ids, experts)
            self._team.run(program)
            program = steps.more
        self._team.run(steps.join)

    def _run_in_order(self, layer: int, request: ExpertRequest, ids: np.ndarray) -> None:
        """Groups of experts in ascending order add to the output one after the other, as a single step would."""
        steps = self._steps[layer]
        while experts := request.take():
            if not request.num_left:
                self._guess_next(layer, len(ids))
            self._choose(ids, experts)
            self._team.run(steps.group)
        self._team.run(steps.shared)

    def _choose(self, ids: np.ndarray, experts: Sequence[int]) -> None:
        """The next program computes these experts and no others."""
        is_chosen = np.zeros(self.config.num_experts, bool)
        is_chosen[experts] = True
        np.copyto(self._ids[: len(ids)], np.where(is_chosen[ids], ids, -1))

    def _guess_next(self, layer: int, num_tokens: int) -> None:
        if layer + 1 < len(self._steps):
            guess = np.unique(self._guess.ids[:num_tokens])
            self.slots.prefetch(layer + 1, guess[:_MAX_GUESSES])

    def _make_buffers(self) -> None:
        c, capacity = self.config, self._buffers.capacity
        routed = [rest for rest in self._feed_forward if not rest.is_dense]
        self._ids = np.full((capacity, c.num_experts_used), -1, np.int32)  # the choices of one step; -1: of another
        self._rows = np.zeros((MAX_CHOICE_TOKENS * c.num_experts_used, c.hidden_size), np.float32)
        self._shared_rows = np.zeros((MAX_CHOICE_TOKENS * max(1, c.num_shared_experts), c.hidden_size), np.float32)
        self._no_choice = np.zeros((capacity, 0), np.int32), np.zeros((capacity, 0), np.float32)
        kinds = set().union(*({rest.ffn_gate_inp.kind} for rest in routed)) - {0}
        self._guess = RouterBuffers.make(Activations(capacity, c.hidden_size, kinds), c.num_experts, c.num_experts_used)

    def _program(self, part: str, ops: list[LayerOp]) -> Program:
        """Registered for `tools.bench` and `tools.trace`."""
        program = make_program(ops)
        self.programs.append((program, [(part, op.stage) for op in ops]))
        return program

    def _lay_out(self, layer: int) -> _Steps:
        rest, part, attention = self._feed_forward[layer], f"layer {layer}", self._layers.attention_ops(layer)
        run, buffers = self._run, self._buffers
        choice = rest.choice_ops(run, buffers.x, buffers.router, self._nudges.get(layer))
        if rest.is_dense:
            return _Steps(self._program(part, [*attention, *choice, *rest.expert_ops(run, buffers)]))
        steps = _Steps(self._program(part, [*attention, *choice, *self._guess_ops(layer + 1)]))
        steps.whole = self._program(part, rest.expert_ops(run, buffers))
        routed, shared = rest.split_experts()
        choices = self._experts_op("experts", routed, self._rows)
        others = [self._experts_op("shared expert", group, self._shared_rows) for group in shared]
        steps.first = self._program(part, [choices, *others])
        steps.more = self._program(part, [choices])
        steps.join = self._program(part, [self._join_op(group) for group in (routed, *shared)])
        steps.group = self._program(part, [self._experts_op("experts", routed, None)])
        steps.shared = self._program(part, [self._experts_op("shared expert", group, None) for group in shared])
        return steps

    def _guess_ops(self, layer: int) -> list[LayerOp]:
        """The next layer's router on what this layer's experts have not been added to."""
        if layer == len(self._feed_forward):
            return []
        ops = self._feed_forward[layer].choice_ops(self._run, self._buffers.x, self._guess, self._nudges.get(layer))
        return [LayerOp("guess", each.op) for each in ops]

    def _experts_op(self, stage: str, group: ExpertGroup, rows: np.ndarray | None) -> LayerOp:
        """A step of the routed experts (the choices in `_ids`) or of the shared ones: into rows of their own, or added
        to x."""
        buffers = self._buffers
        ids, weights = self._no_choice if group.num_always else (self._ids, buffers.router.weights)
        op = experts_op(
            self._run,
            buffers.normed,
            buffers.x,
            group.table,
            buffers.hidden(group.width),
            ids,
            weights,
            num_always=group.num_always,
            weights_owner=(group.owner, self.slots),
            has_few_each=few_tokens_each(buffers.capacity, self.config.num_experts_used, self.config.num_experts),
            per_choice=rows,
        )
        return LayerOp(stage, op)

    def _join_op(self, group: ExpertGroup) -> LayerOp:
        x, router = self._buffers.x, self._buffers.router
        if group.num_always:
            return LayerOp("join", join_op(self._run, self._shared_rows, *self._no_choice, group.num_always, x))
        return LayerOp("join", join_op(self._run, self._rows, router.ids, router.weights, 0, x))
