"""The operations around matrices against the oracle: linear layers in both forms, embedding rows; any number of
threads."""

import numpy as np
import pytest

from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.linear import Product, embed_op, linear_op
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.reference import linear, seen_activations
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native.closeness import assert_close, product_size
from tests.native.harness import activations, groups_of, run_ops, run_table

K = 256
TOKENS = ((1, 0), (1, 1), (4, 4), (9, 0), (37, 20))  # (how many, generated ones among them)


def run_linear(x, tensors, starts, num_threads=1, num_generated=0, groups=()):
    """tensors: (name, data); one operation for all, added to `starts` where there is one. Returns the outputs (T,
    N)."""
    kinds = [activation_kind(name) for name, _ in tensors]
    run, prepared = run_table(len(x), num_threads, num_generated=num_generated), activations(x, *kinds)
    matrices = [Matrix.of(data, name, x.shape[1]) for name, data in tensors]
    outs = [np.full((len(x), len(data) + 2), 7, np.float32) for _, data in tensors]
    for out, start in zip(outs, starts, strict=True):
        if start is not None:
            out[:, :-2] = start
    products = [Product(m, out, start is not None) for m, out, start in zip(matrices, outs, starts, strict=True)]
    run_ops([linear_op(run, prepared, *products)], num_threads, groups)
    assert all((out[:, -2:] == 7).all() for out in outs), "wrote beside its rows"
    return [out[:, :-2] for out in outs]


@pytest.mark.parametrize(("num_tokens", "num_generated"), TOKENS)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 300])
@pytest.mark.parametrize("is_added", [False, True])
def test_linear(num_tokens, num_generated, num_rows, is_added):
    rng = np.random.default_rng(num_rows)
    for name in ("Q8_0", "Q4_K", "F32"):
        x = rng.standard_normal((num_tokens, K)).astype(np.float32)
        data = hostile_rows(name, num_rows, K, rng)
        start = rng.standard_normal((num_tokens, num_rows)).astype(np.float32) if is_added else None
        [out] = run_linear(x, [(name, data)], [start], num_generated=num_generated)
        weights, kind = dequantize(data, name), activation_kind(name)
        size = product_size(weights, seen_activations(x, kind)) + (np.abs(start) if is_added else 0)
        assert_close(out, linear(weights, x, kind) + (start if is_added else 0), size)


@pytest.mark.parametrize(("num_tokens", "num_generated"), TOKENS)
def test_several_matrices_of_different_types_share_an_input(num_tokens, num_generated):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((num_tokens, K)).astype(np.float32)
    tensors = [
        (name, hostile_rows(name, rows, K, rng))
        for name, rows in (("Q4_0", 40), ("F16", 3), ("Q6_K", 130), ("Q4_0", 1))
    ]
    starts = [None, np.ones((num_tokens, 3), np.float32), None, None]
    outs = run_linear(x, tensors, starts, 2, num_generated)
    for (name, data), start, out in zip(tensors, starts, outs, strict=True):
        weights, kind = dequantize(data, name), activation_kind(name)
        assert_close(out, linear(weights, x, kind) + (0 if start is None else start), product_size(weights, x) + 1)


@pytest.mark.parametrize(("num_tokens", "num_generated"), TOKENS)
def test_neither_threads_nor_other_tokens_matter(num_tokens, num_generated):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((num_tokens, K)).astype(np.float32)
    tensors = [(name, hostile_rows(name, 301, K, rng)) for name in ("Q8_0", "TQ1_0", "BF16")]
    starts = [rng.standard_normal((num_tokens, 301)).astype(np.float32), None, None]
    one = run_linear(x, tensors, starts, 1, num_generated)
    for num_threads in (2, 3, 11):
        for a, b in zip(one, run_linear(x, tensors, starts, num_threads, num_generated), strict=True):
            assert np.array_equal(a, b)
    for ends in ((1, 3), (2, 3, 6)):  # on memory nodes
        divided = run_linear(x, tensors, starts, ends[-1], num_generated, groups_of(ends))
        assert all(np.array_equal(a, b) for a, b in zip(one, divided, strict=True))
    for i in range(num_tokens):
        alone = run_linear(x[i : i + 1], tensors, [starts[0][i : i + 1], None, None], 1, int(i < num_generated))
        assert all(np.array_equal(a[i : i + 1], b) for a, b in zip(one, alone, strict=True))


def test_columns_from_the_start_of_wider_rows():
    rng = np.random.default_rng(3)
    data = hostile_rows("Q8_0", 20, 3 * K, rng)
    x = rng.standard_normal((2, K)).astype(np.float32)
    [out] = run_linear(x, [("Q8_0", data)], [None])
    [expected] = run_linear(x, [("Q8_0", np.ascontiguousarray(data[:, : data.shape[1] // 3]))], [None])
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q6_K", "TQ1_0"])
def test_embedding_rows(name):
    rng = np.random.default_rng(4)
    data = hostile_rows(name, 50, K, rng)
    run, out = run_table(7, 2), np.zeros((7, K), np.float32)
    token_ids = np.array([0, 49, 3, 3, 17, 1, 48], np.int32)
    run.set_tokens(token_ids)
    run_ops([embed_op(run, Matrix.of(data, name, K), out)], 2)
    expected = dequantize(data, name)[token_ids].astype(np.float64)
    assert_close(out, expected, np.abs(expected).max(axis=1, keepdims=True), 5e-7)


def test_sizes_are_checked():
    rng = np.random.default_rng(5)
    with pytest.raises(AssertionError):
        Matrix.of(hostile_rows("Q8_0", 2, K, rng), "Q8_0", K - 1)
    with pytest.raises(AssertionError):
        Matrix.of(hostile_rows("Q8_0", 2, K, rng), "Q8_0", 2 * K)
    matrix = Matrix.of(hostile_rows("Q8_0", 5, K, rng), "Q8_0", K)
    x = activations(np.zeros((1, K), np.float32), 32)
    with pytest.raises(AssertionError):
        linear_op(run_table(1), x, Product(matrix, np.zeros((1, 4), np.float32)))
