"""A weight's road, offline: a Hugging Face folder or GGUF files become low-bit GGUF shards. `python -m quantize
--help`."""
