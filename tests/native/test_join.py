"""Choices computed apart and joined: the same bits as all experts in one go."""

import numpy as np
import pytest

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.experts import experts_op, experts_scratch_bytes
from kimi_lite.native.cpu.join import join_op
from tests.native.harness import activations, run_ops, run_table
from tests.native.test_experts import NUM_ROUTED, TOP_K, Layer, distinct_ids, tokens_of

CANARY = np.float32(-5)


def per_choice(layer, x, parts, weights, num_always, num_threads=1):
    """Runs each of `parts` (ids with -1 where another part has the choice); the experts of everybody go with every
    part."""
    num_tokens, top_k = weights.shape
    num_pairs = num_tokens * (top_k + num_always)
    rows = np.full((num_pairs + 1, layer.num_out), CANARY, np.float32)
    run = run_table(num_tokens, num_threads, experts_scratch_bytes(layer.k, layer.width, num_tokens), num_pairs)
    hidden = Activations(num_pairs, layer.width, {layer.kinds[1]} - {0})
    prepared = activations(x, layer.kinds[0])
    out = np.zeros((num_tokens, layer.num_out), np.float32)
    ops = [layer.op(run, prepared, out, hidden, ids, weights, num_always, rows[:-1]) for ids in parts]
    run_ops(ops, num_threads)
    assert not out.any() and (rows[-1] == CANARY).all(), "wrote beside its rows"
    return rows[:-1]


def join(rows, ids, weights, num_always, start, num_threads=1):
    out = start.copy()
    run_ops([join_op(run_table(len(ids), num_threads), rows, ids, weights, num_always, out)], num_threads)
    return out


def split(ids, num_parts, rng):
    """Every expert goes to one part, with all who chose it."""
    owner = rng.integers(0, num_parts, NUM_ROUTED)
    return [np.where(owner[ids] == part, ids, -1).astype(np.int32) for part in range(num_parts)]


@pytest.mark.parametrize("names", [("F32", "F32"), ("TQ1_0", "TQ1_0"), ("Q4_K", "Q8_0")])
@pytest.mark.parametrize("num_tokens", [1, 3, 9])
@pytest.mark.parametrize("num_always", [0, 2])
def test_joined_parts_have_the_bits_of_the_whole(names, num_tokens, num_always):
    rng = np.random.default_rng(num_tokens)
    layer = Layer(names, rng, num_experts=NUM_ROUTED + num_always, num_out=64)
    ids, x = distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng), tokens_of(layer, num_tokens, rng)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    start = rng.standard_normal((num_tokens, 64)).astype(np.float32)
    whole = layer.run(x, ids, weights, num_always, start=start)
    for num_parts, num_threads in ((1, 1), (2, 3), (3, 2)):
        rows = per_choice(layer, x, split(ids, num_parts, rng), weights, num_always, num_threads)
        assert np.array_equal(join(rows, ids, weights, num_always, start, num_threads), whole)


def test_groups_in_expert_order_have_the_bits_of_the_whole():
    """Without rows of their own: parts that follow each other in expert order, as a prompt goes through the slots."""
    rng = np.random.default_rng(3)
    layer = Layer(("Q8_0", "TQ2_0"), rng, num_experts=NUM_ROUTED + 1, num_out=64)
    ids, x = distinct_ids(11, NUM_ROUTED, TOP_K, rng), tokens_of(layer, 11, rng)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    whole = layer.run(x, ids, weights, num_always=1)
    out, prepared = np.zeros((11, 64), np.float32), activations(x, layer.kinds[0])
    run = run_table(11, 1, experts_scratch_bytes(layer.k, layer.width, 11), 11 * (TOP_K + 1))
    hidden = Activations(11 * (TOP_K + 1), layer.width, {layer.kinds[1]})
    for first in range(0, NUM_ROUTED, 2):
        num_always = int(first + 2 == NUM_ROUTED)
        part = np.where((ids >= first) & (ids < first + 2), ids, -1).astype(np.int32)
        matrices = layer.matrices[: NUM_ROUTED + num_always]
        op = experts_op(
            *(run, prepared, out, matrices, hidden, part, weights),
            num_always=num_always,
            weights_owner=layer,
            has_few_each=False,
        )
        run_ops([op])
    assert np.array_equal(out, whole)


def test_absent_choices():
    """Their rows are not touched and not added; a token with none is left alone, and so is a run with none at all."""
    rng = np.random.default_rng(1)
    layer = Layer(("F32", "F32"), rng, num_out=48)
    x, ids = tokens_of(layer, 5, rng), distinct_ids(5, NUM_ROUTED, TOP_K, rng)
    weights = np.ones(ids.shape, np.float32)
    ids[1], ids[2, 1] = -1, -1
    rows = per_choice(layer, x, [ids], weights, 0).reshape(5, TOP_K, 48)
    assert ((rows == CANARY).all(axis=2) == (ids < 0)).all()
    out = join(rows.reshape(-1, 48), ids, weights, 0, np.zeros((5, 48), np.float32))
    assert np.array_equal(out, layer.run(x, ids, weights))
    assert not out[1].any() and out[[0, 2, 3, 4]].any(axis=1).all()
    nobody = np.full_like(ids, -1)
    assert (per_choice(layer, x, [nobody], weights, 0) == CANARY).all()
    assert not layer.run(x, nobody, weights).any()


@pytest.mark.parametrize("width", [1, 16, 1023, 1024, 1025, 3000])
def test_any_width_and_strided_output(width):
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((4 * 3, width)).astype(np.float32)
    ids, weights = np.array([[5, 2], [2, 5], [7, 1], [3, 3]], np.int32), rng.standard_normal((4, 2)).astype(np.float32)
    room = np.ones((4, width + 5), np.float32)
    run_ops([join_op(run_table(4, 2), rows, ids, weights, 1, room)], 2)
    parts = rows.reshape(4, 3, width).astype(np.float64)
    want = 1 + weights[:, 0, None] * parts[:, 0] + weights[:, 1, None] * parts[:, 1] + parts[:, 2]
    assert np.allclose(room[:, :width], want, atol=1e-5) and (room[:, width:] == 1).all()
