"""Every type's kernels against the oracle in guarded memory, on whatever path this process compiles for.

    NUMBA_CPU_NAME=... NUMBA_CPU_FEATURES=... python -m tests.native.path_check <path> [--all]

Says each type before it begins with it, so that a crash has a name. Run by test_simd_paths.
"""

import sys
from contextlib import closing
from unittest import mock

import numpy as np

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.dot import rows_kernel
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.matrix import VALUES_PADDING, values_kernel
from kimi_lite.native.cpu.panel import gemm_kernel, panel_bytes, panel_kernel
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.isa import AVX2, PORTABLE, isa, sum_order
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import linear, seen_activations
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native import exact
from tests.native.closeness import assert_close, product_size, sizes
from tests.native.guard import at_page_end, at_page_start
from tests.native.harness import run_ops, run_table
from tests.native.test_dense import WAYS, check_attention, check_product
from tests.native.test_experts import NUM_ROUTED, TOP_K, Layer, distinct_ids, tokens_of

NUM_TOKENS, NUM_ROWS = 5, 13


def guarded_activations(x: np.ndarray, kind: int) -> Activations:
    """`x` quantized by the kernel; every buffer ends where a forbidden page begins."""
    with mock.patch("numpy.zeros", lambda *args: at_page_end(np.full(args[0], 0, args[1]))):
        result = Activations(len(x), x.shape[1], {kind} - {0})
    result.values[:] = x
    run_ops([quantize_op(run_table(len(x)), result)])
    return result


def check_rows(name: str, data: np.ndarray, x: Activations, expected: np.ndarray) -> None:
    """Bit for bit."""
    out = at_page_end(np.empty((NUM_TOKENS, len(data)), np.float32))
    tokens = at_page_end(np.arange(NUM_TOKENS, dtype=np.int32))
    for first, count in ((0, NUM_TOKENS), (0, 1)):
        target = (out[first:].ctypes.data, out.strides[0])
        rows_kernel(name).compiled.ctypes(
            data.ctypes.data, data.shape[1], len(data), x.address, tokens[first:].ctypes.data, count, *target
        )
    assert np.array_equal(out, expected), np.abs(out - expected).max()


def check_panel(name: str, data: np.ndarray, x: Activations, expected: np.ndarray, size: np.ndarray) -> None:
    out, panel = (
        at_page_end(np.empty((NUM_TOKENS, len(data)), np.float32)),
        at_page_end(np.empty(panel_bytes(x.k), np.uint8)),
    )
    tokens = at_page_end(np.arange(NUM_TOKENS, dtype=np.int32))
    panel_kernel(name).compiled.ctypes(data.ctypes.data, data.shape[1], len(data), x.k, panel.ctypes.data)
    target = (out.ctypes.data, out.strides[0], len(data))
    gemm_kernel(name).compiled.ctypes(panel.ctypes.data, x.address, tokens.ctypes.data, NUM_TOKENS, *target)
    assert_close(out, expected, size)


def check_values(name: str, data: np.ndarray, weights: np.ndarray) -> None:
    out = at_page_end(np.empty(weights.size + VALUES_PADDING // 4, np.float32))
    k = weights.size if not BY_NAME[name].row_scale else weights.shape[1]  # a row with a scale is a run of its own
    for row, first in enumerate(range(0, weights.size, k)):
        values_kernel(name).compiled.ctypes(data[row].ctypes.data, k, out[first:].ctypes.data)
    expected = weights.astype(np.float64)
    assert_close(
        out[: weights.size].reshape(weights.shape), expected, np.abs(expected).max(axis=1, keepdims=True), 5e-7
    )


def check_products(name: str, rng: np.random.Generator) -> None:
    kind = activation_kind(name)
    for k in sizes(name):
        unguarded = hostile_rows(name, NUM_ROWS, k, rng)
        weights, x = dequantize(unguarded, name), rng.standard_normal((NUM_TOKENS, k)).astype(np.float32)
        prepared = guarded_activations(x, kind)
        expected, size = linear(weights, x, kind), product_size(weights, seen_activations(x, kind))
        bits = exact.product(name, unguarded, x, *sum_order())
        for data in (at_page_end(unguarded, is_writable=False), at_page_start(unguarded)):
            check_rows(name, data, prepared, bits)
            check_panel(name, data, prepared, expected, size)
            check_values(name, data, weights)


def check_experts(name: str, rng: np.random.Generator) -> None:
    layer = Layer((name, name), rng)
    for num_tokens in (2, 9):
        ids = distinct_ids(num_tokens, NUM_ROUTED, TOP_K, rng)
        layer.check(tokens_of(layer, num_tokens, rng), ids, rng.uniform(0.1, 1, ids.shape).astype(np.float32))


def check_dense() -> None:
    """What a vision tower runs."""
    with closing(Team(2)) as team:
        for dtype in ("F16", "int8"):
            print("dense", dtype, flush=True)
            check_product(team, dtype, 29, 144, 50, "gelu_tanh")
        for way in WAYS:
            print("attention", way, flush=True)
            check_attention(team, 97, 3, 72, way)


# Types of ik_llama.cpp are made of few codes, tables and scales: these have each of them.
IK_SAMPLE = frozenset(("IQ2_KL", "IQ4_KSS", "IQ6_K", "IQ2_KT", "IQ3_KT"))
# What other machines choose: types that share unpacking, scales and tables stand for each other.
_AVX2 = (
    "F16", "BF16", "Q8_0", "Q4_1", "Q5_0", "MXFP4", "IQ4_XS", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "TQ1_0", "Q2_0", "IQ1_M",
    "IQ2_XS", "IQ3_S", "IQ2_KL", "IQ2_KT",
)  # fmt: skip
_PORTABLE = ("F16", "Q4_1", "IQ4_XS", "Q2_K", "TQ1_0", "IQ1_M", "IQ3_S", "IQ2_KT")  # compiling takes longest there


def names_of(path: str, is_whole: bool) -> list[str]:
    """The types that are checked: with `--all` all of them, a matter of minutes on a cold cache."""
    if is_whole:
        return list(BY_NAME)
    if path in (AVX2, PORTABLE):
        return list(_AVX2 if path == AVX2 else _PORTABLE)
    return [name for name, layout in BY_NAME.items() if not layout.is_ik or name in IK_SAMPLE]


def main(path: str, is_whole: bool) -> None:
    assert isa().name == path, (isa(), path)
    for name in names_of(path, is_whole):
        print(name, BY_NAME[name].block_size, flush=True)
        check_products(name, np.random.default_rng(1))
        check_experts(name, np.random.default_rng(2))
    check_dense()
    print("all equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv)
