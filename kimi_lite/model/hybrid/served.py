"""The CPU's side of a decode step: what the GPU finds missing in VRAM is computed while the step runs.

    server.begin(num_tokens, num_threads, limit_s)  # its thread waits for the first turn
    ...the GPU is given the whole step, in which it waits for the server's answers...
    server.finish()

Where all experts lie in RAM a step is one program of `native.cpu`: wait for x, quantize it, wait for the choices,
compute what is missing, answer, layer after layer, without a line of Python. Where the disk must bring experts, the
thread goes from layer to layer and computes what has come; the GPU sees no difference.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.model.hybrid.cpu_experts import CpuExperts, ExpertBuffers
from kimi_lite.model.hybrid.turns import TakenTurn, Turn, TurnMemory
from kimi_lite.native.cpu.defer import divide_op
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.cpu.turns import TurnTable, answer_op, wait_for_choices_op, wait_for_x_op
from kimi_lite.native.turn_cells import ANSWERED, EVERY_TURN, GIVEN_UP, MAX_TOKENS, STOP

_RESTART = "Restart kimi-lite; if it comes again, `kimi-lite doctor` says what the GPU and its driver are."

_GRACE_S = 5.0


@dataclass(slots=True, eq=False)
class _Step:
    """What the server's thread works on."""

    num_tokens: int
    num_threads: int
    first: int  # number of the last turn before it
    is_over: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class MissServer:
    """One thread uses it; `close` ends its own. `on_taken(turns)` is called there when the last turn is over."""

    def __init__(
        self,
        layers: Sequence[int],
        cpu: CpuExperts,
        memory: TurnMemory,
        on_taken: Callable[[list[TakenTurn]], None],
        num_deferred: int = 0,
    ) -> None:
        """layers: those with routed experts, ascending. num_deferred: of a token's experts, computed behind the turn's
        answer, except in the last layer."""
        self.memory, self.next_number = memory, 0
        self._layers, self._cpu, self._on_taken = list(layers), cpu, on_taken
        self._turn_of = {layer: turn for turn, layer in enumerate(self._layers, 1)}
        self._cells = memory.cells.numpy()
        self._chosen, self._missing = memory.chosen.numpy(), memory.missing.numpy()
        self._table = TurnTable(self._cells, len(self._layers))
        self._num_deferred = num_deferred
        self._buffers = [cpu.buffers(MAX_TOKENS, x.numpy()) for x in memory.x]  # a turn's experts may run into the next
        self._divided = np.full((2, 2, *self._missing.shape[1:]), -1, np.int32)  # for two turns: now, later
        answer = answer_op(self._table, len(self._layers))
        self._whole = Program([op for layer in self._layers for op in self._turn_ops(layer)] + [answer])
        self._arrivals = {layer: Program(self._arrival_ops(layer)) for layer in self._layers}
        self._present = {
            layer: Program([self._cpu.experts_op(layer, self._buffers_of(layer), self._buffers_of(layer).ids)])
            for layer in self._layers
        }
        self._last = Program([answer])
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._step = _Step(0, 0, 0)
        self._thread = threading.Thread(target=self._work, daemon=True, name="kimi-lite-misses")
        self._thread.start()

    def turn(self, layer: int, first: torch.Tensor) -> Turn:
        """The layer's, in steps whose GPU finds the number before their first turn in `first`, int64 (1,)."""
        return Turn(self.memory, self._turn_of[layer], first)

    def begin(self, num_tokens: int, num_threads: int, limit_s: float) -> None:
        """A step whose GPU is told `next_number` as it was before this call. limit_s: no turn may take the GPU
        longer."""
        self._step = step = _Step(num_tokens, num_threads, self.next_number)
        self.next_number += len(self._layers)
        self._table.begin(step.first, limit_s)
        self._queue.put(partial(self._serve, step))

    @property
    def is_over(self) -> threading.Event:
        """Set when all turns of the step that began last are over, or given up."""
        return self._step.is_over

    @property
    def computed_ns(self) -> np.ndarray:
        """int64 (turns, 2): when the CPU's experts ran in the last step, on the clock of `time.monotonic_ns`."""
        return self._table.computed_ns

    def finish(self) -> None:
        """Waits until all turns are over. Raises KimiLiteError for what kept one of the two sides waiting, and whatever
        ended the CPU's."""
        step, given_up = self._step, int(self._cells[GIVEN_UP])
        if given_up > step.first:
            self._cells[STOP] = 1
            step.is_over.wait(_GRACE_S)  # the CPU hangs: it may never be
            layer = self._layers[given_up - step.first - 1]
            raise KimiLiteError(f"The GPU waited in vain for the CPU's experts of layer {layer}.", _RESTART)
        step.is_over.wait()
        if step.error is not None:
            raise step.error
        if self._table.late:
            layer = self._layers[self._table.late - 1]
            raise KimiLiteError(f"The GPU did not get to the experts of layer {layer} in time.", _RESTART)

    def cancel(self) -> None:
        """Gives up the step that is on, if one is: the GPU waits for none of its turns any more. An exception may have
        come in the middle of `begin`."""
        self._cells[STOP] = 1
        is_idle = threading.Event()
        self._queue.put(is_idle.set)
        is_idle.wait()

    def close(self) -> None:
        self._cells[STOP] = 1
        self._queue.put(None)
        self._thread.join()

    def _buffers_of(self, layer: int) -> ExpertBuffers:
        return self._buffers[self._turn_of[layer] % 2]

    def _turn_ops(self, layer: int) -> list[Op]:
        """Arrival, what is missing, and behind the answer what is missing of those that are deferred."""
        turn, buffers = self._turn_of[layer], self._buffers_of(layer)
        missing, ops = self._missing[turn - 1], self._arrival_ops(layer)
        if not self._num_deferred or layer == self._layers[-1]:
            return [*ops, self._cpu.experts_op(layer, buffers, missing)]
        now, later = self._divided[turn % 2]
        late_rows = self.memory.late_rows[turn % 2].numpy()
        return [
            *ops,
            divide_op(buffers.run, missing, now, later, self._num_deferred, only_generated=False),
            self._cpu.experts_op(layer, buffers, now),
            answer_op(self._table, turn),
            self._cpu.experts_op(layer, buffers, later, rows=late_rows),
        ]

    def _arrival_ops(self, layer: int) -> list[Op]:
        """Until the layer's inputs and choices are there; the turn before is answered first."""
        buffers, turn = self._buffers_of(layer), self._turn_of[layer]
        run = buffers.run
        return [
            wait_for_x_op(run, self._table, turn),
            quantize_op(run, buffers.x),
            wait_for_choices_op(run, self._table, turn),
        ]

    def _work(self) -> None:
        """The thread's, until it is given None."""
        while (call := self._queue.get()) is not None:
            call()

    def _serve(self, step: _Step) -> None:
        try:
            self._take_turns(step.num_tokens, self._cpu.team(step.num_threads))
        except BaseException as error:
            step.error = error
            self._cells[STOP] = 1
        if self._cells[STOP]:
            self._cells[ANSWERED] = EVERY_TURN
        step.is_over.set()

    def _take_turns(self, num_tokens: int, team: Team) -> None:
        for buffers in self._buffers:
            buffers.set_tokens(num_tokens)
        if self._cpu.holds_all:
            team.run(self._whole)
        else:
            self._serve_by_layer(num_tokens, team)
        if not self._cells[STOP]:
            self._on_taken([self._taken(layer, num_tokens) for layer in self._layers])

    def _serve_by_layer(self, num_tokens: int, team: Team) -> None:
        """What runs next depends on what the disk has brought."""
        for layer in self._layers:
            team.run(self._arrivals[layer])
            if self._cells[STOP]:
                return
            missing = self._missing[self._turn_of[layer] - 1, :num_tokens]
            for present in self._cpu.arriving(layer, missing):
                self._buffers_of(layer).ids[:num_tokens] = present
                team.run(self._present[layer])
        team.run(self._last)

    def _taken(self, layer: int, num_tokens: int) -> TakenTurn:
        turn = self._turn_of[layer]
        waited_s, elapsed_s = self._table.times_s(turn)
        chosen, missing = (ids[turn - 1, :num_tokens].copy() for ids in (self._chosen, self._missing))
        return TakenTurn(layer, chosen, missing, waited_s, elapsed_s)
