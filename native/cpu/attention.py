"""Absorbed multi-head latent attention, the form for decoding (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The key up-projection is moved to the query, so that all heads attend to the one cached latent of each position:

    absorb   q' = [W_UK^T q_nope | rotated q_rope] * softmax_scale
    attend   per token, group of heads and span of positions: online softmax over pages, context in latent space
    combine  spans merged, then W_UV brings the context of each head to its values

A page is read once for up to 8 heads; long contexts are split into spans so that all cores have work (flash decoding).
How a token's context is split depends on its own position alone: neither the other tokens nor the threads change its
result. W_UK and W_UV of a head are read once for up to 8 tokens.
"""

from functools import cache

import numpy as np
from numba import njit, types
from numba.extending import overload

from kimi_lite.native.cpu.activations import NUM_VALUES, X_F32, Activations, quantize_token
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.latent import check_storage
from kimi_lite.native.cpu.linear import thread_scratch
from kimi_lite.native.cpu.matrix import Matrix, matrix_rows
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import (
    ABSORBED,
    COS,
    NUM_ABSORBED,
    RECORD_BYTES,
    RECORD_PAGES,
    RECORD_POSITION,
    RECORD_TOKEN,
    SIN,
    RunTable,
)
from kimi_lite.native.cpu.specialize import for_literals
from kimi_lite.native.cpu.threads import barrier, next_task, next_tasks
from kimi_lite.native.cpu.tiles import MAX_HEADS, SCORE_STRIDE, score_tile, value_tile
from kimi_lite.native.cpu.vector_math import exp_f32x16, rotate_pairs
from kimi_lite.native.latent_rows import GROUP_VALUES, PAGE_TOKENS, ROW_FORMS, MlaShape
from kimi_lite.native.simd import (
    fma_f32x16,
    largest_f32x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    max_f32x16,
    splat_f32x16,
    store_f32,
    store_f32x16,
    store_i32,
    sum_f32x16,
    zero_f32x16,
)

_MINUS_INFINITY = types.float32(-np.inf)
SPLIT_POSITIONS, _TASKS = 512, 64  # a span is at least this long; tasks that keep 16 cores busy to the end
_TOKENS = 8  # that share a reading of W_UK and W_UV
_BAND_HEADS = 8  # at most, that a thread takes at once

# int64 cells of the arguments
_RUN, _Q, _Q_STRIDE, _K_B, _V_B, _SCALE, _NUM_HEADS, _NOPE, _ROPE, _KV_LORA, _VALUE = (8 * i for i in range(11))
_QUERY_ACT, _LATENT_Q, _STORAGE, _PARTIAL, _CONTEXT_ACT, _OUT, _MAX_SPLITS, _WAVE = (8 * i for i in range(11, 19))


@njit
def _partial_bytes(args):
    """One span's result of one head: kv_lora context values, then the largest score and the sum of weights."""
    return 4 * (load_i64(args + _KV_LORA) + 16)


