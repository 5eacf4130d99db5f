"""Expert deferral: a token's last-ranked experts are added one layer later than its router chose them.

Chen et al., KTransformers (SOSP 2025): where experts are computed during attention, those that are deferred need not be
waited for. Prompts are never deferred: what they leave in the cache of keys and values would be read for ever.
"""

import numpy as np
from numba import types

from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.cpu.run import NUM_GENERATED, NUM_TOKENS, RunTable
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.simd import load_i32, load_i64, store_i32


@kernel
def _divide_kernel(args, thread, team):
    run, ids, now, later = load_i64(args), load_i64(args + 8), load_i64(args + 16), load_i64(args + 24)
    top_k, num_deferred, deferring = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    token = next_task(team)
    while token < load_i64(run + NUM_TOKENS):
        num_now = top_k - num_deferred if token < load_i64(run + deferring) else top_k
        for i in range(top_k):
            at = 4 * (token * top_k + i)
            expert, none = load_i32(ids + at), types.int32(-1)
            store_i32(now + at, expert if i < num_now else none)
            store_i32(later + at, none if i < num_now else expert)
        token = next_task(team)


def divide_op(
    run: RunTable,
    ids: np.ndarray,
    now: np.ndarray,
    later: np.ndarray,
    num_deferred: int,
    only_generated: bool = True,
) -> Op:
    """ids int32 (capacity, K), a token's experts as its router ranks them -> now, later: the same, with -1 in the
    places of those that belong to the other. The last `num_deferred` of each come later; only_generated: of tokens
    that were not generated none."""
    assert ids.shape == now.shape == later.shape and 0 < num_deferred < ids.shape[1], (ids.shape, num_deferred)
    assert ids.dtype == now.dtype == later.dtype == np.int32, (ids.dtype, now.dtype, later.dtype)
    return Op.of(
        _divide_kernel,
        run,
        ids,
        now,
        later,
        ids.shape[1],
        num_deferred,
        NUM_GENERATED if only_generated else NUM_TOKENS,
    )
