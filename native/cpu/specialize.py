"""Kernel helpers that are compiled for each literal argument (a dtype or type name)."""

from collections.abc import Callable

from numba.extending import overload


def for_literals(function: Callable) -> Callable:
    """Makes a Python function callable from kernels; literal arguments stay literal inside it.

    Numba's own `njit` forgets that a string argument was a constant, and kernels made in closures over `njit` functions
    cannot be cached on disk.
    """
    options = {"fastmath": {"nsz", "contract"}, "error_model": "numpy"}
    overload(function, jit_options=options, strict=False, prefer_literal=True)(lambda *args: function)
    return function
