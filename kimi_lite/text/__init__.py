"""Text on its way to token ids and back.

`tokenizer` (tiktoken over the file's own vocabulary; `pretokenizers` has the one table of names), `template` (chat
messages to a prompt, rendered by `isolation` in a process of its own), `stream` (tokens to reasoning, content and tool
calls), `tool_calls` and `call_deltas` (calls in one form, whatever models and servers write).
"""
