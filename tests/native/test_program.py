"""Operations and programs: cells of arguments, and that what they point to lives as long as they do (reference counts:
nothing here is in a cycle)."""

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.linear import Product, linear_op
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.run import Attending, RunTable
from kimi_lite.native.cpu.threads import next_task
from kimi_lite.native.simd import load_i64, store_i64
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native.harness import run_ops


@kernel
def _count(args, thread, team):
    """*args[0] += args[1]."""
    if next_task(team) == 0:
        store_i64(load_i64(args), load_i64(load_i64(args)) + load_i64(args + 8))


class Owner:
    """An object that kernels know by the address of its array."""

    def __init__(self) -> None:
        self.array = np.zeros(4)

    @property
    def address(self) -> int:
        return self.array.ctypes.data


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(width=32), st.booleans(), st.none()), max_size=9))
def test_numbers_travel_as_cells(values):
    op = Op.of(_count, *values)
    assert op.arguments.dtype == np.int64 and len(op.arguments) == len(values)
    for cell, value in zip(op.arguments, values, strict=True):
        if isinstance(value, float):
            assert np.array_equal(cell.reshape(1).view(np.float32)[0], np.float32(value), equal_nan=True)
        else:
            assert cell == (0 if value is None else value)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["array", "view", "object"]), min_size=1, max_size=6))
def test_a_program_keeps_what_it_points_to(kinds):
    things = {"array": lambda: np.zeros(3), "view": lambda: np.zeros((4, 5))[1:, 2:], "object": Owner}
    values = [things[kind]() for kind in kinds]
    addresses = [value.address if isinstance(value, Owner) else value.ctypes.data for value in values]
    alive = [weakref.ref(value if isinstance(value, Owner) or value.base is None else value.base) for value in values]
    behind = np.zeros(7)
    alive.append(weakref.ref(behind))
    program = Program([Op.of(_count, *values, owners=(behind,))])
    assert program.ops[0].arguments.tolist() == addresses
    del values, behind
    assert all(each() is not None for each in alive)
    del program
    assert all(each() is None for each in alive)


def test_a_program_of_weights_outlives_their_names():
    """The bytes of a matrix, its table, the inputs and the run's table have no other owner."""
    rng = np.random.default_rng(0)
    run, x = RunTable(1, 1, 1 << 20), Activations(1, 256, {32})
    run.set_tokens(np.zeros(1, np.int32))
    x.values[:] = rng.standard_normal((1, 256))
    data, out = hostile_rows("Q8_0", 8, 256, rng), np.zeros((1, 8), np.float32)
    alive = [weakref.ref(each) for each in (run, x, data)]
    op = linear_op(run, x, Product(Matrix.of(data, "Q8_0", 256), out))
    del run, x, data
    assert all(each() is not None for each in alive)
    run_ops([op])
    del op
    assert not any(each() for each in alive)


def test_replaced_operations():
    counts = np.zeros(2, np.int64)
    program = Program([Op.of(_count, counts, 1)])
    run_ops(program.ops)
    program.replace([Op.of(_count, counts[1:], 5)] * 3)
    run_ops(program.ops)
    assert counts.tolist() == [1, 15]


def test_a_run_table_keeps_a_batch_until_the_next():
    run = RunTable(4, 1, 4096)
    ids, pages = np.arange(2, dtype=np.int32), np.arange(3, dtype=np.int32)
    alive = [weakref.ref(ids), weakref.ref(pages)]
    run.set_tokens(ids)
    run.set_attention([Attending(0, 1, 5, pages)], [])
    del ids, pages
    assert all(each() is not None for each in alive)
    run.set_tokens(np.zeros(1, np.int32))
    run.set_attention([], [])
    assert not any(each() is not None for each in alive)
    with pytest.raises(AssertionError):
        run.set_attention([Attending(0, 1, 0, np.zeros(2, np.int64))], [])
    with pytest.raises(AssertionError):
        run.set_attention([Attending(0, 2, 0, np.zeros(2, np.int32))], [])
