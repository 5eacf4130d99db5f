"""Text on its way to token ids and back.

`tokenizer` (tiktoken over the file's own vocabulary), `template` (chat messages to a prompt), `stream` (tokens to
reasoning, content and tool calls).
"""
