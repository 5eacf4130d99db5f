"""A weight's road, offline: a Hugging Face folder becomes one GGUF file. `python -m quantize --help`."""
