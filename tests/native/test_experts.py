"""The fused experts step against the numpy oracle: who chose whom, how many tokens, every type, any number of
threads."""

import numpy as np
import pytest

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.experts import experts_op, experts_scratch_bytes
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import Expert, experts
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native.closeness import assert_close, sizes
from tests.native.harness import activations, groups_of, run_ops, run_table

NUM_ROUTED, TOP_K = 6, 3


class Layer:
    """Random experts of one type each for gate and up, and for down; sizes that end in the middle of a task."""

    def __init__(
        self, names: tuple[str, str], rng: np.random.Generator, num_experts: int = NUM_ROUTED, num_out: int = 37
    ) -> None:
        self.names, self.num_out = names, num_out
        self.kinds = activation_kind(names[0]), activation_kind(names[1])
        self.k, self.width = (80 if name == "F32" else sizes(name)[sizes(name)[0] < 128] for name in names)
        shapes = [(names[0], self.width, self.k)] * 2 + [(names[1], num_out, self.width)]
        self.data = [[hostile_rows(name, rows, k, rng) for name, rows, k in shapes] for _ in range(num_experts)]
        self.matrices = np.array(
            [
                [Matrix.of(d, name, k).table for d, (name, _, k) in zip(three, shapes, strict=True)]
                for three in self.data
            ]
        )
        self.weights = [
            Expert(*(dequantize(d, s[0]) for d, s in zip(three, shapes, strict=True))) for three in self.data
        ]

    def op(self, run, prepared, out, hidden, ids, weights, num_always, per_choice=None, has_few_each=False):
        arguments = (run, prepared, out, self.matrices, hidden, ids, weights)
        options = {"weights_owner": self, "has_few_each": has_few_each, "per_choice": per_choice}
        return experts_op(*arguments, num_always=num_always, **options)

    def run(self, x, ids, weights, num_always=0, num_threads=1, start=None, num_generated=0, has_few_each=False):
        """ids int32, weights float32 (T, K); every token takes the last `num_always` experts."""
        num_tokens, top_k = ids.shape
        num_pairs = num_tokens * (top_k + num_always)
        out = np.zeros((num_tokens, self.num_out + 3), np.float32)
        out[:, self.num_out :] = 7
        if start is not None:
            out[:, : self.num_out] = start
        scratch_bytes = experts_scratch_bytes(self.k, self.width, num_tokens)
        run = run_table(num_tokens, num_threads, scratch_bytes, num_pairs, num_generated)
        hidden = Activations(num_pairs, self.width, {self.kinds[1]} - {0})
        prepared = activations(x, self.kinds[0])
        op = self.op(run, prepared, out, hidden, ids, weights, num_always, None, has_few_each)
        run_ops([op], num_threads)
        assert (out[:, self.num_out :] == 7).all(), "wrote beside its rows"
        return out[:, : self.num_out]

    def check(self, x, ids, weights, num_always=0, **options):
        actual = self.run(x, ids, weights, num_always, **options)
        num_tokens, always = len(x), np.arange(len(self.weights) - num_always, len(self.weights), dtype=np.int32)
        all_ids = np.concatenate([ids, np.tile(always, (num_tokens, 1))], axis=1)
        all_weights = np.concatenate([weights, np.ones((num_tokens, num_always), np.float32)], axis=1)
        expected = experts(x, self.weights, all_ids, all_weights, self.kinds)
        start = options.get("start")
        # an int8 code of the hidden values may round the other way: a part in 127 of one of hundreds of products
        tolerance = 2e-6 if self.kinds[1] == 0 else 2e-3
        assert_close(actual, expected + (0 if start is None else start), np.abs(expected).max(), tolerance)
        return actual


def tokens_of(layer, num_tokens, rng):
    return (rng.standard_normal((num_tokens, layer.k)) / np.sqrt(layer.k)).astype(np.float32)


def distinct_ids(num_tokens, num_experts, top_k, rng):
    return np.array([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)], np.int32).reshape(
        num_tokens, top_k
    )


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("num_tokens", "num_generated"), [(1, 1), (5, 0), (9, 5), (40, 37)])
def test_every_type(name, num_tokens, num_generated):
    """Between the extremes some experts have a panel's worth of tokens, some one or two, some none."""
    rng = np.random.default_rng(num_tokens)
    layer = Layer((name, name), rng)
    ids = distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    layer.check(tokens_of(layer, num_tokens, rng), ids, weights, num_generated=num_generated)


@pytest.mark.parametrize(
    "names", [("Q4_K", "Q6_K"), ("Q8_0", "TQ2_0"), ("TQ1_0", "Q4_0"), ("F32", "Q8_0"), ("Q4_K", "BF16")]
)
def test_types_may_differ(names):
    rng = np.random.default_rng(2)
    layer = Layer(names, rng)
    for num_tokens in (2, 7):
        ids = distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
        layer.check(tokens_of(layer, num_tokens, rng), ids, rng.uniform(0.1, 1, ids.shape).astype(np.float32))


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 9])
def test_one_expert_that_everybody_chose_and_some_that_nobody_did(num_tokens):
    rng = np.random.default_rng(3)
    layer = Layer(("Q8_0", "F32"), rng, num_experts=9)
    ids = np.full((num_tokens, 2), 4, np.int32)
    ids[:, 1] = np.array([0, 8] * 5)[:num_tokens]
    layer.check(tokens_of(layer, num_tokens, rng), ids, rng.uniform(-1, 1, ids.shape).astype(np.float32))


