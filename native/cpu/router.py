"""Expert choice, float32 as in the reference implementations: scores, selection bias, groups, top-k, weights.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and Kimi K2: sigmoid scores, a bias that steers the choice but not the
weights, and optionally only the best groups of experts. DeepSeek-V2: softmax scores, no bias.
"""

import numpy as np
from numba import njit, types

from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import NUM_TOKENS, RunTable
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.simd import load_f32, load_i64, store_f32, store_i32

_INFINITY, _MINUS_INFINITY, _NAN = types.float32(np.inf), types.float32(-np.inf), types.float32(np.nan)
_LOWEST, _HIGHEST = types.float32(np.finfo(np.float32).min), types.float32(np.finfo(np.float32).max)


@njit(error_model="numpy")
def _scores(logits, num_experts, is_sigmoid):
    """Turns logits into scores in place. An infinite logit becomes NaN: its score of 0 or 1 would look healthy."""
    for e in range(num_experts):
        logit = load_f32(logits + 4 * e)
        store_f32(logits + 4 * e, logit + (logit - logit))
    if is_sigmoid:
        for e in range(num_experts):
            store_f32(logits + 4 * e, types.float32(1) / (types.float32(1) + np.exp(-load_f32(logits + 4 * e))))
        return
    peak = _MINUS_INFINITY
    for e in range(num_experts):
        peak = max(peak, load_f32(logits + 4 * e))
    total = types.float32(0)
    for e in range(num_experts):
        value = np.exp(load_f32(logits + 4 * e) - peak)
        store_f32(logits + 4 * e, value)
        total += value
    for e in range(num_experts):
        store_f32(logits + 4 * e, load_f32(logits + 4 * e) / total)


@njit
def _keep_best_groups(choice, num_experts, num_groups, num_kept, has_bias):
    """Masks the experts outside the best groups; a group's score is the sum of its two best (its best, without
    bias)."""
    size = num_experts // num_groups
    for rank in range(num_groups):  # drop the worst group until num_kept are left
        if rank >= num_groups - num_kept:
            return
        worst, worst_score = -1, types.float32(np.inf)
        for g in range(num_groups):
            best, second = _MINUS_INFINITY, _MINUS_INFINITY
            for e in range(g * size, (g + 1) * size):
                value = load_f32(choice + 4 * e)
                if value > best:
                    best, second = value, best
                elif value > second:
                    second = value
            score = best + second if has_bias else best
            if best > _LOWEST and score <= worst_score:  # of equals the last
                worst, worst_score = g, score
        if worst < 0:  # no score of any group is above the lowest
            return
        for e in range(worst * size, (worst + 1) * size):
            store_f32(choice + 4 * e, _LOWEST)


@njit(error_model="numpy")
def _rank(score):
    """A score to compare by: finite, so that an expert once taken (-inf) never comes back; NaN first, to be seen."""
    if np.isnan(score):
        return _HIGHEST
    return min(max(score, _LOWEST), _HIGHEST)


@kernel
def _route_kernel(args, thread, team):
    run, logits, choice, bias = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    ids, weights, num_experts, top_k = (
        load_i64(args + 32),
        load_i64(args + 40),
        load_i64(args + 48),
        load_i64(args + 56),
    )
    num_groups, num_kept, is_sigmoid = load_i64(args + 64), load_i64(args + 72), load_i64(args + 80) != 0
    is_normalized, scale, nudge = load_i64(args + 88) != 0, load_f32(args + 96), load_i64(args + 104)
    token = next_task(team)
    while token < load_i64(run + NUM_TOKENS):
        scores, chosen = logits + 4 * num_experts * token, choice + 4 * num_experts * token
        _scores(scores, num_experts, is_sigmoid)
        for e in range(num_experts):
            rank = load_f32(scores + 4 * e) + (load_f32(bias + 4 * e) if bias != 0 else types.float32(0))
            if nudge != 0:
                rank += load_f32(nudge + 4 * e)
            store_f32(chosen + 4 * e, _rank(rank))
            if not rank < _INFINITY:  # where only the bias is NaN or infinite
                store_f32(scores + 4 * e, _NAN)
        if num_groups > 1:
            _keep_best_groups(chosen, num_experts, num_groups, num_kept, bias != 0)
        total = types.float32(0)
        for i in range(top_k):
            best, best_value = 0, _MINUS_INFINITY
            for e in range(num_experts):
                value = load_f32(chosen + 4 * e)
                if value > best_value:
                    best, best_value = e, value
            store_f32(chosen + 4 * best, _MINUS_INFINITY)
            weight = load_f32(scores + 4 * best)
            total += weight
            store_i32(ids + 4 * (token * top_k + i), types.int32(best))
            store_f32(weights + 4 * (token * top_k + i), weight)
        factor = scale / (total + types.float32(1e-20)) if is_normalized else scale
        for i in range(top_k):
            at = weights + 4 * (token * top_k + i)
            store_f32(at, load_f32(at) * factor)
        token = next_task(team)


def route_op(
    run: RunTable,
    logits: np.ndarray,
    choice: np.ndarray,
    bias: np.ndarray | None,
    ids: np.ndarray,
    weights: np.ndarray,
    groups: tuple[int, int],
    is_sigmoid: bool,
    is_normalized: bool,
    scale: float,
    nudge: np.ndarray | None = None,
) -> Op:
    """logits, choice float32 (capacity, E) -> ids int32, weights float32 (capacity, top_k). groups: (number, kept).

    logits become scores; choice is working space. bias: float32 (E,) or None, for the choice alone. nudge: a second
    bias, whose content may change between runs: what an expert gains by lying in fast memory (arXiv 2412.00099).
    """
    assert logits.shape == choice.shape and ids.shape == weights.shape, (logits.shape, choice.shape, ids.shape)
    assert nudge is None or (nudge.dtype, nudge.shape) == (np.float32, logits.shape[1:]), (nudge.dtype, nudge.shape)
    assert ids.dtype == np.int32 and weights.dtype == np.float32, (ids.dtype, weights.dtype)
    arrays, sizes = (logits, choice, bias, ids, weights), (logits.shape[1], ids.shape[1], *groups)
    return Op.of(_route_kernel, run, *arrays, *sizes, is_sigmoid, is_normalized, float(scale), nudge)
