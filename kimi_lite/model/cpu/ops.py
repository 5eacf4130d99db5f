"""What a layer's operations are called, which weights they read, and what those weights are multiplied with.

Traces show the names. `walk.LayerWalk` shows the inputs: importance matrices and calibration are made of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kimi_lite.native.cpu.program import Op, Program


class Inputs(NamedTuple):
    """What matrices are multiplied with, valid until the next operation runs. `weights`: the GGUF names of tensors that
    take the same inputs. `values`: float32 (rows, k). Matrix m of the tensor (expert or head) takes
    values[rows[starts[m]:starts[m + 1]]]; without `starts` there is one matrix and it takes all. `num_tokens`: of the
    chunk, 0 where `starts` counts for each matrix."""

    weights: tuple[str, ...]
    values: np.ndarray
    starts: np.ndarray | None = None  # (matrices + 1,)
    rows: np.ndarray | None = None  # (starts[-1],); None: 0, 1, 2, ...
    num_tokens: int = 0


class Reads(NamedTuple):
    """Weights that an operation reads. `inputs(weights, num_tokens)`: what they are multiplied with, in the buffers
    before the operation runs, or, where the operation itself makes it, after."""

    weights: tuple[str, ...]  # GGUF names; one that the file lacks is not there under this name
    inputs: Callable[[tuple[str, ...], int], Inputs]
    is_after: bool = False


class LayerOp(NamedTuple):
    """One operation of a layer."""

    stage: str
    op: Op
    reads: tuple[Reads, ...] = ()


def make_program(ops: Sequence[LayerOp]) -> Program:
    return Program([each.op for each in ops])


# Which rows of a buffer a weight takes --------------------------------------------------------------------------------


def every_token(values: np.ndarray) -> Callable[[tuple[str, ...], int], Inputs]:
    """values: float32 (capacity, k); one matrix takes all rows."""
    return lambda weights, num_tokens: Inputs(weights, values[:num_tokens], num_tokens=num_tokens)


def by_head(view: Callable[[int], np.ndarray]) -> Callable[[tuple[str, ...], int], Inputs]:
    """view(num_tokens): float32 (T, heads, k); the matrix of each head takes its own rows."""

    def inputs(weights: tuple[str, ...], num_tokens: int) -> Inputs:
        rows = view(num_tokens)  # (T, H, k)
        num_rows, heads, k = rows.shape
        values = rows.swapaxes(0, 1).reshape(-1, k)  # (H * T, k)
        return Inputs(weights, values, np.arange(heads + 1) * num_rows, num_tokens=num_rows)

    return inputs


def by_choice(values: np.ndarray, ids: np.ndarray, num_experts: int) -> Callable[[tuple[str, ...], int], Inputs]:
    """values: float32 (capacity, k), ids: int32 (capacity, K); each expert takes the rows of the tokens that chose
    it."""

    def inputs(weights: tuple[str, ...], num_tokens: int) -> Inputs:
        order, starts = _order_of_pairs(ids[:num_tokens], num_experts)
        return Inputs(weights, values[:num_tokens], starts, order // ids.shape[1])

    return inputs


def by_pair(values: np.ndarray, ids: np.ndarray, num_experts: int) -> Callable[[tuple[str, ...], int], Inputs]:
    """values: float32 (pairs, k), a row for each (token, expert) pair in the kernel's order; each expert takes its
    own."""

    def inputs(weights: tuple[str, ...], num_tokens: int) -> Inputs:
        _, starts = _order_of_pairs(ids[:num_tokens], num_experts)
        return Inputs(weights, values[: starts[-1]], starts)

    return inputs


def side_by_side(values: np.ndarray, first_pair: int, count: int) -> Callable[[tuple[str, ...], int], Inputs]:
    """values: float32 (pairs, k). A wide expert that every token takes runs as `count` narrow ones, whose rows lie
    behind the `first_pair` pairs that a token has before: one matrix takes them joined again, (T, count * k)."""

    def inputs(weights: tuple[str, ...], num_tokens: int) -> Inputs:
        pieces = values[first_pair * num_tokens : (first_pair + count) * num_tokens].reshape(count, num_tokens, -1)
        return Inputs(weights, np.concatenate(list(pieces), axis=1), num_tokens=num_tokens)

    return inputs


def _order_of_pairs(ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's order of (token, choice) pairs, by expert and then by token; where each expert's begin (experts +
    1,)."""
    flat = ids.reshape(-1)
    counts = np.bincount(flat, minlength=num_experts)
    return np.argsort(flat, kind="stable"), np.concatenate([[0], np.cumsum(counts)])
