"""Calls native kernels from tests: operations on a team, and the products of one matrix, with canaries around
results."""

import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.dot import rows_kernel
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.native.cpu.panel import ADD, PANEL_ROWS, gemm_kernel, panel_bytes, panel_kernel
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team

CANARY = np.float32(-12345.5)


def groups_of(ends: Sequence[int]) -> tuple[ThreadGroup, ...]:
    """Threads on pretended memory nodes, up to each of `ends`; on one, none. All have this process's CPUs."""
    cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    parts = enumerate(pairwise((0, *ends)))
    return tuple(ThreadGroup(node, node, cpus, *part) for node, part in parts) if len(ends) > 1 else ()


def run_ops(ops: Sequence[Op], num_threads: int = 1, groups: Sequence[ThreadGroup] = ()) -> None:
    """Runs operations as one program on a team of their own."""
    team = Team(num_threads, groups)
    try:
        team.run(Program(ops))
    finally:
        team.close()


def run_table(
    num_tokens: int, num_threads: int = 1, scratch_bytes: int = 1 << 20, num_pairs: int = 0, num_generated: int = 0
) -> RunTable:
    """A run of `num_tokens` tokens with ids 0, 1, 2, ..., the first `num_generated` of them generated."""
    run = RunTable(num_tokens, num_threads, scratch_bytes, num_pairs)
    run.set_tokens(np.arange(num_tokens, dtype=np.int32), num_generated)
    return run


def activations(x: np.ndarray, *kinds: int) -> Activations:
    """float32 (T, K) with its int8 forms, made by the kernel. Kind 0 needs none."""
    result = Activations(len(x), x.shape[1], set(kinds) - {0})
    result.values[:] = x
    run_ops([quantize_op(run_table(len(x)), result)])
    return result


def activations_for(name: str, x: np.ndarray) -> Activations:
    """`x` in the form that weights of type `name` multiply."""
    return activations(x, activation_kind(name))


def rows_product(name: str, data: np.ndarray, x: Activations, tokens: np.ndarray | None = None) -> np.ndarray:
    """uint8 (N, row_bytes) times the activation rows `tokens` (int32; None: all) by the `rows` kernel, at once ->
    float32 (tokens, N)."""
    tokens = np.arange(x.capacity, dtype=np.int32) if tokens is None else tokens
    num_rows, num_tokens = len(data), len(tokens)
    out = np.full((num_tokens + 1, num_rows + 16), CANARY, np.float32)
    rows_kernel(name).compiled.ctypes(
        data.ctypes.data,
        data.strides[0],
        num_rows,
        x.address,
        tokens.ctypes.data,
        num_tokens,
        out.ctypes.data,
        out.strides[0],
    )
    assert (out[:, num_rows:] == CANARY).all() and (out[num_tokens] == CANARY).all(), "rows wrote behind its result"
    return out[:num_tokens, :num_rows]


def panel_product(
    name: str, data: np.ndarray, x: Activations, tokens: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
    """The same by panels of up to 16 rows, for the activation rows `tokens` (int32) -> float32 (tokens, N), +
    `start`."""
    num_rows, num_tokens = len(data), len(tokens)
    out = np.full((num_tokens + 1, num_rows + 16), CANARY, np.float32)
    if start is not None:
        out[:num_tokens, :num_rows] = start
    panel = np.full(panel_bytes(x.k), 0xAB, np.uint8)
    for first in range(0, num_rows, PANEL_ROWS):
        count = min(PANEL_ROWS, num_rows - first)
        panel_kernel(name).compiled.ctypes(data[first:].ctypes.data, data.strides[0], count, x.k, panel.ctypes.data)
        mode = count + (0 if start is None else ADD)
        target = out.ctypes.data + 4 * first
        gemm_kernel(name).compiled.ctypes(
            panel.ctypes.data, x.address, tokens.ctypes.data, num_tokens, target, out.strides[0], mode
        )
    assert (out[:num_tokens, num_rows:] == CANARY).all() and (out[num_tokens] == CANARY).all(), (
        "gemm wrote beside its result"
    )
    return out[:num_tokens, :num_rows]
