"""What changes between steps of its own accord: threads of the CPU's experts, promotions, where the two sides meet.

Every decode step in which nothing is compiled or captured is a measurement (`experts.costs`).
"""

from kimi_lite.experts.costs import Growth, PromotionBudget, Tuner
from kimi_lite.model.hybrid.routed import RoutedExperts

MAX_PROMOTIONS = 4  # a step: 37 MB of Kimi K2.5's experts, 2 ms of the bus


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

    def begin(self, num_tokens: int, is_decoding: bool) -> None:
        """Before a step. Long prompts promote nothing: the bus has other work, and what they want is no guide to
        decoding."""
        if self._experts is None:
            return
        if not is_decoding:
            self._budget.interrupt()
        budget = self._budget.next() if is_decoding else 0
        self._num_promoted = self._experts.begin_step(budget, num_tokens)
        self._experts.num_threads = self._threads.value

    def end(self, num_tokens: int, context: int, elapsed_s: float, is_steady: bool) -> None:
        """After a decode step that took so long; `context`: positions that its longest sequence sees.

        is_steady: nothing was compiled or captured in it, so that its time is a measure of the steps to come.
        """
        if self._experts is None:
            return
        slots, costs = self._experts.slots, self._experts.costs
        if is_steady:
            hits_per_promotion = slots.num_hits / max(1, slots.num_promotions)
            gain_s = hits_per_promotion * (costs.cpu_s + costs.choice_s)
            self._budget.observe(num_tokens, self._num_promoted, elapsed_s, gain_s)
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
            "stream_expert_s": costs.stream_s,
            "cpu_expert_s": costs.cpu_s,
            "cpu_choice_s": costs.choice_s,
        }
