"""`python -m tools.kernels`: the CPU kernels of every type against llama.cpp's."""

from kimi_lite.tools.kernels.kernel_bench import app

app()
