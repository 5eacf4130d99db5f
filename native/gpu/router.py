"""Expert choice in one launch: scores, selection bias, groups, top-k and weights, as `native.reference.route`, and
which of the chosen experts have a slot.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and Kimi K2: sigmoid scores, a bias that steers the choice and not the
weights.
"""

import torch
import triton
import triton.language as tl

from kimi_lite.native.gpu.arguments import Posting, Routes
from kimi_lite.native.gpu.support import is_interpreted
from kimi_lite.native.gpu.turns import post
from kimi_lite.native.turn_cells import CHOICES_POSTED, MAX_TOKENS, X_POSTED

_HIGHEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # a NaN ranks as that: first, so that it is seen


@triton.jit
def best_of(values, index):
    """(largest value, the lowest index that has it)."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, index, 1 << 30), 0)


@triton.jit
def keep_best_groups(choice, expert, NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, NUM_KEPT: tl.constexpr,
                     HAS_BIAS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Lowers the experts outside the best groups; a group counts by its two best with a bias, by its best without."""
    size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group = expert // size
    score = tl.full((TILE,), float("-inf"), tl.float32)  # of each expert's group
    for g in range(NUM_GROUPS):
        inside = tl.where(group == g, choice, float("-inf"))
        value, place = best_of(inside, expert)
        if HAS_BIAS:
            value += tl.max(tl.where(expert == place, float("-inf"), inside), 0)
        score = tl.where(group == g, value, score)
    is_kept = expert < 0
    for _ in range(NUM_KEPT):
        left = tl.where(is_kept | (expert >= NUM_EXPERTS), float("-inf"), score)
        _value, place = best_of(left, expert)
        is_kept = is_kept | (group == place // size)
    return tl.where(is_kept, choice, float("-inf"))


@triton.jit(do_not_specialize=["turn"])
def route_kernel(
    logits, bias, slot_of, ids, weights, slots, chosen_out, missing_out, x_posted, choices_posted, first, turn, scale,
    cache_bias, logits_stride, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr,
    NUM_KEPT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SLOTS: tl.constexpr,
    IS_POSTED: tl.constexpr, IS_INTERPRETED: tl.constexpr, IS_SIGMOID: tl.constexpr, IS_NORMALIZED: tl.constexpr,
    TILE: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Program: one token. What kernels before it wrote for the CPU is there when it begins."""
    token = tl.program_id(0).to(tl.int64)
    if IS_POSTED:
        number = tl.load(first) + turn
        post(x_posted + token, number, IS_INTERPRETED)
    expert = tl.arange(0, TILE)
    is_expert = expert < NUM_EXPERTS
    logit = tl.load(logits + token * logits_stride + expert, is_expert, other=float("-inf")).to(tl.float32)
    logit = tl.where(is_expert, logit + (logit - logit), logit)  # an infinity becomes NaN: its score would look healthy
    if IS_SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(tl.where(is_expert, score, 0.0), 0)
    added = tl.zeros((TILE,), tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + expert, is_expert, other=0.0)
    if HAS_GAIN:
        added += tl.where(tl.load(slot_of + expert, is_expert, other=-1) >= 0, cache_bias, 0.0)
    choice = score + added
    score = tl.where(choice < float("inf"), score, float("nan"))
    choice = tl.where(choice != choice, _HIGHEST, tl.minimum(tl.maximum(choice, -_HIGHEST), _HIGHEST))
    choice = tl.where(is_expert, choice, float("-inf"))
    if NUM_GROUPS > 1:
        choice = keep_best_groups(choice, expert, NUM_EXPERTS, NUM_GROUPS, NUM_KEPT, HAS_BIAS, TILE)
    place = tl.arange(0, CHOICES)
    chosen, weight = tl.zeros((CHOICES,), tl.int32), tl.zeros((CHOICES,), tl.float32)
    for k in tl.static_range(TOP_K):
        _value, best = best_of(choice, expert)
        chosen = tl.where(place == k, best, chosen)
        weight = tl.where(place == k, tl.sum(tl.where(expert == best, score, 0.0), 0), weight)
        choice = tl.where(expert == best, float("-inf"), choice)
    factor = scale
    if IS_NORMALIZED:
        factor = scale / (tl.sum(weight, 0) + 1e-20)
    tl.store(ids + token * TOP_K + place, chosen, place < TOP_K)
    tl.store(weights + token * TOP_K + place, weight * factor, place < TOP_K)
    if HAS_SLOTS:
        slot = tl.load(slot_of + chosen, place < TOP_K, other=-1)
        tl.store(slots + token * TOP_K + place, slot, place < TOP_K)
        if IS_POSTED:
            tl.store(chosen_out + token * TOP_K + place, chosen, place < TOP_K)
            tl.store(missing_out + token * TOP_K + place, tl.where(slot < 0, chosen, -1), place < TOP_K)
            post(choices_posted + token, number, IS_INTERPRETED)


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    groups: tuple[int, int] = (1, 1),
    is_sigmoid: bool = True,
    is_normalized: bool = True,
    scale: float = 1.0,
    slot_of: torch.Tensor | None = None,
    cache_bias: float = 0.0,
    posting: Posting | None = None,
    out: Routes | None = None,
) -> Routes:
    """logits (T, E) -> ids int32 (T, top_k), best first, and weights float32 (T, top_k). groups: (number, how many are
    kept).

    bias: float32 (E,) for the choice alone. Of equals the lower number wins. NaN and infinity come first with the
    weight NaN. slot_of: int32 (E,), read as it is when the kernel runs: the choices' slots are found too, and experts
    that have one gain `cache_bias` in the choice (arXiv 2412.00099).

    posting (with slot_of): the CPU, which waits, is told first that its x is there, which a kernel before this one has
    written, then what was chosen and what of it is missing: X_POSTED and CHOICES_POSTED of every token become first +
    turn.
    """
    num_tokens, num_experts = logits.shape
    assert num_experts % groups[0] == 0 and top_k <= num_experts // groups[0] * groups[1], (num_experts, groups, top_k)
    assert logits.stride(1) == 1 and (bias is None or bias.shape == (num_experts,)), (logits.stride(), num_experts)
    assert slot_of is None or (slot_of.shape == (num_experts,) and slot_of.dtype == torch.int32), slot_of
    assert slot_of is not None or not cache_bias, cache_bias
    if out is None:
        ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
        weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
        out = Routes(ids, weights, None if slot_of is None else torch.empty_like(ids))
    for part in (out.ids, out.weights, out.slots):
        assert part is None or (part.is_contiguous() and part.shape == (num_tokens, top_k)), (part.shape, part.stride())
    if posting is None:
        chosen, missing, x_posted, choices_posted, first, turn = (*[out.ids] * 5, 0)
    else:
        assert slot_of is not None and num_tokens <= MAX_TOKENS, num_tokens
        chosen, missing, cells, first, turn = posting
        for part in (chosen, missing):
            assert part.is_contiguous() and part.dtype == torch.int32 and part.shape[1] == top_k, (part.shape, top_k)
        x_posted, choices_posted = cells[X_POSTED:], cells[CHOICES_POSTED:]
    assert (out.slots is None) == (slot_of is None), "slots are for a table of slots"
    if num_tokens > 0:
        route_kernel[(num_tokens,)](
            logits, logits if bias is None else bias, out.ids if slot_of is None else slot_of, out.ids, out.weights,
            out.ids if out.slots is None else out.slots, chosen, missing, x_posted, choices_posted, first, turn, scale,
            cache_bias, logits.stride(0), NUM_EXPERTS=num_experts, TOP_K=top_k, NUM_GROUPS=groups[0],
            NUM_KEPT=groups[1], HAS_BIAS=bias is not None, HAS_GAIN=cache_bias != 0, HAS_SLOTS=out.slots is not None,
            IS_POSTED=posting is not None, IS_INTERPRETED=is_interpreted(), IS_SIGMOID=is_sigmoid,
            IS_NORMALIZED=is_normalized, TILE=triton.next_power_of_2(num_experts),
            CHOICES=triton.next_power_of_2(top_k), num_warps=4,
        )  # fmt: skip
    return out
