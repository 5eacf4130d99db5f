"""Compiles kernels when they are first needed and keeps them on disk, unless they came with the program (`prebuilt`).
Nothing is compiled at import."""

import ctypes
from collections.abc import Callable
from functools import cached_property

from numba import cfunc, njit, types
from numba.core.sigutils import normalize_signature

from kimi_lite.native.cache import is_kept, use_kernel_cache
from kimi_lite.native.cpu import prebuilt

KERNEL = types.void(types.int64, types.int64, types.int64)  # (args address, thread number, team address)
FASTMATH = {"nsz", "contract"}  # NaN and infinity keep their meaning
IN_ORDER = {"nsz"}  # a product and a sum are one operation only where the source says so


class Kernel:
    """A C function that is compiled when its address is first asked for."""

    def __init__(self, function: Callable, signature: types.Type, fastmath: set[str] = FASTMATH) -> None:
        self.function, self.signature, self._fastmath = function, signature, fastmath
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self):
        """The `numba.cfunc`, for its `.ctypes` and its machine code."""
        use_kernel_cache()
        options = {"cache": True, "fastmath": self._fastmath, "error_model": "numpy"}
        return cfunc(self.signature, **options)(self.function)

    @cached_property
    def address(self) -> int:
        return prebuilt.find(self.function, self.signature) or self.compiled.address

    @property
    def is_at_hand(self) -> bool:
        """Whether nothing needs to be compiled for its address."""
        known = vars(self).keys() & {"address", "compiled"}
        return bool(known) or prebuilt.has(self.function, self.signature) or is_kept(self.function, self.signature)

    def __call__(self, *arguments: int) -> None:
        """Calls it from Python, whose lock others have meanwhile; for kernels of integers."""
        self._called_from_python(*arguments)

    @cached_property
    def _called_from_python(self) -> Callable:
        assert {*self.signature.args} == {types.int64}, self.signature
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(self.signature.args))(self.address)


def kernel(function: Callable) -> Kernel:
    """Makes an operation of a program: `kernel(args, thread, team)`."""
    return Kernel(function, KERNEL)


class Function:
    """A function that Python calls, compiled when it is first called; it gives up Python's lock while it runs."""

    def __init__(self, function: Callable, signature: types.Type | str, options: dict) -> None:
        self.function, self.signature, self._options = function, signature, options
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Callable:
        """Numba's dispatcher."""
        use_kernel_cache()
        return njit(self.signature, cache=True, nogil=True, **self._options)(self.function)

    @cached_property
    def num_integers(self) -> int | None:
        """How many int64 arguments it takes, where it takes nothing else and returns an int64 or nothing."""
        arguments, result = normalize_signature(self.signature)
        is_plain = {*arguments, result} <= {types.int64, types.void}
        return len(arguments) if is_plain else None

    @cached_property
    def _callable(self) -> Callable:
        address = None if self.num_integers is None else prebuilt.find(self.function, self.signature)
        if address is None:
            return self.compiled
        result = None if normalize_signature(self.signature)[1] == types.void else ctypes.c_int64
        return ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * self.num_integers)(address)

    def prepare(self) -> None:
        """Compiles it now, or finds it compiled."""
        _ = self._callable

    def __call__(self, *arguments):
        return self._callable(*arguments)


def function(signature: types.Type | str, **options: object) -> Callable[[Callable], Function]:
    """Makes a function that Python calls, of this signature; options are Numba's."""
    return lambda function: Function(function, signature, options)
