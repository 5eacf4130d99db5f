"""The cliff of a cache of experts in VRAM: how many slots a long context may take before the cache finds little.

Slots are counted in T, the routed experts that one token uses in all layers (480 for Kimi K2.5). With few T what a
token brings in pushes out what the next one wants: `tools.cache` finds 46 % of the choices at 1.9 T, 33 % at 1 T, 28 %
at 0.75 T, and LRU caches of others found nothing below 1 T.
"""

from collections.abc import Callable
from dataclasses import replace

from kimi_lite.options import Options
from kimi_lite.plan.types import Plan, PlanInputs

LEAST_TOKENS = 1.5  # T
_STEP = 1024  # tokens of context: those that are proposed are whole steps


def token_experts(plan: Plan) -> int:
    """T."""
    return plan.sizes.config.num_moe_layers * plan.sizes.config.num_experts_used


def warn_of_cliff(plan: Plan, lay_out: Callable[[PlanInputs], Plan]) -> str:
    """Where the context leaves less than 1.5 T and another choice leaves more, what does; else nothing. All that it
    proposes has been planned."""
    wanted = LEAST_TOKENS * token_experts(plan)
    is_own_wish = plan.limits.num_gpu_experts is not None
    is_cache = plan.is_on_gpu and 0 < plan.sizes.num_experts != plan.num_vram_slots
    if not is_cache or is_own_wish or plan.num_vram_slots >= wanted:
        return ""
    small = replace(plan.limits, kv_dtype="q8")
    wishes = [("--kv-dtype q8 ", small)] * (plan.limits.kv_dtype != "q8") + [("", plan.limits)]
    remedies = [remedy for flag, limits in wishes if (remedy := _remedy(plan, flag, limits, lay_out))]
    if not remedies:
        return ""
    have, num_slots = plan.num_vram_slots / token_experts(plan), f"{plan.num_vram_slots:,}"
    return (
        f"A context of {plan.context_length:,} tokens leaves VRAM for {num_slots} experts, {have:.1f} times what a "
        f"token uses: below {LEAST_TOKENS} times few are found there. Try {' or '.join(remedies)}."
    )


def _remedy(plan: Plan, flag: str, limits: Options, lay_out: Callable[[PlanInputs], Plan]) -> str:
    """The longest context that leaves enough slots with these limits, and how many it leaves; "" where none does."""

    def num_slots(length: int) -> int:
        changed = replace(limits, context_length=length)
        return lay_out(replace(plan.situation, limits=changed)).num_vram_slots

    wanted = LEAST_TOKENS * token_experts(plan)
    if flag and (count := num_slots(plan.context_length)) >= wanted:
        return f"{flag.strip()} ({count:,} experts)"
    length = _longest(plan, lambda length: num_slots(length) >= wanted)
    return f"{flag}-c {length // _STEP}K ({num_slots(length):,} experts)" if length else ""


def _longest(plan: Plan, is_enough: Callable[[int], bool]) -> int:
    """The longest shorter context, in whole steps, that is enough; 0 where none is."""
    low, high = 0, (plan.context_length - 1) // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_enough(middle * _STEP) else (low, middle - 1)
    return low * _STEP
