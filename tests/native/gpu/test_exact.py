"""The GPU's exact products, bit for bit: each type against the rule in numpy, whole experts against the CPU's kernels.

The interpreter computes kernels in numpy, operation by operation; what a compiler could change, contraction, division
and denormals, is read from the compiled code (test_compile.py).
"""

from unittest import mock

import numpy as np
import pytest
import torch

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.experts import experts_op, experts_scratch_bytes
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.gpu import exact as gpu
from kimi_lite.native.gpu.experts import ExpertMatrix, expert_choices
from kimi_lite.native.isa import SumOrder, sum_order
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import quantize_activations
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native import exact
from tests.native.gpu.tensors import back, on
from tests.native.gpu.test_experts import matrices_of, slots_of
from tests.native.harness import run_ops, run_table
from tests.native.test_exact import same_bits

ORDERS = [SumOrder(16, 128), SumOrder(8, 0), SumOrder(8, 128), SumOrder(16, 0)]


def rows_on_gpu(name: str, data: np.ndarray, x: np.ndarray, device) -> np.ndarray:
    """uint8 (N, row_bytes), float32 (T, K) -> (T, N), by the kernel of `down`."""
    matrix = ExpertMatrix(name, 0, len(data), x.shape[1], data.shape[1])
    slot = np.pad(data.reshape(1, -1), [(0, 0), (0, -data.size % 256)])
    out = torch.zeros((len(x), len(data)), device=device)
    gpu.exact_down(on(device, x), on(device, slot), matrix, torch.zeros(len(x), dtype=torch.int32, device=device), out)
    return back(out)


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_have_the_bits_of_the_rule(name, device):
    """Two super-blocks, or a span and a part of one; one of four orders, which types take by turns."""
    rng, number = np.random.default_rng(41), list(BY_NAME).index(name)
    k = 512 if activation_kind(name) == 256 else 256 + max(64, BY_NAME[name].block_size)
    x, data = rng.standard_normal((1, k)).astype(np.float32), hostile_rows(name, 5, k, rng)
    order = ORDERS[number % len(ORDERS)]
    with mock.patch.object(gpu, "sum_order", return_value=order):
        assert same_bits(rows_on_gpu(name, data, x, device), exact.product(name, data, x, *order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ4_XS"])
def test_every_order_a_cpu_may_have(name, order, device):
    """One block each of the types that a CPU's bias or its lanes change."""
    rng = np.random.default_rng(42)
    x, data = rng.standard_normal((1, 256)).astype(np.float32), hostile_rows(name, 3, 256, rng)
    with mock.patch.object(gpu, "sum_order", return_value=order):
        assert same_bits(rows_on_gpu(name, data, x, device), exact.product(name, data, x, *order))


@pytest.mark.parametrize("kind", [32, 256])
def test_activations_become_the_same_codes(kind, device):
    rng = np.random.default_rng(42)
    x = rng.standard_normal((7, 5 * kind)).astype(np.float32)
    x[1] = 0
    x[2, ::3] *= 1e-40
    x[3] *= 1e-36  # the smallest that counts
    x[4, kind + 3], x[4, 2 * kind], x[4, 3 * kind] = np.nan, np.inf, -np.inf
    x[5] = rng.integers(-127, 128, x.shape[1]) * np.float32(0.5)  # halves: rounded to even
    x[5, ::kind] = 127
    made = gpu.quantize(on(device, x), kind)
    codes, scales = quantize_activations(x, kind)
    assert np.array_equal(made.codes.cpu().numpy().view(np.int8), codes)
    assert np.array_equal(back(made.steps), np.repeat(scales, kind // 32, axis=1), equal_nan=True)
    assert np.array_equal(back(made.sums), codes.reshape(7, -1, 16).astype(np.int32).sum(axis=2))


@pytest.mark.parametrize("types", [("Q4_K", "Q4_K"), ("Q8_0", "IQ2_XXS")], ids="-".join)
def test_swiglu_has_the_cpus_exponential(types, device):
    """Gate and up of eight rows, from small values to beyond the exponential's limits."""
    rng = np.random.default_rng(43)
    x = rng.standard_normal((2, 256)).astype(np.float32) * np.array([[1], [300]], np.float32)
    weights = [exact.Weights(name, hostile_rows(name, 8, 256, rng)) for name in types]
    matrices, offset = [], 0
    for name, data in weights:
        matrices.append(ExpertMatrix(name, offset, 8, 256, data.shape[1]))
        offset += -(-data.size // 256) * 256
    slot = np.zeros((1, offset), np.uint8)
    for matrix, (_, data) in zip(matrices, weights, strict=True):
        slot[0, matrix.offset : matrix.offset + data.size] = data.reshape(-1)
    hidden = torch.zeros((2, 8), device=device)
    choices = on(device, np.zeros(2, np.int32)), on(device, np.arange(2, dtype=np.int32))
    gpu.exact_gate_up(on(device, x), on(device, slot), *matrices, *choices, hidden)
    gate, up = (exact.product(*each, x, *sum_order()) for each in weights)
    assert same_bits(back(hidden), exact.swiglu(gate, up)) and np.abs(gate).max() > 88


def test_an_expert_moves_and_the_answer_stays(device):
    """Gate, up, SwiGLU and down by the CPU's kernel, by the GPU's, by the rule: one choice is absent."""
    slots = slots_of(("Q8_0", "Q4_0", "Q5_0"), 3, 32, 32)
    x = np.random.default_rng(43).standard_normal((2, 32)).astype(np.float32)
    chosen, tokens = np.array([1, -1, 0], np.int32), np.array([1, 0, 0], np.int32)
    out = torch.full((3, 32), 7.0, device=device)
    choice = on(device, chosen), on(device, tokens)
    have = back(expert_choices(on(device, x), on(device, slots.data), slots.form, *choice, out, is_exact=True))
    assert (have[1] == 7).all()
    for i in (0, 2):
        row = x[tokens[i] : tokens[i] + 1]
        assert same_bits(have[i : i + 1], exact.expert(row, *matrices_of(slots, chosen[i]), *sum_order()))
        assert same_bits(have[i : i + 1], on_cpu(slots, chosen[i], row))


def on_cpu(slots, number: int, x: np.ndarray) -> np.ndarray:
    """One expert by `native.cpu.experts`: float32 (1, D) -> (1, N)."""
    weights = matrices_of(slots, number)
    kinds = [{activation_kind(each.name)} - {0} for each in weights]
    inputs, hidden = Activations(1, x.shape[1], kinds[0] | kinds[1]), Activations(1, slots.form.down.k, kinds[2])
    table = np.stack([Matrix.of(w.data, w.name, m.k).table for w, m in zip(weights, slots.form, strict=True)])[None]
    run = run_table(1, scratch_bytes=experts_scratch_bytes(x.shape[1], slots.form.down.k, 1), num_pairs=1)
    rows, choice = np.zeros_like(x), (np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))
    inputs.values[:] = x
    options = {"num_always": 0, "weights_owner": None, "has_few_each": True, "per_choice": rows}
    run_ops([quantize_op(run, inputs), experts_op(run, inputs, rows, table, hidden, *choice, **options)])
    return rows
