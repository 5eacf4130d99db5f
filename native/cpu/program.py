"""Programs: operations in order, ready for a team of threads.

An operation is a kernel and an int64 array of its arguments: numbers, and addresses of what it works on. It also holds
the owners of those addresses, so that nothing that a program points to can be freed before the program is.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class HasAddress(Protocol):
    """A kernel, a run table, activations, a matrix: what kernels know by an address that it keeps valid."""

    @property
    def address(self) -> int: ...


Argument = int | float | np.ndarray | HasAddress | None


class Op(NamedTuple):
    """`kernel(arguments, thread, team)`; `owners` keep alive what the arguments point to."""

    kernel: int  # address
    arguments: np.ndarray  # int64
    owners: tuple[object, ...]

    @classmethod
    def of(cls, kernel: HasAddress, *values: Argument, owners: Sequence[object] = ()) -> "Op":
        """Each value takes a cell of 8 bytes: a number, a float as the bits of a float32 (`load_f32` reads it), the
        address of an array or object, 0 for None. `owners`: what arrays of addresses among the values point to."""
        kept = [value for value in values if not isinstance(value, (int, float, np.number, type(None)))]
        return cls(kernel.address, np.array([_cell(value) for value in values], np.int64), (kernel, *kept, *owners))


def _cell(value: Argument) -> int:
    if value is None:
        return 0
    if isinstance(value, (float, np.floating)):
        return struct.unpack("<i", struct.pack("<f", value))[0]
    if isinstance(value, (int, np.integer)):
        return int(value)
    return value.ctypes.data if isinstance(value, np.ndarray) else value.address


class Program:
    """Operations in order; holds them, and they what they point to."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.replace(ops)

    def replace(self, ops: Sequence[Op]) -> None:
        """Makes it a program of other operations; not while it runs."""
        self.ops = tuple(ops)
        self._table = np.array([(op.kernel, op.arguments.ctypes.data) for op in self.ops], np.int64).reshape(-1, 2)

    @property
    def address(self) -> int:
        """(kernel, arguments) pairs of addresses."""
        return self._table.ctypes.data
