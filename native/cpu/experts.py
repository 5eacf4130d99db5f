"""The feed-forward step of a layer: chosen experts, gate and up, SwiGLU, down, weighted sum, in one kernel.

Generated tokens and prompts go through the same entry: tokens are grouped by expert, in their order, so that an
expert's generated ones come first; each weight is read once for all tokens that chose it, and the work is handed out as
(expert, block of rows) tasks so that cores finish together. The sum over experts runs in expert order whatever the
threads do, so results do not depend on timing. A dense feed-forward layer is the case of one expert that every token
takes; shared experts are experts of that kind.

Where even a long prompt leaves each routed expert with few tokens (`has_few_each`), those of prompts take the kernels
for few tokens there, too: unpacking a panel pays from about 8 tokens on.

Where experts lie in several places, a choice whose id is -1 is left out, and with `per_choice` the product of each
choice goes to a row of its own: `native.cpu.join` adds such rows exactly as this kernel would have done.
"""

import numpy as np
from numba import njit, types

from kimi_lite.native.cpu.activations import X_F32, Activations, quantize_token
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.linear import BAND_STEP, RESULT_BYTES, TASK_ROWS, TASK_TOKENS, thread_scratch
from kimi_lite.native.cpu.matrix import (
    MATRIX_BYTES,
    NUM_ROWS,
    TILE_KIND,
    K,
    fetch_meanwhile,
    matrix_panel,
    matrix_rows,
    panel_product,
    panel_scratch_bytes,
)
from kimi_lite.native.cpu.packing import PACK_TOKENS, pack_bytes, pack_kinds, packs_bytes
from kimi_lite.native.cpu.panel import PANEL_ROWS
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import EVERY_TOKEN, NUM_GENERATED, NUM_TOKENS, PACKS, RunTable
from kimi_lite.native.cpu.threads import barrier, next_panel, next_task, next_tasks, panels_ahead, part_of_tasks
from kimi_lite.native.cpu.tile_panel import TILE_PANEL_ROWS
from kimi_lite.native.cpu.vector_math import silu_f32x16
from kimi_lite.native.simd import (
    fma_f32x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    splat_f32x16,
    store_f32,
    store_f32x16,
    store_i32,
)

# int64 cells of the arguments, by byte offset
_RUN, _X, _OUT, _OUT_STRIDE, _IDS, _WEIGHTS, _TOP_K, _NUM_ROUTED, _NUM_ALWAYS, _MATRICES, _HIDDEN = (
    8 * i for i in range(11)
)
_STARTS, _PAIR_TOKEN, _PAIR_WEIGHT, _PAIR_ROW, _ACTIVE, _PER_CHOICE, _HAS_FEW_EACH = (8 * i for i in range(11, 18))
_EXPERT_BYTES = 3 * MATRIX_BYTES  # gate, up, down
# As many through rows take about as long as through a panel: with AVX-512 and matrix tiles 2 to 10, depending on the
# type, with AVX2 2 to 20 (`python -m tools.kernels --few-tokens`, tools/LOG.md).
_FEW_TOKENS = 8
_DOWN_ROWS = 32  # of a task for few tokens of prompts, or with matrix tiles


def experts_scratch_bytes(hidden_size: int, feed_forward_size: int, max_tokens: int) -> int:
    """Scratch a thread needs: a panel and two blocks of results (T, 64), or two of generated tokens' results."""
    panels = panel_scratch_bytes(max(hidden_size, feed_forward_size)) + 2 * 4 * TILE_PANEL_ROWS * max_tokens
    return max(panels, 2 * TASK_TOKENS * RESULT_BYTES) + 4096


