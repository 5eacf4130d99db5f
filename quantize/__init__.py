"""A weight's path, offline: a Hugging Face folder or GGUF files become low-bit GGUF shards. `python -m quantize
--help`."""
