"""Products with matrix tiles: against the oracle, against exact sums, and whatever the other tokens are."""

import os
import subprocess
import sys

import numpy as np
import pytest

from kimi_lite.native.amx import has_amx
from kimi_lite.native.cpu.blocks import activation_kind, digits_of
from kimi_lite.native.cpu.linear import Product, linear_op
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.cpu.packing import BEHIND_PACKS, PACK_TOKENS, packs_bytes
from kimi_lite.native.cpu.prebuilt import identity
from kimi_lite.native.cpu.tile_panel import tile_gemm_kernel, tile_panel_kernel, uses_tiles
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import linear, seen_activations
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import hostile_rows, random_rows
from tests.native.closeness import assert_close, product_size, sizes
from tests.native.harness import activations_for, run_ops, run_table

# One of every form: groups of 32 and 16, with minima and without; one digit and two, signed and not, minima of three
# kinds, a scale in front of the row. `path_check` multiplies every type as experts.
NAMES = ["Q8_0", "Q4_0", "NVFP4", "TQ1_0", "Q2_K", "Q3_K", "Q4_K", "IQ1_M", "IQ2_XXS", "IQ3_KT"]
needs_tiles = pytest.mark.skipif(not has_amx(), reason="this CPU has no AMX, or the system does not let us use it")


def product(name, data, x, num_threads=1, start=None):
    """uint8 (N, row_bytes) times float32 (T, K) as an operation of prompts -> float32 (T, N)."""
    matrix = Matrix.of(data, name, x.shape[1])
    out = np.full((len(x), len(data)), 7, np.float32) if start is None else start.copy()
    op = linear_op(run_table(len(x), num_threads), activations_for(name, x), Product(matrix, out, start is not None))
    run_ops([op], num_threads)
    return out


def test_every_type_of_llama_cpp_has_a_form_for_tiles():
    own = {name for name, layout in BY_NAME.items() if layout.product != "float" and not layout.is_ik}
    assert not [name for name in own if BY_NAME[name].product == "block256" and digits_of(name) is None]
    assert {name for name in own if uses_tiles(name)} == (own if has_amx() else set())


def test_kernels_can_be_kept():
    """Nothing but plain values in their closures: else every start would compile them (`native.cpu.prebuilt`)."""
    for name in NAMES:
        for kernel in (tile_panel_kernel(name), tile_gemm_kernel(name)):
            assert identity(kernel.function, kernel.signature)


@needs_tiles
@pytest.mark.parametrize("name", NAMES)
def test_product(name):
    """Tokens that fill packs and that do not, few and many enough for both of a kernel's steps; rows likewise."""
    rng, kind = np.random.default_rng(1), activation_kind(name)
    for k, num_rows, num_tokens in zip(sizes(name), (1, 70, 16, 133, 45), (1, 16, 47, 150, 81), strict=False):
        data, x = hostile_rows(name, num_rows, k, rng), rng.standard_normal((num_tokens, k)).astype(np.float32)
        weights = dequantize(data, name)
        size = product_size(weights, seen_activations(x, kind))
        assert_close(product(name, data, x, 2), linear(weights, x, kind), size)


@needs_tiles
@pytest.mark.parametrize("name", NAMES)
def test_a_token_has_the_same_bits_alone_and_on_any_number_of_threads(name):
    rng = np.random.default_rng(2)
    k = 512 if activation_kind(name) == 256 else 576
    k += -k % BY_NAME[name].block_size
    data, x = random_rows(BY_NAME[name], 77, k, 0.1, rng), rng.standard_normal((83, k)).astype(np.float32)
    together, start = product(name, data, x), rng.standard_normal((83, 77)).astype(np.float32)
    assert np.array_equal(product(name, data, x, 2), together)
    assert np.array_equal(product(name, data, x, start=start), start + together)
    for first, last in ((0, 1), (5, 21), (17, 49), (82, 83)):
        assert np.array_equal(product(name, data, x[first:last], 2), together[first:last])


@needs_tiles
@pytest.mark.parametrize("name", ["TQ1_0", "Q2_K", "Q3_K", "Q4_K", "IQ1_M", "IQ2_XXS"])
def test_super_blocks_add_up_as_whole_numbers(name):
    """Weights that are whole numbers times a power of two, with activations that are codes: nothing is rounded."""
    rng = np.random.default_rng(3)
    data = random_rows(BY_NAME[name], 40, 256, 0.1, rng)
    for field in {"d", "dmin"} & set(BY_NAME[name].dtype.names):
        data.reshape(-1).view(BY_NAME[name].dtype)[field] = 0.5
    if name == "IQ1_M":
        fields = data.reshape(-1).view(BY_NAME[name].dtype)
        scales = fields["scales"].view("<u2").reshape(-1, 4)
        scales[:] = scales & 0x0FFF | [0, 0, 0x8000, 0x3000]  # the four nibbles of float16 0.5
    x = rng.integers(-127, 128, (19, 256)).astype(np.float32)
    x[:, 0] = 127  # so that the scale is 1
    exact = (x.astype(np.float64) @ dequantize(data, name).astype(np.float64).T).astype(np.float32)
    assert np.array_equal(product(name, data, x), exact)


@needs_tiles
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "TQ1_0", "Q4_K"])
def test_what_is_no_number_is_not_hidden(name, value):
    """And stays with its token."""
    rng = np.random.default_rng(4)
    data, x = random_rows(BY_NAME[name], 20, 512, 0.1, rng), rng.standard_normal((20, 512)).astype(np.float32)
    x[7, 300] = value
    out = product(name, data, x)
    assert np.isnan(out[7]).all() and np.isfinite(np.delete(out, 7, axis=0)).all()


def test_packs_have_memory_for_whole_tiles():
    x = activations_for("Q8_0", np.zeros((3, 320), np.float32))
    assert packs_bytes(x, 2) == 2 * 2 * (256 * PACK_TOKENS + 1024) + BEHIND_PACKS


def test_tiles_can_be_switched_off():
    code = "from kimi_lite.native.amx import has_amx; print(has_amx())"
    environment = os.environ | {"KIMI_LITE_AMX": "0"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "False\n"