def few_tokens_each(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether so many tokens, each of which chooses `top_k` experts, leave an expert with few of them."""
    return num_tokens * top_k <= _FEW_TOKENS * num_experts


@njit
def _group_by_expert(args):
    """Sorts (token, choice) pairs by expert: starts (E + 1), the tokens and weights of the pairs, the active
    experts."""
    num_tokens, top_k = load_i64(load_i64(args + _RUN) + NUM_TOKENS), load_i64(args + _TOP_K)
    routed, always = load_i64(args + _NUM_ROUTED), load_i64(args + _NUM_ALWAYS)
    ids, weights, starts = load_i64(args + _IDS), load_i64(args + _WEIGHTS), load_i64(args + _STARTS)
    pair_token, pair_weight, active = (
        load_i64(args + _PAIR_TOKEN),
        load_i64(args + _PAIR_WEIGHT),
        load_i64(args + _ACTIVE),
    )
    pair_row, num_experts = load_i64(args + _PAIR_ROW), routed + always
    for e in range(num_experts + 1):
        store_i32(starts + 4 * e, types.int32(0))
    for i in range(num_tokens * top_k):
        expert = load_i32(ids + 4 * i)
        if expert >= 0:
            at = starts + 4 * (expert + 1)
            store_i32(at, load_i32(at) + types.int32(1))
    for e in range(routed, num_experts):
        store_i32(starts + 4 * (e + 1), types.int32(num_tokens))
    num_active, total = 0, 0
    for e in range(num_experts):
        count = load_i32(starts + 4 * (e + 1))
        store_i32(starts + 4 * e, types.int32(total))  # where this expert's next pair goes
        total += count
        if count > 0:
            store_i32(active + 4 * (1 + num_active), types.int32(e))
            num_active += 1
    store_i32(active, types.int32(num_active))
    for token in range(num_tokens):
        for i in range(top_k):
            expert = load_i32(ids + 4 * (token * top_k + i))
            if expert < 0:
                continue
            at = starts + 4 * expert
            pair = load_i32(at)
            store_i32(pair_token + 4 * pair, types.int32(token))
            store_i32(pair_row + 4 * pair, types.int32(token * (top_k + always) + i))
            store_f32(pair_weight + 4 * pair, load_f32(weights + 4 * (token * top_k + i)))
            store_i32(at, pair + types.int32(1))
    for e in range(routed, num_experts):
        for token in range(num_tokens):
            pair = load_i32(starts + 4 * e) + token
            store_i32(pair_token + 4 * pair, types.int32(token))
            store_i32(pair_row + 4 * pair, types.int32(token * (top_k + always) + top_k + e - routed))
            store_f32(pair_weight + 4 * pair, types.float32(1))
        store_i32(starts + 4 * e, load_i32(starts + 4 * e) + types.int32(num_tokens))
    for e in range(num_experts, 0, -1):  # every start has moved to its end, which is the next expert's start
        store_i32(starts + 4 * e, load_i32(starts + 4 * (e - 1)))
    store_i32(starts, types.int32(0))


@njit(fastmath={"nsz", "contract"}, error_model="numpy")
def _swiglu(gate, up, out, count):
    """out = silu(gate) * up; count floats, and up to 15 more are computed and not stored."""
    i = 0
    while i + 16 <= count:
        store_f32x16(out + 4 * i, silu_f32x16(load_f32x16(gate + 4 * i)) * load_f32x16(up + 4 * i))
        i += 16
    if i < count:
        store_f32x16(gate + 4 * i, silu_f32x16(load_f32x16(gate + 4 * i)) * load_f32x16(up + 4 * i))
        for j in range(i, count):
            store_f32(out + 4 * j, load_f32(gate + 4 * j))


@njit
def _first_of_many(args, expert, begin, end):
    """Of an expert's pairs, which are in the order of tokens: the first that takes the kernels for many tokens."""
    if load_i64(args + _HAS_FEW_EACH) != 0 and expert < load_i64(args + _NUM_ROUTED):
        return end
    limit, pair_token = load_i64(load_i64(args + _RUN) + NUM_GENERATED), load_i64(args + _PAIR_TOKEN)
    pair = begin
    while pair < end and load_i32(pair_token + 4 * pair) < limit:
        pair += 1
    return pair


@njit
def _packs_of(args, activations, a, first):
    """Where the packs of the a-th active expert are, whose first pair for them is `first`: no two experts' meet."""
    return load_i64(load_i64(args + _RUN) + PACKS) + (first // PACK_TOKENS + a) * pack_bytes(activations)


@njit
def _panel_rows(matrix, other):
    """Rows of the panels of two matrices that are multiplied together."""
    is_of_tiles = load_i64(matrix + TILE_KIND) != 0 and load_i64(other + TILE_KIND) != 0
    return TILE_PANEL_ROWS if is_of_tiles else PANEL_ROWS


@njit
def _pack_pairs(args, activations, is_hidden, thread, team):
    """Packs, for every active expert with matrix tiles, its tokens of prompts, or their hidden values."""
    starts, active = load_i64(args + _STARTS), load_i64(args + _ACTIVE)
    numbers = load_i64(load_i64(args + _RUN) + EVERY_TOKEN) if is_hidden else load_i64(args + _PAIR_TOKEN)
    task, passed = next_task(team), 0
    for a in range(load_i32(active)):
        expert = load_i32(active + 4 * (1 + a))
        begin, end = load_i32(starts + 4 * expert), load_i32(starts + 4 * expert + 4)
        first, gate = _first_of_many(args, expert, begin, end), load_i64(args + _MATRICES) + expert * _EXPERT_BYTES
        kind, other = load_i64(gate + TILE_KIND), load_i64(gate + MATRIX_BYTES + TILE_KIND)
        if is_hidden:
            kind = load_i64(gate + 2 * MATRIX_BYTES + TILE_KIND)
            other = kind
        if kind == 0 and other == 0:
            continue
        num_tasks = (end - first + PACK_TOKENS - 1) // PACK_TOKENS
        while task < passed + num_tasks:
            pair = first + (task - passed) * PACK_TOKENS
            pack = _packs_of(args, activations, a, first) + (task - passed) * pack_bytes(activations)
            pack_kinds(activations, kind, other, numbers + 4 * pair, min(PACK_TOKENS, end - pair), pack)
            task = next_task(team)
        passed += num_tasks
    barrier(team, thread)


@njit
def _gate_up_task(args, hidden, a, first, num_rows, next_row, scratch):
    """Rows first.. of gate and up for all tokens of an expert, the a-th active one, multiplied as SwiGLU into the rows
    of its pairs. From `next_row` on this thread goes on, probably."""
    expert = load_i32(load_i64(args + _ACTIVE) + 4 * (1 + a))
    x, starts, pair_token = load_i64(args + _X), load_i64(args + _STARTS), load_i64(args + _PAIR_TOKEN)
    begin, end = load_i32(starts + 4 * expert), load_i32(starts + 4 * expert + 4)
    gate = load_i64(args + _MATRICES) + expert * _EXPERT_BYTES
    up, width = gate + MATRIX_BYTES, load_i64(gate + NUM_ROWS)
    target, many = load_i64(hidden + X_F32) + 4 * first, _first_of_many(args, expert, begin, end)
    for pair in range(begin, many, TASK_TOKENS):
        count, tokens = min(TASK_TOKENS, many - pair), pair_token + 4 * pair
        ups = scratch + TASK_TOKENS * RESULT_BYTES
        matrix_rows(gate, first, num_rows, x, tokens, count, scratch, RESULT_BYTES)
        matrix_rows(up, first, num_rows, x, tokens, count, ups, RESULT_BYTES)
        for i in range(count):
            at = RESULT_BYTES * i
            _swiglu(scratch + at, ups + at, target + 4 * width * (pair + i), num_rows)
    count = end - many
    if count == 0:
        return
    step, stride = _panel_rows(gate, up), 4 * TILE_PANEL_ROWS
    gates, ups, panel = scratch, scratch + stride * count, scratch + 2 * stride * count
    tokens, packs = pair_token + 4 * many, _packs_of(args, x, a, many)
    for row in range(0, num_rows, step):
        height = min(step, num_rows - row)
        matrix_panel(gate, first + row, height, panel)
        fetch_meanwhile(panel, up, first + row, height)
        panel_product(gate, panel, x, tokens, packs, count, gates, stride, height)
        matrix_panel(up, first + row, height, panel)
        fetch_meanwhile(panel, gate, first + row + step if row + step < num_rows else next_row, step)
        panel_product(up, panel, x, tokens, packs, count, ups, stride, height)
        for i in range(count):
            _swiglu(gates + stride * i, ups + stride * i, target + 4 * row + 4 * width * (many + i), height)


@njit(fastmath={"nsz", "contract"})
def add_scaled(source, weight, out, count):
    """out += weight * source; count floats."""
    i = 0
    while i + 16 <= count:
        store_f32x16(
            out + 4 * i, fma_f32x16(load_f32x16(source + 4 * i), splat_f32x16(weight), load_f32x16(out + 4 * i))
        )
        i += 16
    while i < count:
        store_f32(out + 4 * i, load_f32(out + 4 * i) + weight * load_f32(source + 4 * i))
        i += 1


@njit
def _copy(source, out, count):
    for i in range(count):
        store_f32(out + 4 * i, load_f32(source + 4 * i))


@njit
def _deliver(args, pair, values, first, num_rows):
    """One pair's rows first.. of the down product: added to the output, or to a row of their own."""
    out, stride = load_i64(args + _OUT) + 4 * first, load_i64(args + _OUT_STRIDE)
    if load_i64(args + _PER_CHOICE) != 0:
        _copy(values, out + stride * load_i32(load_i64(args + _PAIR_ROW) + 4 * pair), num_rows)
    else:
        target = out + stride * load_i32(load_i64(args + _PAIR_TOKEN) + 4 * pair)
        add_scaled(values, load_f32(load_i64(args + _PAIR_WEIGHT) + 4 * pair), target, num_rows)


@njit
def _down_task(args, hidden, first, num_rows, scratch):
    """Rows first.. of every active expert's down product, added to the output in expert order, or each to its own
    row."""
    starts, active = load_i64(args + _STARTS), load_i64(args + _ACTIVE)
    every = load_i64(load_i64(args + _RUN) + EVERY_TOKEN)
    for a in range(load_i32(active)):
        expert = load_i32(active + 4 * (1 + a))
        begin, end = load_i32(starts + 4 * expert), load_i32(starts + 4 * expert + 4)
        down = load_i64(args + _MATRICES) + expert * _EXPERT_BYTES + 2 * MATRIX_BYTES
        many = _first_of_many(args, expert, begin, end)
        for pair in range(begin, many, TASK_TOKENS):
            count = min(TASK_TOKENS, many - pair)
            matrix_rows(down, first, num_rows, hidden, every + 4 * pair, count, scratch, RESULT_BYTES)
            for i in range(count):
                _deliver(args, pair + i, scratch + RESULT_BYTES * i, first, num_rows)
        count = end - many
        if count == 0:
            continue
        step, stride = _panel_rows(down, down), 4 * TILE_PANEL_ROWS
        panel, packs = scratch + stride * count, _packs_of(args, hidden, a, many)
        for row in range(0, num_rows, step):
            height = min(step, num_rows - row)
            matrix_panel(down, first + row, height, panel)
            if row + step < num_rows:
                fetch_meanwhile(panel, down, first + row + step, step)
            elif a + 1 < load_i32(active):
                following = load_i64(args + _MATRICES) + load_i32(active + 4 * (2 + a)) * _EXPERT_BYTES
                fetch_meanwhile(panel, following + 2 * MATRIX_BYTES, first, step)
            panel_product(down, panel, hidden, every + 4 * many, packs, count, scratch, stride, height)
            for i in range(count):
                _deliver(args, many + i, scratch + stride * i, first + row, height)


@njit
def _gate_up_bands(args, hidden, num_active, width, scratch, thread, team):
    """Generated tokens alone: the rows of all active experts one behind the other, of which each thread has a band.
    Where memory is on several nodes, first one node's rows of all experts, then the next's."""
    steps = -(-width // BAND_STEP)
    first, count = next_tasks(team, thread, num_active * steps, TASK_ROWS // BAND_STEP)
    while count > 0:
        while count > 0:  # parts of one expert
            a, begin, part = part_of_tasks(team, num_active, steps, first, count)
            row = begin * BAND_STEP
            _gate_up_task(args, hidden, a, row, min(part * BAND_STEP, width - row), row + part * BAND_STEP, scratch)
            first, count = first + part, count - part
        first, count = next_tasks(team, thread, num_active * steps, TASK_ROWS // BAND_STEP)


@njit
def _down_bands(args, hidden, num_rows, scratch, thread, team):
    """Generated tokens alone: each thread has a band of rows, in every expert the same."""
    steps = -(-num_rows // BAND_STEP)
    first, count = next_tasks(team, thread, steps, TASK_ROWS // BAND_STEP)
    while count > 0:
        row = first * BAND_STEP
        _down_task(args, hidden, row, min(count * BAND_STEP, num_rows - row), scratch)
        first, count = next_tasks(team, thread, steps, TASK_ROWS // BAND_STEP)


@njit
def _gate_up_tasks(args, hidden, num_active, width, step, scratch, thread, team):
    """With tokens of prompts: blocks of `step` rows, each to the next thread that is free; where memory is on several
    nodes, on the block's node if any is."""
    blocks = -(-width // step)
    task = next_panel(team, thread, num_active * blocks)
    while task < num_active * blocks:
        a, block, _ = part_of_tasks(team, num_active, blocks, task, 1)
        first = block * step
        following = first + panels_ahead(team) * step
        _gate_up_task(args, hidden, a, first, min(step, width - first), following, scratch)
        task = next_panel(team, thread, num_active * blocks)


@njit
def _down_tasks(args, hidden, num_rows, step, scratch, thread, team):
    """With tokens of prompts, likewise."""
    blocks = -(-num_rows // step)
    task = next_panel(team, thread, blocks)
    while task < blocks:
        _down_task(args, hidden, task * step, min(step, num_rows - task * step), scratch)
        task = next_panel(team, thread, blocks)


@kernel
def _experts_kernel(args, thread, team):
    run, hidden = load_i64(args + _RUN), load_i64(args + _HIDDEN)
    scratch, active, starts = thread_scratch(run, thread), load_i64(args + _ACTIVE), load_i64(args + _STARTS)
    if thread == 0:
        _group_by_expert(args)
    barrier(team, thread)
    num_active = load_i32(active)
    gate = load_i64(args + _MATRICES) + load_i32(active + 4) * _EXPERT_BYTES
    width, num_rows = load_i64(gate + NUM_ROWS), load_i64(gate + 2 * MATRIX_BYTES + NUM_ROWS)
    has_prompt = load_i64(run + NUM_TOKENS) > load_i64(run + NUM_GENERATED)
    has_packs = has_prompt and load_i64(run + PACKS) != 0
    is_fine = has_prompt and not has_packs and load_i64(args + _HAS_FEW_EACH) == 0
    if has_packs:
        _pack_pairs(args, load_i64(args + _X), False, thread, team)
    if has_prompt:
        step = PANEL_ROWS if is_fine else TASK_ROWS
        _gate_up_tasks(args, hidden, num_active, width, step, scratch, thread, team)
    else:
        _gate_up_bands(args, hidden, num_active, width, scratch, thread, team)
    barrier(team, thread)
    num_pairs = load_i32(starts + 4 * (load_i64(args + _NUM_ROUTED) + load_i64(args + _NUM_ALWAYS)))
    pair = next_task(team)
    while pair < num_pairs:
        quantize_token(hidden, pair)
        pair = next_task(team)
    barrier(team, thread)
    if has_packs:
        _pack_pairs(args, hidden, True, thread, team)
    if has_prompt:
        _down_tasks(args, hidden, num_rows, PANEL_ROWS if is_fine else _DOWN_ROWS, scratch, thread, team)
    else:
        _down_bands(args, hidden, num_rows, scratch, thread, team)


def experts_op(
    run: RunTable,
    x: Activations,
    out: np.ndarray,
    matrices: np.ndarray,
    hidden: Activations,
    ids: np.ndarray,
    weights: np.ndarray,
    *,
    num_always: int,
    weights_owner: object,
    has_few_each: bool,
    per_choice: np.ndarray | None = None,
) -> Op:
    """out[t] += sum over chosen experts of weight * down(silu(gate x) * up x). Choices with id -1 are left out.

    matrices: int64 (experts, 3, 9), `Matrix.table` of gate, up, down, the `num_always` experts that every token takes
    (weight 1) last; it changes when an expert is moved. weights_owner: keeps the bytes that it points to. ids int32,
    weights float32 (capacity, K). hidden: Activations for capacity * (K + num_always) pairs of the experts' width.
    has_few_each: `few_tokens_each` of the model. Buffers may be shared by layers.

    per_choice: float32 (capacity * (K + num_always), N). Where it is given, `out` and weights are left alone, and the
    product of choice i of token t goes, without its weight, to row t * (K + num_always) + i; those of the experts that
    every token takes come behind the chosen ones, and the rows of absent choices are not touched.
    """
    assert matrices.shape[1:] == (3, MATRIX_BYTES // 8) and matrices.flags.c_contiguous, matrices.shape
    assert (matrices[:, 2, K // 8] == hidden.k).all(), (matrices[:, 2], hidden.k)
    assert ids.shape == weights.shape and ids.dtype == np.int32 and weights.dtype == np.float32, (ids.shape, ids.dtype)
    target = out if per_choice is None else per_choice
    assert target.dtype == np.float32 and target.strides[1] == 4, (target.dtype, target.strides)
    num_experts, num_pairs, top_k = len(matrices), hidden.capacity, ids.shape[1]
    if matrices[:, :, TILE_KIND // 8].any():
        num_packs = num_pairs // PACK_TOKENS + 1 + min(num_experts, num_pairs)
        run.reserve_packs(max(packs_bytes(x, num_packs), packs_bytes(hidden, num_packs)))
    starts, active = np.zeros(num_experts + 1, np.int32), np.zeros(num_experts + 1, np.int32)
    pair_token, pair_row = np.zeros(num_pairs, np.int32), np.zeros(num_pairs, np.int32)
    pair_weight = np.zeros(num_pairs, np.float32)
    choices = (ids, weights, top_k, num_experts - num_always, num_always)
    grouping = (starts, pair_token, pair_weight, pair_row, active)
    cells = (
        run,
        x,
        target,
        target.strides[0],
        *choices,
        matrices,
        hidden,
        *grouping,
        per_choice is not None,
        has_few_each,
    )
    return Op.of(_experts_kernel, *cells, owners=(weights_owner,))
