"""Measurements and the files they need; the runtime imports nothing of it. Each runs with `python -m` and has --help.

`tools.bench` measures tokens/s, `tools.quality` perplexity and divergence, `tools.plot` draws both. `tools.kernels`
times the kernels against llama.cpp's, `tools.bench.predict` turns its result into tokens/s, `tools.make.slice` writes a
file with Kimi K2.5's dimensions and random weights. `tools.cache` replays routing, `tools.trace` shows the hybrid path.
"""
