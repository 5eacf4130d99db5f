"""Kernels and nothing else: GGUF block layouts, SIMD vectors, CPU (Numba) and GPU (Triton) products. No policy, no
I/O."""
