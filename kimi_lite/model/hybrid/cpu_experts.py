"""The experts that are not in VRAM, computed by the CPU where they lie, while the GPU does its part.

`compute`: each choice's product goes to a row of its own in pinned memory, so that the sum over a token's experts does
not depend on which of them were in VRAM. `sum_into`: the weighted sum, for prompts.
"""

from collections.abc import Iterator

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.experts.ram import RamSlots
from kimi_lite.model.cpu.experts import LayerExperts
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.experts import experts_op, experts_scratch_bytes, few_tokens_each
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.placement import place_threads
from kimi_lite.native.cpu.program import Op, Program
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


class ExpertBuffers:
    """What programs of experts work on, for up to `capacity` tokens; layers share them."""

    def __init__(
        self,
        config: ModelConfig,
        kinds: tuple[set[int], set[int]],
        capacity: int,
        num_threads: int,
        values: np.ndarray | None = None,
    ) -> None:
        """kinds: int8 forms of x and of hidden values. values: float32 (capacity, D) that others fill with x."""
        c, width, self.capacity = config, config.expert_feed_forward_size, capacity
        self.x = Activations(capacity, c.hidden_size, kinds[0], values)
        self.hidden = Activations(capacity * c.num_experts_used, width, kinds[1])
        self.ids = np.full((capacity, c.num_experts_used), -1, np.int32)
        self.weights = np.zeros((capacity, c.num_experts_used), np.float32)  # rows come unweighted
        self._tokens = np.zeros(capacity, np.int32)
        scratch_bytes = experts_scratch_bytes(c.hidden_size, width, capacity)
        self.run = RunTable(capacity, num_threads, scratch_bytes, capacity * c.num_experts_used)

    def set_tokens(self, count: int) -> None:
        """The next program is for so many tokens."""
        assert count <= self.capacity, (count, self.capacity)
        self.run.set_tokens(self._tokens[:count])


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
        is_divided: bool = False,
    ) -> None:
        """layers: the routed experts of each layer that has any. thread_counts: ascending, those that may be asked for.
        is_divided: threads are kept to memory nodes, where there are several.

        ram: brings experts from the disk where not all of them fit into RAM; it changes the layers' tables.
        """
        c = self._config = config
        self.capacity, self._layers, self._ram = capacity, layers, ram
        self._has_few_each = few_tokens_each(capacity, c.num_experts_used, c.num_experts)
        self.rows = streams.pinned((capacity * c.num_experts_used, c.hidden_size), torch.float32)
        self._kinds = (
            set().union(*(layer.input_kinds for layer in layers.values())),
            set().union(*(layer.hidden_kinds for layer in layers.values())),
        )
        self._teams = {count: Team(count, place_threads(count) if is_divided else ()) for count in thread_counts}
        self._buffers = self.buffers(capacity)
        self._sums = np.zeros((capacity, c.hidden_size), np.float32)
        self._row_programs = {layer: self._program(layer, is_summed=False) for layer in layers}
        self._sum_programs = {layer: self._program(layer, is_summed=True) for layer in layers}

    @property
    def num_choices(self) -> int:
        """Of a token in a layer, K."""
        return self._config.num_experts_used

    @property
    def holds_all(self) -> bool:
        """Whether every expert is in RAM, so that a program may take any."""
        return self._ram is None or self._ram.holds_all

    def team(self, num_threads: int) -> Team:
        """One of those that were asked for."""
        return self._teams[num_threads]

    def buffers(self, capacity: int, values: np.ndarray | None = None) -> ExpertBuffers:
        """For programs of `experts_op` on any of the teams; `values` as there."""
        return ExpertBuffers(self._config, self._kinds, capacity, max(self._teams), values)

    def experts_op(
        self,
        layer: int,
        buffers: ExpertBuffers,
        ids: np.ndarray,
        is_summed: bool = False,
        rows: np.ndarray | None = None,
    ) -> Op:
        """Of int32 `ids` (buffers.capacity, K) those that are not -1: each product into its row of `rows` (default: the
        class's own), or weighted into the sums of tokens. The inputs are quantized."""
        experts = self._layers[layer]
        return experts_op(
            buffers.run,
            buffers.x,
            self._sums,
            experts.table[: experts.num_routed],
            buffers.hidden,
            ids,
            buffers.weights,
            num_always=0,
            weights_owner=(experts, self._ram),
            has_few_each=not is_summed or self._has_few_each,
            per_choice=None if is_summed else self.rows.numpy() if rows is None else rows,
        )

    def arriving(self, layer: int, expert_ids: np.ndarray) -> Iterator[np.ndarray]:
        """What of int32 `expert_ids` (t, K), -1 for none, can be computed now, in the same form: all at once, or those
        that are there while the disk brings the others, in ascending order."""
        if self.holds_all:
            yield expert_ids
            return
        with self._ram.request(layer, expert_ids[expert_ids >= 0], is_ordered=True) as request:
            while experts := request.take():
                yield np.where(np.isin(expert_ids, experts), expert_ids, -1)

    def compute(self, layer: int, x: np.ndarray, expert_ids: np.ndarray, num_threads: int) -> None:
        """x float32 (t, D), expert_ids int32 (t, K), -1 for choices that are computed elsewhere; t <= capacity."""
        self._run_program(self._row_programs[layer], layer, x, expert_ids, num_threads)

    def sum_into(
        self, out: np.ndarray, layer: int, x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray, num_threads: int
    ) -> None:
        """out float32 (t, D) = sum over a token's choices that are not -1 of weight * product; the rest as
        `compute`."""
        self._buffers.weights[: len(x)], self._sums[: len(x)] = weights, 0
        self._run_program(self._sum_programs[layer], layer, x, expert_ids, num_threads)
        out[:] = self._sums[: len(x)]

    def close(self) -> None:
        """Ends the threads."""
        for team in self._teams.values():
            team.close()

    def _run_program(
        self, program: Program, layer: int, x: np.ndarray, expert_ids: np.ndarray, num_threads: int
    ) -> None:
        buffers, count = self._buffers, len(x)
        buffers.set_tokens(count)
        buffers.x.values[:count] = x
        for present in self.arriving(layer, expert_ids):
            buffers.ids[:count] = present
            self._teams[num_threads].run(program)

    def _program(self, layer: int, is_summed: bool) -> Program:
        """Quantize the inputs, then the routed experts of one layer."""
        buffers = self._buffers
        op = self.experts_op(layer, buffers, buffers.ids, is_summed)
        return Program([quantize_op(buffers.run, buffers.x), op])
