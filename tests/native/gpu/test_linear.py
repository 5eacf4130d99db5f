"""Products of activations and GGUF matrices on the hybrid path, against the oracle."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.native.gpu import linear as kimi_linear
from kimi_lite.native.gpu.dequant import dequantize as dequantize_rows
from kimi_lite.native.gpu.linear import MANY_TOKENS, heads_linear, linear
from kimi_lite.native.gpu.matvec import matvec
from kimi_lite.native.gpu.product import q8_0_product
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import linear as oracle
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native.closeness import assert_close, product_size
from tests.native.gpu.tensors import apart, back, on, seen

TYPES = list(BY_NAME)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def _case(name, num_rows, num_tokens, device, dtype, regime="normal"):
    rng = np.random.default_rng(3)
    k = 3 * max(BY_NAME[name].block_size, 10)
    rows = hostile_rows(name, num_rows, k, rng, regime)
    x = on(device, rng.standard_normal((num_tokens, k)).astype(np.float32), dtype)
    weights = dequantize(rows, name)
    return rows, x, k, oracle(weights, seen(x), 0), product_size(weights, seen(x))


@pytest.mark.parametrize("name", TYPES)
def test_few_tokens(name, device):
    """Float32 arithmetic: as near to the oracle as rounding allows. Rows apart, not a multiple of what a program
    takes."""
    rows, x, k, expected, size = _case(name, 2, 3, device, FLOAT32)
    assert_close(back(linear(x, apart(device, rows, 4), name, k)), expected, size)


@pytest.mark.parametrize("regime", ["denormal", "huge", "zero"])
@pytest.mark.parametrize("name", ["Q8_0", "TQ1_0", "MXFP4"])
def test_hostile_scales(name, regime, device):
    rows, x, k, expected, size = _case(name, 2, 1, device, FLOAT32, regime)
    assert_close(back(linear(x, on(device, rows), name, k)), expected, size)


@pytest.mark.parametrize("rows_per_program", [2, 8])
def test_several_rows_a_program(rows_per_program, device):
    """As for matrices of 4096 rows and more; the last program has fewer."""
    rows, x, _, expected, size = _case("Q4_0", 7, 1, device, BFLOAT16)
    out = torch.empty((1, 1, 7), device=device)
    assert_close(back(matvec(x[None], on(device, rows)[None], "Q4_0", out, rows_per_program)[0]), expected, size)


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [
    ("Q8_0", BFLOAT16, 2e-6), ("Q8_0", FLOAT32, 2e-5), ("F32", FLOAT32, 2e-6), ("BF16", BFLOAT16, 2e-6),
    ("Q4_K", BFLOAT16, 4e-3), ("TQ1_0", FLOAT32, 8e-3),
])  # fmt: skip
def test_many_tokens(name, dtype, tolerance, device):
    """Q8_0 loses nothing of bfloat16 activations and 2^-17 of float32 ones; others round weights and activations to
    bfloat16."""
    rows, x, k, expected, size = _case(name, 5, 33, device, dtype)
    assert_close(back(linear(x, apart(device, rows, 4), name, k)), expected, size, tolerance)


def test_a_bad_token_stays_alone(device):
    rows, x, k, expected, size = _case("Q8_0", 4, 3, device, FLOAT32)
    x[1, 5] = float("nan")
    actual = back(linear(x, on(device, rows), "Q8_0", k))
    assert np.isnan(actual[1]).all()
    assert_close(actual[[0, 2]], expected[[0, 2]], size[[0, 2]])


@pytest.mark.parametrize(("name", "num_tokens"), [("Q4_0", 20), ("Q4_0", 2), ("Q8_0", 20), ("Q8_0", 7), ("F32", 20)])
def test_writes_where_it_is_told(name, num_tokens, device):
    rows, x, k, expected, size = _case(name, 5, num_tokens, device, FLOAT32)
    whole = torch.full((num_tokens, 9), 7.0, device=device)
    result = linear(x, on(device, rows), name, k, out=whole[:, 2:7])
    assert result.data_ptr() == whole[:, 2:7].data_ptr()
    assert_close(back(result), expected, size, 8e-3)
    assert (whole[:, :2] == 7).all() and (whole[:, 7:] == 7).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_prompt_of_many_tokens(name, dtype, device, monkeypatch):
    """Decoded some rows at a time, the last piece shorter; a bfloat16 matrix is used where it lies."""
    rows, x, k, expected, size = _case(name, 7, MANY_TOKENS, device, dtype)
    monkeypatch.setattr(kimi_linear, "DECODED_WEIGHTS", 3 * k)
    decoded = []
    monkeypatch.setattr(kimi_linear, "dequantize", lambda *given: decoded.append(given) or dequantize_rows(*given))
    actual = linear(x, apart(device, rows, 4), name, k)
    is_split = name == "Q8_0" and dtype == FLOAT32
    assert len(decoded) == (0 if is_split or name == "BF16" else 3)
    assert_close(back(actual), expected, size, 2e-5 if is_split else 8e-3)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("num_tokens", [3, 8, 40])
def test_exact_is_float32_however_many_tokens(name, num_tokens, device):
    """A router's product; the process's own setting of TF32 is as it was afterwards."""
    rows, x, k, expected, size = _case(name, 5, num_tokens, device, FLOAT32)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert_close(back(linear(x, on(device, rows), name, k, is_exact=True)), expected, size, 2e-6)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@settings(max_examples=12)
@given(st.integers(5, 70), st.integers(1, 40), st.integers(1, 9), st.sampled_from([FLOAT32, BFLOAT16]))
def test_products_on_tensor_cores(num_tokens, num_rows, num_blocks, dtype):
    """Any number of tokens, rows and blocks: what does not fill a tile or a round counts for nothing."""
    device = torch.device(os.environ.get("KIMI_LITE_TEST_DEVICE", "cpu"))
    rng = np.random.default_rng(num_tokens * 1000 + num_rows)
    rows = hostile_rows("Q8_0", num_rows, 32 * num_blocks, rng)
    x = on(device, rng.standard_normal((num_tokens, 32 * num_blocks)).astype(np.float32), dtype)
    out = torch.empty((num_tokens, num_rows), device=device)
    weights = dequantize(rows, "Q8_0")
    tolerance = 2e-5 if dtype == FLOAT32 else 2e-6
    q8_0_product(x, apart(device, rows, 4), out)
    assert_close(back(out), oracle(weights, seen(x), 0), product_size(weights, seen(x)), tolerance)


def test_no_tokens(device):
    rows, _, k, _, _ = _case("Q8_0", 4, 1, device, FLOAT32)
    assert linear(torch.empty((0, k), device=device), on(device, rows), "Q8_0", k).shape == (0, 4)


@pytest.mark.parametrize("num_tokens", [1, 18])
def test_heads_have_their_own_matrices(num_tokens, device):
    """x is a part of wider heads, as the rope-less part of queries is; more tokens than one launch takes."""
    rng = np.random.default_rng(4)
    matrices = hostile_rows("Q8_0", 3 * 5, 64, rng).reshape(3, 5, -1)
    x = on(device, rng.standard_normal((num_tokens, 3, 96)).astype(np.float32))[:, :, :64]
    actual = back(heads_linear(x, on(device, matrices), "Q8_0"))
    for head in range(3):
        weights, part = dequantize(matrices[head], "Q8_0"), seen(x[:, head])
        assert_close(actual[:, head], oracle(weights, part, 0), product_size(weights, part))