@pytest.mark.parametrize("num_out", [1, 16, 31, 32, 65])
def test_any_number_of_outputs(num_out):
    rng = np.random.default_rng(4)
    layer = Layer(("F32", "F32"), rng, num_out=num_out)
    for num_tokens in (1, 6):
        ids = distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
        layer.check(tokens_of(layer, num_tokens, rng), ids, np.ones(ids.shape, np.float32))


@pytest.mark.parametrize(("num_always", "top_k"), [(1, 0), (2, 0), (1, 2), (3, 1)])
@pytest.mark.parametrize("num_tokens", [1, 3, 5])
def test_dense_and_shared_experts(num_always, top_k, num_tokens):
    """A dense layer is one expert that everybody takes."""
    rng = np.random.default_rng(5)
    layer = Layer(("Q4_0", "F32"), rng, num_experts=num_always + 4 * bool(top_k))
    ids = distinct_ids(num_tokens, 4, top_k, rng)
    layer.check(tokens_of(layer, num_tokens, rng), ids, rng.uniform(0.1, 1, ids.shape).astype(np.float32), num_always)


@pytest.mark.parametrize("has_few_each", [False, True])
@pytest.mark.parametrize("names", [("Q4_K", "Q6_K"), ("TQ1_0", "Q8_0"), ("F32", "BF16")])
def test_the_other_tokens_do_not_matter(names, has_few_each):
    """Each alone: the same bits, generated or of a prompt, with experts that every token takes and any threads."""
    rng = np.random.default_rng(8)
    num_tokens, num_generated = 40, 19
    layer = Layer(names, rng, num_experts=NUM_ROUTED + 1)
    x, ids = tokens_of(layer, num_tokens, rng), distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    whole = layer.run(x, ids, weights, 1, 2, num_generated=num_generated, has_few_each=has_few_each)
    for i in range(num_tokens):
        one, kind = slice(i, i + 1), {"num_generated": int(i < num_generated), "has_few_each": has_few_each}
        assert np.array_equal(layer.run(x[one], ids[one], weights[one], 1, **kind), whole[one])


def test_it_adds_to_what_is_there():
    rng = np.random.default_rng(6)
    layer = Layer(("F32", "F32"), rng)
    for num_tokens in (2, 6):
        ids = distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
        start = rng.standard_normal((num_tokens, layer.num_out)).astype(np.float32)
        layer.check(tokens_of(layer, num_tokens, rng), ids, np.ones(ids.shape, np.float32), start=start)


def test_zeros_in_zeros_out():
    rng = np.random.default_rng(7)
    layer = Layer(("TQ1_0", "TQ1_0"), rng)
    for num_tokens in (1, 5):
        ids = distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
        assert not layer.run(np.zeros((num_tokens, layer.k), np.float32), ids, np.ones(ids.shape, np.float32)).any()


@pytest.mark.parametrize("names", [("F32", "F32"), ("Q8_0", "Q8_0"), ("TQ1_0", "TQ1_0")])
@pytest.mark.parametrize(("num_tokens", "num_generated"), [(2, 0), (9, 0), (1, 1), (4, 4), (9, 5)])
def test_the_number_of_threads_does_not_matter(names, num_tokens, num_generated):
    rng = np.random.default_rng(8)
    layer = Layer(names, rng, num_experts=8)
    ids, x = distinct_ids(num_tokens, 7, TOP_K, rng), tokens_of(layer, num_tokens, rng)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    one = layer.run(x, ids, weights, num_always=1, num_generated=num_generated)
    for num_threads in (2, 3, 11):
        many = layer.run(x, ids, weights, num_always=1, num_threads=num_threads, num_generated=num_generated)
        assert np.array_equal(many, one)


@pytest.mark.parametrize("names", [("F32", "F32"), ("Q8_0", "Q8_0"), ("Q4_K", "TQ1_0")])
@pytest.mark.parametrize("hostile", [np.nan, np.inf])
@pytest.mark.parametrize("num_tokens", [2, 6])
def test_what_is_not_finite_stays_with_its_token(names, hostile, num_tokens):
    rng = np.random.default_rng(9)
    layer = Layer(names, rng)
    x, ids = tokens_of(layer, num_tokens, rng), distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
    x[1, 5] = hostile
    out = layer.run(x, ids, np.ones(ids.shape, np.float32))
    assert not np.isfinite(out[1]).any()
    assert np.isfinite(np.delete(out, 1, axis=0)).all()


@pytest.mark.parametrize("ends", [(1, 3), (2, 3), (1, 2, 3), (3, 4)])
@pytest.mark.parametrize(("num_tokens", "num_generated"), [(2, 2), (2, 0), (40, 3)])
def test_memory_nodes_change_no_bit(ends, num_tokens, num_generated):
    """Threads on several nodes go through the experts' rows in another order."""
    rng = np.random.default_rng(7)
    layer = Layer(("Q4_K", "Q8_0"), rng)
    ids = distinct_ids(num_tokens, NUM_ROUTED - 1, TOP_K, rng)
    weights, x = rng.uniform(0.1, 1, ids.shape).astype(np.float32), tokens_of(layer, num_tokens, rng)
    num_threads, num_pairs, results = ends[-1], num_tokens * (TOP_K + 1), []
    for groups in ((), groups_of(ends)):
        out = np.zeros((num_tokens, layer.num_out), np.float32)
        hidden = Activations(num_pairs, layer.width, {layer.kinds[1]})
        scratch_bytes = experts_scratch_bytes(layer.k, layer.width, num_tokens)
        run = run_table(num_tokens, num_threads, scratch_bytes, num_pairs, num_generated)
        op = layer.op(run, activations(x, layer.kinds[0]), out, hidden, ids, weights, 1)
        run_ops([op], num_threads, groups)
        results.append(out)
    assert np.array_equal(*results) and np.abs(results[0]).max() > 0
