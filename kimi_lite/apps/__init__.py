"""The commands that users type, but for quantize and bench: chat, run, serve, plan, doctor. They see `engine`, `plan`
and `text`, and never import torch."""
