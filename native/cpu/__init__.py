"""Numba kernels for the CPU. Everything here runs on a `threads.Team`; no policy, no I/O, no Python objects inside."""

from kimi_lite.native.cache import use_kernel_cache

use_kernel_cache()  # before the first kernel is declared
