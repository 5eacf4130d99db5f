"""Compiles kernels when they are first needed, keeps them on disk, and tells who is waiting what takes so long."""

from collections.abc import Callable
from functools import cached_property

from numba import cfunc, types

KERNEL = types.void(types.int64, types.int64, types.int64)  # (args address, thread number, team address)
FASTMATH = {"nsz", "contract"}  # NaN and infinity keep their meaning


class Kernel:
    """A C function that is compiled when its address is first asked for."""

    def __init__(self, function: Callable, signature: types.Type) -> None:
        self._function, self._signature = function, signature
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self):
        """The `numba.cfunc`, for its `.ctypes` and its machine code."""
        options = {"cache": True, "fastmath": FASTMATH, "error_model": "numpy"}
        return cfunc(self._signature, **options)(self._function)

    @property
    def address(self) -> int:
        return self.compiled.address


def kernel(function: Callable) -> Kernel:
    """Makes an operation of a program: `kernel(args, thread, team)`."""
    return Kernel(function, KERNEL)
