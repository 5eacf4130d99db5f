"""Compiles kernels when they are first needed and keeps them on disk. Nothing is compiled at import."""

from collections.abc import Callable
from functools import cached_property

from numba import cfunc, njit, types

from kimi_lite.native.cache import use_kernel_cache

KERNEL = types.void(types.int64, types.int64, types.int64)  # (args address, thread number, team address)
FASTMATH = {"nsz", "contract"}  # NaN and infinity keep their meaning
IN_ORDER = {"nsz"}  # a product and a sum are one operation only where the source says so


class Kernel:
    """A C function that is compiled when its address is first asked for."""

    def __init__(self, function: Callable, signature: types.Type, fastmath: set[str] = FASTMATH) -> None:
        self._function, self._signature, self._fastmath = function, signature, fastmath
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self):
        """The `numba.cfunc`, for its `.ctypes` and its machine code."""
        use_kernel_cache()
        options = {"cache": True, "fastmath": self._fastmath, "error_model": "numpy"}
        return cfunc(self._signature, **options)(self._function)

    @property
    def address(self) -> int:
        return self.compiled.address


def kernel(function: Callable) -> Kernel:
    """Makes an operation of a program: `kernel(args, thread, team)`."""
    return Kernel(function, KERNEL)


class Function:
    """A function that Python calls, compiled when it is first called; it gives up Python's lock while it runs."""

    def __init__(self, function: Callable, signature: types.Type | str, options: dict) -> None:
        self._function, self._signature, self._options = function, signature, options
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Callable:
        use_kernel_cache()
        return njit(self._signature, cache=True, nogil=True, **self._options)(self._function)

    def __call__(self, *arguments):
        return self.compiled(*arguments)


def function(signature: types.Type | str, **options: object) -> Callable[[Callable], Function]:
    """Makes a function that Python calls, of this signature; options are Numba's."""
    return lambda function: Function(function, signature, options)
