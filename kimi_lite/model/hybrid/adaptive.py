"""What changes between steps of its own accord: threads of the CPU's experts, promotions, where the two sides meet.

Every decode step in which nothing is compiled or captured is a measurement (`experts.costs`). Nothing of it is an
option: what pays on this machine, now, is found out, and `/experts` and the log say what was found.
"""

import logging

from kimi_lite.experts.costs import Growth, PromotionBudget, Tuner, promotion_words
from kimi_lite.experts.policy import LEAST_GAIN
from kimi_lite.model.hybrid.routed import RoutedExperts

MAX_PROMOTIONS = 32  # a step: 300 MB of Kimi K2.5's experts
_TOKENS_PER_PROMOTION = 4  # of a prompt: so many earn one of the promotions that follow it at once
_log = logging.getLogger(__name__)


class Adaptive:
    """`experts` may be None: a model without any has nothing to adapt."""

    def __init__(
        self, experts: RoutedExperts | None, thread_counts: list[int], max_promotions: int = MAX_PROMOTIONS
    ) -> None:
        """thread_counts: ascending, what may be tried; the last is where it begins."""
        self._experts = experts
        self._threads = Tuner(thread_counts, start=thread_counts[-1])
        self._budget = PromotionBudget(max_promotions, budget=min(2, max_promotions))
        self._growth = Growth()
        self._num_promoted = 0
        self._num_owed = 0  # promotions that a prompt has earned: what its tokens used is what its answer begins with

    def begin(self, num_tokens: int, is_decoding: bool) -> None:
        """Before a step. Prompts promote nothing: the bus has other work, and what they want of a layer is nearly
        everything; what their last tokens wanted comes in with the first steps of the answer."""
        if self._experts is None:
            return
        budget = 0
        if is_decoding:
            budget = max(self._budget.next(), self._num_owed if self._budget.budget > 0 else 0)
        else:
            self._budget.interrupt()
            self._num_owed = min(self._num_owed + num_tokens // _TOKENS_PER_PROMOTION, self._experts.slots.capacity)
        self._num_promoted = self._experts.begin_step(budget, num_tokens, self._least_gain)
        if is_decoding:  # what finds no expert worth it is owed no more
            self._num_owed = max(0, self._num_owed - self._num_promoted) if self._num_promoted else 0
        self._experts.num_threads = self._threads.value

    def end(self, num_tokens: int, context: int, elapsed_s: float, is_steady: bool) -> None:
        """After a decode step that took so long; `context`: positions that its longest sequence sees.

        is_steady: nothing was compiled or captured in it, so that its time is a measure of the steps to come.
        """
        if self._experts is None:
            return
        if is_steady and not self._num_owed:
            before = self._budget.budget
            self._budget.observe(num_tokens, self._num_promoted, elapsed_s, self._gain_s)
            if (before == 0) != (self._budget.budget == 0):
                words = promotion_words(self._budget.budget, self._budget.cost_s, self._gain_s)
                _log.info("experts copied to VRAM while it answers: %s", words)
        else:
            self._budget.interrupt()
        if is_steady and num_tokens == 1:  # steps of other sizes take other times
            self._threads.observe(elapsed_s)
        if self._growth.has_doubled(context):
            self._threads.restart()

    def counters(self) -> dict[str, float]:
        if self._experts is None:
            return {}
        costs = self._experts.costs
        return {
            "expert_threads": self._threads.value,
            "promotion_budget": self._budget.budget,
            "promotion_cost_s": self._budget.cost_s,
            "promotion_gain_s": self._gain_s,
            "stream_expert_s": costs.stream_s,
            "stream_expert_beside_s": costs.stream_beside_s,
            "cpu_expert_s": costs.cpu_s,
            "cpu_choice_s": costs.choice_s,
            "cpu_slowdown": costs.cpu_slowdown,
        }

    @property
    def _miss_s(self) -> float:
        """Of an expert that one token chose, on the CPU."""
        return self._experts.costs.cpu_s + self._experts.costs.choice_s

    @property
    def _gain_s(self) -> float:
        """CPU time that a promotion has saved, by those that were judged."""
        return self._experts.slots.policy.hits_per_promotion * self._miss_s

    @property
    def _least_gain(self) -> float:
        """Hits that a promotion must be expected to bring: what its copy costs."""
        return max(LEAST_GAIN, self._budget.cost_s / self._miss_s)
