"""Numba kernels for the CPU. Everything here runs on a `threads.Team`; no policy, no I/O, no Python objects inside."""