@njit
def _num_splits(length, max_splits):
    """Spans of a token that attends to so many positions."""
    return max(1, min(max_splits, length // SPLIT_POSITIONS))


@njit
def _rows_of_head(head, num_heads, first, count, rows):
    """int32 numbers of one head's rows among (token, head) rows, for `count` tokens from `first` on."""
    for i in range(count):
        store_i32(rows + 4 * i, types.int32((first + i) * num_heads + head))


@njit
def _absorb(args, records, num_tokens, thread, team):
    """Each thread has a band of heads, whose rows of W_UK are one run of memory."""
    num_tasks = -(-num_tokens // _TOKENS) * load_i64(args + _NUM_HEADS)
    first, count = next_tasks(team, thread, num_tasks, _BAND_HEADS)
    while count > 0:
        for task in range(first, first + count):
            _absorb_task(args, records, num_tokens, task, thread)
        first, count = next_tasks(team, thread, num_tasks, _BAND_HEADS)


@njit
def _absorb_task(args, records, num_tokens, task, thread):
    """One head of up to _TOKENS tokens: its query in the latent space, scaled, its turned part behind it."""
    run, heads = load_i64(args + _RUN), load_i64(args + _NUM_HEADS)
    nope, rope, kv_lora = load_i64(args + _NOPE), load_i64(args + _ROPE), load_i64(args + _KV_LORA)
    act, scale, rows = load_i64(args + _QUERY_ACT), splat_f32x16(load_f32(args + _SCALE)), thread_scratch(run, thread)
    stride = 4 * (kv_lora + rope)
    first, head = task // heads * _TOKENS, task % heads
    count = min(_TOKENS, num_tokens - first)
    _rows_of_head(head, heads, first, count, rows)
    for i in range(first, first + count):
        token, row = load_i64(records + RECORD_BYTES * i + RECORD_TOKEN), i * heads + head
        q = load_i64(args + _Q) + token * load_i64(args + _Q_STRIDE) + 4 * head * (nope + rope)
        x = load_i64(act + X_F32) + 4 * load_i64(act + NUM_VALUES) * row
        for j in range(0, 4 * nope, 64):
            store_f32x16(x + j, load_f32x16(q + j))
        quantize_token(act, row)
        turned, angles = load_i64(args + _LATENT_Q) + stride * row + 4 * kv_lora, 2 * rope * token
        rotate_pairs(q + 4 * nope, turned, load_i64(run + COS) + angles, load_i64(run + SIN) + angles, rope // 2)
    out = load_i64(args + _LATENT_Q) + stride * (first * heads + head)
    matrix_rows(load_i64(args + _K_B), head * kv_lora, kv_lora, act, rows, count, out, stride * heads)
    for i in range(count):
        for j in range(0, stride, 64):
            at = out + stride * heads * i + j
            store_f32x16(at, load_f32x16(at) * scale)


@njit(fastmath={"nsz", "contract"}, error_model="numpy")
def softmax_block(scores, peak, total):
    """64 scores at `scores` become weights e^(s - new peak); returns (new peak, new total, factor for what came
    before)."""
    s0, s1 = load_f32x16(scores), load_f32x16(scores + 64)
    s2, s3 = load_f32x16(scores + 128), load_f32x16(scores + 192)
    new_peak = max(peak, largest_f32x16(max_f32x16(max_f32x16(s0, s1), max_f32x16(s2, s3))))
    shift = splat_f32x16(new_peak)
    s0, s1, s2, s3 = exp_f32x16(s0 - shift), exp_f32x16(s1 - shift), exp_f32x16(s2 - shift), exp_f32x16(s3 - shift)
    store_f32x16(scores, s0)
    store_f32x16(scores + 64, s1)
    store_f32x16(scores + 128, s2)
    store_f32x16(scores + 192, s3)
    factor = np.exp(peak - new_peak)
    return new_peak, total * factor + sum_f32x16((s0 + s1) + (s2 + s3)), factor


def heads_per_group(num_heads: int) -> int:
    """Heads that share a reading of the cache: at most MAX_HEADS, groups as even as can be."""
    return -(-num_heads // -(-num_heads // MAX_HEADS))


def _page_scores(heads, dtype, page, row_bytes, count, latent, q, q_stride, scores):
    """scores[g][p] = q_g . page[p]; positions from `count` on get -1e30."""


def _add_page(heads, dtype, page, row_bytes, count, latent, kv_lora, weights, factors, context, stride):
    """context_g = context_g * factor_g + sum_p weight[g][p] * page[p][:kv_lora]."""


@overload(_page_scores, prefer_literal=True)
def _choose_page_scores(heads, dtype, page, row_bytes, count, latent, q, q_stride, scores):
    tile = score_tile(heads.literal_value, dtype.literal_value)

    def page_scores(heads, dtype, page, row_bytes, count, latent, q, q_stride, scores):
        for p in range(count):
            tile(page + p * row_bytes, q, q_stride, latent, scores + 4 * p)
        for g in range(heads):
            for p in range(count, PAGE_TOKENS):
                store_f32(scores + SCORE_STRIDE * g + 4 * p, types.float32(-1e30))

    return page_scores


@overload(_add_page, prefer_literal=True)
def _choose_add_page(heads, dtype, page, row_bytes, count, latent, kv_lora, weights, factors, context, stride):
    tile = value_tile(heads.literal_value, dtype.literal_value)
    value_bytes = ROW_FORMS[dtype.literal_value].value_bytes

    def add_page(heads, dtype, page, row_bytes, count, latent, kv_lora, weights, factors, context, stride):
        for i in range(0, kv_lora, 32):
            scales = page + latent + i // 16
            tile(page + i * value_bytes, scales, row_bytes, count, weights, factors, context + 4 * i, stride)

    return add_page


@for_literals
def _attend(group, dtype, value_bytes, scale_bytes, args, records, num_tokens, thread, team):
    run, heads = load_i64(args + _RUN), load_i64(args + _NUM_HEADS)
    kv_lora, latent = load_i64(args + _KV_LORA), load_i64(args + _KV_LORA) + load_i64(args + _ROPE)
    groups, size, max_splits = -(-heads // group), _partial_bytes(args), load_i64(args + _MAX_SPLITS)
    storage, scores = load_i64(args + _STORAGE), thread_scratch(run, thread)
    row_bytes = latent * value_bytes + -(-latent // GROUP_VALUES) * scale_bytes
    factors, longest = scores + SCORE_STRIDE * group, 0
    for i in range(num_tokens):
        longest = max(longest, load_i64(records + RECORD_BYTES * i + RECORD_POSITION) + 1)
    most = _num_splits(longest, max_splits)
    task = next_task(team)
    while task < num_tokens * groups * most:
        split, index, g = task % most, task // most // groups, task // most % groups
        record = records + RECORD_BYTES * index
        length, pages = load_i64(record + RECORD_POSITION) + 1, load_i64(record + RECORD_PAGES)
        splits, num_pages = _num_splits(length, max_splits), -(-length // PAGE_TOKENS)
        if split >= splits:
            task = next_task(team)
            continue
        first = min(g * group, heads - group)  # the last group overlaps the one before rather than be smaller
        q = load_i64(args + _LATENT_Q) + 4 * latent * (index * heads + first)
        state = load_i64(args + _PARTIAL) + size * ((index * groups + g) * max_splits + split) * group
        for i in range(0, size * group, 64):
            store_f32x16(state + i, zero_f32x16())
        for h in range(group):
            store_f32(state + size * h + 4 * kv_lora, _MINUS_INFINITY)
        for n in range(num_pages * split // splits, num_pages * (split + 1) // splits):
            page = storage + load_i32(pages + 4 * n) * PAGE_TOKENS * row_bytes
            count = min(PAGE_TOKENS, length - n * PAGE_TOKENS)
            _page_scores(group, dtype, page, row_bytes, count, latent, q, 4 * latent, scores)
            for h in range(group):
                at = state + size * h + 4 * kv_lora
                peak, total, factor = softmax_block(scores + SCORE_STRIDE * h, load_f32(at), load_f32(at + 4))
                store_f32(at, peak)
                store_f32(at + 4, total)
                store_f32(factors + 4 * h, factor)
            _add_page(group, dtype, page, row_bytes, count, latent, kv_lora, scores, factors, state, size)
        task = next_task(team)


@njit(fastmath={"nsz", "contract"}, error_model="numpy")
def _merge_spans(partial, step, splits, kv_lora, x):
    """x = the context of one head of one token, of its spans, which lie `step` bytes apart."""
    peak, total = _MINUS_INFINITY, types.float32(0)
    for s in range(splits):
        peak = max(peak, load_f32(partial + step * s + 4 * kv_lora))
    for s in range(splits):
        span = partial + step * s
        factor = np.exp(load_f32(span + 4 * kv_lora) - peak)
        total += factor * load_f32(span + 4 * kv_lora + 4)
        for i in range(0, 4 * kv_lora, 64):
            before = zero_f32x16() if s == 0 else load_f32x16(x + i)
            store_f32x16(x + i, fma_f32x16(load_f32x16(span + i), splat_f32x16(factor), before))
    inverse = types.float32(1) / total
    for i in range(0, 4 * kv_lora, 64):
        store_f32x16(x + i, load_f32x16(x + i) * inverse)


@njit
def _combine(group, args, records, num_tokens, thread, team):
    """Each thread has a band of heads, whose rows of W_UV are one run of memory."""
    num_tasks = -(-num_tokens // _TOKENS) * load_i64(args + _NUM_HEADS)
    first, count = next_tasks(team, thread, num_tasks, _BAND_HEADS)
    while count > 0:
        for task in range(first, first + count):
            _combine_task(group, args, records, num_tokens, task, thread)
        first, count = next_tasks(team, thread, num_tasks, _BAND_HEADS)


@njit
def _combine_task(group, args, records, num_tokens, task, thread):
    """One head of up to _TOKENS tokens: its spans' contexts merged, brought out of the latent space into `out`."""
    run, heads, kv_lora = load_i64(args + _RUN), load_i64(args + _NUM_HEADS), load_i64(args + _KV_LORA)
    max_splits, size, value = load_i64(args + _MAX_SPLITS), _partial_bytes(args), load_i64(args + _VALUE)
    act, out, groups = load_i64(args + _CONTEXT_ACT), load_i64(args + _OUT), -(-heads // group)
    rows = thread_scratch(run, thread)
    values = rows + 64
    first, head = task // heads * _TOKENS, task % heads
    count, g = min(_TOKENS, num_tokens - first), head // group
    place = head - min(g * group, heads - group)  # of this head in its group
    _rows_of_head(head, heads, first, count, rows)
    for i in range(first, first + count):
        length = load_i64(records + RECORD_BYTES * i + RECORD_POSITION) + 1
        partial = load_i64(args + _PARTIAL) + size * ((i * groups + g) * max_splits * group + place)
        x = load_i64(act + X_F32) + 4 * kv_lora * (i * heads + head)
        _merge_spans(partial, size * group, _num_splits(length, max_splits), kv_lora, x)
        quantize_token(act, i * heads + head)
    matrix_rows(load_i64(args + _V_B), head * value, value, act, rows, count, values, 4 * value)
    for i in range(count):
        token = load_i64(records + RECORD_BYTES * (first + i) + RECORD_TOKEN)
        target = load_i64(out + X_F32) + 4 * (load_i64(out + NUM_VALUES) * token + head * value)
        for j in range(0, 4 * value, 64):
            store_f32x16(target + j, load_f32x16(values + 4 * value * i + j))


def _attention_kernel(group: int, dtype: str, value_bytes: int, scale_bytes: int):
    def attention(args, thread, team):
        run, wave = load_i64(args + _RUN), load_i64(args + _WAVE)
        num_tokens = load_i64(run + NUM_ABSORBED)
        for first in range(0, num_tokens, wave):
            records, count = load_i64(run + ABSORBED) + RECORD_BYTES * first, min(wave, num_tokens - first)
            if first > 0:
                barrier(team, thread)  # the wave before is combined
            _absorb(args, records, count, thread, team)
            barrier(team, thread)
            _attend(group, dtype, value_bytes, scale_bytes, args, records, count, thread, team)
            barrier(team, thread)
            _combine(group, args, records, count, thread, team)

    return attention


@cache
def compiled_attention(group: int, dtype: str):
    form = ROW_FORMS[dtype]
    return kernel(_attention_kernel(group, dtype, form.value_bytes, form.scale_bytes))


def max_splits(num_heads: int) -> int:
    """Spans of the longest context: with one token, tasks enough for many threads."""
    return -(-_TASKS // -(-num_heads // heads_per_group(num_heads)))


class AttentionBuffers:
    """What absorbed attention needs for up to `capacity` tokens at once, more take turns; shared by all layers."""

    def __init__(self, capacity: int, shape: MlaShape, k_b_kinds: set[int], v_b_kinds: set[int]):
        """k_b_kinds, v_b_kinds: int8 forms that the products with these matrices need."""
        self.capacity = capacity
        rows, group = capacity * shape.heads, heads_per_group(shape.heads)
        padded_heads = group * -(-shape.heads // group)
        self.query = Activations(rows, shape.nope, k_b_kinds)
        self.latent_q = np.zeros((rows, shape.latent), np.float32)
        num_spans = capacity * max_splits(shape.heads)  # the memory of spans that short contexts lack is never touched
        self.partial = np.zeros((num_spans * padded_heads, shape.kv_lora + 16), np.float32)
        self.context = Activations(rows, shape.kv_lora, v_b_kinds)


def attention_op(
    run: RunTable,
    q: np.ndarray,
    k_b: Matrix,
    v_b: Matrix,
    storage: np.ndarray,
    buffers: AttentionBuffers,
    out: Activations,
    shape: MlaShape,
    softmax_scale: float,
    dtype: str,
) -> Op:
    """Attention of one layer for the absorbed tokens: out.values[t, h * v :] = attention of head h.

    q: float32 (capacity, heads * (nope + rope)), not yet rotated. k_b: (heads * kv_lora, nope), v_b: (heads * value,
    kv_lora). storage: the layer's pages (P, 64, row).
    """
    assert shape.nope % 16 == 0 and shape.rope % 16 == 0 and shape.kv_lora % 32 == 0 and shape.value % 16 == 0, shape
    check_storage(storage, shape, dtype)
    kernel = compiled_attention(heads_per_group(shape.heads), dtype)
    working = (buffers.query, buffers.latent_q, storage, buffers.partial, buffers.context)
    sizes = (max_splits(shape.heads), buffers.capacity)
    return Op.of(kernel, run, q, q.strides[0], k_b, v_b, float(softmax_scale), *shape, *working, out, *sizes)
