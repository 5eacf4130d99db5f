"""Measurements and the files they need; nothing here is imported by the runtime. Run each as `python -m tools.NAME
--help`.

`bench` measures tokens/s, `quality` perplexity and divergence, `plot` draws both. `kernel_bench` times the kernels
beside llama.cpp's, `predict` turns its result into tokens/s, `make_slice` writes a file with Kimi K2.5's dimensions and
random weights.
"""
