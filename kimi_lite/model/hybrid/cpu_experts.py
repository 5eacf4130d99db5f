"""The experts that are not in VRAM, computed by the CPU where they lie, while the GPU does its part.

`compute`: each choice's product goes to a row of its own in pinned memory, so that the sum over a token's experts does
not depend on which of them were in VRAM. `sum_into`: the weighted sum, for prompts.
"""

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.ram import RamSlots
from kimi_lite.model.cpu.experts import LayerExperts
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.experts import experts_op, experts_scratch_bytes, few_tokens_each
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team


class HostCopies:
    """Pinned copies of a layer's inputs for `capacity` tokens, written by the device in stream order.

    A copy is complete when an event after it has happened.
    """

    def __init__(self, streams: GpuStreams, capacity: int, hidden_size: int, top_k: int) -> None:
        self.x = streams.pinned((capacity, hidden_size), torch.float32)
        self.ids = streams.pinned((capacity, top_k), torch.int32)

    def copy_x(self, normed: torch.Tensor) -> None:
        self.x[: len(normed)].copy_(normed, non_blocking=True)

    def copy_ids(self, ids: torch.Tensor) -> None:
        self.ids[: len(ids)].copy_(ids, non_blocking=True)


class CpuExperts:
    """`rows`: float32 (capacity * K, D), pinned; row t * K + i is choice i of token t of the last `compute`."""

    def __init__(
        self,
        layers: dict[int, LayerExperts],
        config: ModelConfig,
        streams: GpuStreams,
        capacity: int,
        thread_counts: list[int],
        ram: RamSlots | None = None,
    ) -> None:
        """layers: the routed experts of each layer that has any. thread_counts: ascending, those that may be asked for.

        ram: brings experts from the disk where not all of them fit into RAM; it changes the layers' tables.
        """
        c, width = config, config.expert_feed_forward_size
        self.capacity, self._top_k, self._ram = capacity, c.num_experts_used, ram
        self._has_few_each = few_tokens_each(capacity, c.num_experts_used, c.num_experts)
        self.rows = streams.pinned((capacity * self._top_k, c.hidden_size), torch.float32)
        input_kinds = set().union(*(layer.input_kinds for layer in layers.values()))
        hidden_kinds = set().union(*(layer.hidden_kinds for layer in layers.values()))
        self._x = Activations(capacity, c.hidden_size, input_kinds)
        self._hidden = Activations(capacity * self._top_k, width, hidden_kinds)
        self._ids = np.full((capacity, self._top_k), -1, np.int32)
        self._weights = np.zeros((capacity, self._top_k), np.float32)  # rows come unweighted
        self._tokens = np.zeros(capacity, np.int32)
        scratch_bytes = experts_scratch_bytes(c.hidden_size, width, capacity)
        self._run = RunTable(capacity, thread_counts[-1], scratch_bytes, capacity * self._top_k)
        self._teams = {count: Team(count) for count in thread_counts}
        self._sums = np.zeros((capacity, c.hidden_size), np.float32)
        self._nothing = Program([])
        self._row_programs = {layer: self._program(experts, is_summed=False) for layer, experts in layers.items()}
        self._sum_programs = {layer: self._program(experts, is_summed=True) for layer, experts in layers.items()}

    def compute(self, layer: int, x: np.ndarray, expert_ids: np.ndarray, num_threads: int) -> None:
        """x float32 (t, D), expert_ids int32 (t, K), -1 for choices that are computed elsewhere; t <= capacity."""
        self._set_inputs(x, expert_ids)
        self._run_program(layer, self._row_programs[layer], expert_ids, num_threads)

    def sum_into(
        self, out: np.ndarray, layer: int, x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray, num_threads: int
    ) -> None:
        """out float32 (t, D) = sum over a token's choices that are not -1 of weight * product; the rest as
        `compute`."""
        self._set_inputs(x, expert_ids)
        self._weights[: len(x)], self._sums[: len(x)] = weights, 0
        self._run_program(layer, self._sum_programs[layer], expert_ids, num_threads)
        out[:] = self._sums[: len(x)]

    def _run_program(self, layer: int, program: Program, expert_ids: np.ndarray, num_threads: int) -> None:
        """All chosen experts at once, or those that are there while the disk brings the others, in ascending order."""
        team = self._teams[num_threads]
        if self._ram is None or self._ram.holds_all:
            team.run(program)
            return
        with self._ram.request(layer, expert_ids[expert_ids >= 0], is_ordered=True) as request:
            while experts := request.take():
                self._ids[: len(expert_ids)] = np.where(np.isin(expert_ids, experts), expert_ids, -1)
                team.run(program)

    def _set_inputs(self, x: np.ndarray, expert_ids: np.ndarray) -> None:
        count = len(x)
        assert count <= self.capacity, (count, self.capacity)
        self._x.values[:count], self._ids[:count] = x, expert_ids
        self._run.set_tokens(self._tokens[:count])

    def keep_awake(self, num_threads: int) -> None:
        """A moment of nothing on all threads, so that they are there when the GPU has chosen: waking them takes
        long."""
        self._teams[num_threads].run(self._nothing)

    def close(self) -> None:
        """Ends the threads."""
        for team in self._teams.values():
            team.close()

    def _program(self, experts: LayerExperts, is_summed: bool) -> Program:
        """Quantize the inputs, then the routed experts of one layer."""
        op = experts_op(
            self._run,
            self._x,
            self._sums,
            experts.table[: experts.num_routed],
            self._hidden,
            self._ids,
            self._weights,
            num_always=0,
            weights_owner=(experts, self._ram),
            has_few_each=not is_summed or self._has_few_each,
            per_choice=None if is_summed else self.rows.numpy(),
        )
        return Program([quantize_op(self._run, self._x), op])
