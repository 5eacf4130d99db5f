"""Looks after one step while the model runs it: whether it is still wanted, and how far the prompts in it are.

The model asks `should_stop()` before every layer, so the questions tell the progress inside a chunk.
"""

from collections.abc import Callable, Set
from collections.abc import Sequence as Many

from kimi_lite.engine.scheduler import Work

OnPrefill = Callable[[str, int, int], None]  # request id, prompt tokens done, prompt tokens in all


class StepWatch:
    """The `should_stop` of one step. `cancelled`: ids of requests no longer wanted; it may change at any time."""

    def __init__(self, work: Many[Work], num_layers: int, cancelled: Set[str], on_prefill: OnPrefill | None) -> None:
        self._work, self._num_layers, self._cancelled, self._on_prefill = work, num_layers, cancelled, on_prefill
        self._num_asked = 0
        self._reported: dict[str, int] = {}
        self._report()

    def __call__(self) -> bool:
        """Whether most of the step is for requests that are no longer wanted."""
        self._report()
        self._num_asked += 1
        num_unwanted = sum(item.num_tokens for item in self._work if item.sequence.request.id in self._cancelled)
        return 2 * num_unwanted > sum(item.num_tokens for item in self._work)

    def _report(self) -> None:
        """Tell of every prompt whose share of done layers makes another token than last time."""
        if self._on_prefill is None:
            return
        num_layers_done = min(self._num_asked, self._num_layers)
        for sequence, num_tokens in self._work:
            name, done = (
                sequence.request.id,
                sequence.pages.num_computed + num_tokens * num_layers_done // self._num_layers,
            )
            if sequence.num_generated == 0 and done > self._reported.get(name, -1):
                self._reported[name] = done
                self._on_prefill(name, done, len(sequence.token_ids))
