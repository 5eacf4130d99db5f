"""An engine without a model, for driving clients: it answers each request by a function of its prompt and tools.

    python -m kimi_lite.tools.serve.scripted --port 8090

serves one that does what agents are asked in `tools.serve.agents`: it writes a file with the agent's own tool, reads
the result, and says that it is done. Everything but the model is real: template, tokenizer (a token is a byte), cache,
scheduler, parser, server.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.types import ModelInfo, Request
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Cancelled
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.text.kimi import KIMI_TEMPLATE
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.vocabulary import byte_alphabet

Tools = Sequence[Mapping[str, Any]]
Script = Callable[[str, Tools], str]  # (prompt as the template renders it, declared tools) -> the answer, with markers
FILE_NAME, FILE_TEXT = "hello.txt", "hello from kimi-lite\n"
TASK = f"Create a file named {FILE_NAME} that contains the line: {FILE_TEXT.strip()}"
_CONTROLS = (
    *("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<think>", "</think>"),
)
_MARKER = re.compile("|".join(re.escape(name) for name in _CONTROLS))
_CERTAIN = 100.0  # the logit of the token that comes


class ScriptedModel:
    """Knows what is to be answered to each prompt; the cache holds the tokens themselves."""

    def __init__(self, kv: KVCache, vocab_size: int) -> None:
        self._kv, self._vocab_size = kv, vocab_size
        self.max_batch_tokens = 4096
        self.answers: dict[tuple[int, ...], list[int]] = {}  # ids of a prompt -> ids of its answer

    def forward(self, batch: Batch, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
        """Writes the tokens into their pages, and reads each sequence back from there."""
        if should_stop is not None and should_stop():
            raise Cancelled
        storage = self._kv.storage.reshape(-1)  # (pages * 64,)
        storage[batch.cache_rows()] = batch.token_ids
        rows = []
        for piece in batch.sequences:
            last = piece.start + piece.length - 1
            if batch.wants_logits[last]:
                places = piece.pages[:, None].astype(np.int64) * PAGE_TOKENS + np.arange(PAGE_TOKENS)
                context = storage[places.reshape(-1)[: batch.positions[last] + 1]].astype(np.int64).tolist()
                rows.append(self._next(context))
        logits = np.zeros((len(rows), self._vocab_size), np.float32)
        logits[np.arange(len(rows)), rows] = _CERTAIN
        return logits

    def _next(self, context: list[int]) -> int:
        for prompt, answer in self.answers.items():
            num_said = len(context) - len(prompt)
            is_said = 0 <= num_said < len(answer) and context[len(prompt) :] == answer[:num_said]
            if is_said and tuple(context[: len(prompt)]) == prompt:
                return answer[num_said]
        raise AssertionError("this context begins with no prompt that was asked")

    def counters(self) -> Mapping[str, float]:
        return {}

    def heat(self) -> None:
        return None

    def close(self) -> None:
        """There is nothing to close."""


class ScriptedEngine(Engine):
    """An engine that asks a script what to say when a request comes."""

    def __init__(self, script: Script, context_length: int = 262_144, max_running: int = 8, **more: Any) -> None:
        metadata = _metadata()
        tokenizer = Tokenizer.from_metadata(metadata)
        template = ChatTemplate.from_metadata(metadata, tokenizer)
        kv = KVCache(1, 1, 2 * context_length // PAGE_TOKENS, "f32")
        info = ModelInfo("scripted", Path("scripted.gguf"), 0, ())
        model = ScriptedModel(kv, tokenizer.vocab_size)
        super().__init__(model, kv, tokenizer, template, context_length, info, max_running=max_running, **more)
        self._script = script

    def add(self, request: Request) -> None:
        prompt = self.tokenizer.decode(request.prompt_ids)
        said = self._script(prompt, request.tools)
        ids = self._ids(said if request.starts_in_reasoning else said.rpartition("</think>")[2])
        self.model.answers[request.prompt_ids] = [*ids, self.tokenizer.special["<|im_end|>"]]
        super().add(request)

    def _ids(self, text: str) -> list[int]:
        ids, last = [], 0
        for match in _MARKER.finditer(text):
            ids += [*self.tokenizer.encode(text[last : match.start()]), self.tokenizer.special[match.group()]]
            last = match.end()
        return ids + self.tokenizer.encode(text[last:])


def write_a_file(prompt: str, tools: Tools) -> str:
    """Does `TASK` with whatever tool the agent has for it; talks otherwise."""
    turns = prompt.split("<|im_user|>")
    if TASK not in turns[-1] and TASK not in prompt:
        return "I only write one file.</think>Hello."
    results = turns[-1].split("## Return of")[1:]
    has_failed = len(results) == 1 and re.search(r"absolute|error|fail", results[0], re.I) is not None
    if results and not has_failed:
        return f"The tool has done it.</think>Done: {FILE_NAME} is written."
    call = _running_call(tools) if has_failed else _writing_call(tools) or _running_call(tools)
    if call is not None:
        name, arguments = call
        written = json.dumps(arguments, separators=(",", ":"))
        head = f"<|tool_call_begin|>functions.{name}:{prompt.count('<|tool_call_begin|>')}"
        section = f"<|tool_calls_section_begin|>{head}<|tool_call_argument_begin|>{written}<|tool_call_end|>"
        said = f"I write the file with {name}.</think>I will write {FILE_NAME}."
        return f"{said}{section}<|tool_calls_section_end|>"
    if "SEARCH/REPLACE" in prompt:  # how aider has edits written
        block = f"<<<<<<< SEARCH\n=======\n{FILE_TEXT}>>>>>>> REPLACE"
        return f"No tools: an edit.</think>{FILE_NAME}\n```\n{block}\n```\n"
    if "file listing" in prompt:  # how it has whole files written
        return f"No tools: the whole file.</think>{FILE_NAME}\n```\n{FILE_TEXT}```\n"
    return f"No tools.</think>{FILE_TEXT}"


def _writing_call(tools: Tools) -> tuple[str, dict[str, Any]] | None:
    """A call of a tool that takes a path and a content."""
    functions = [tool["function"] for tool in tools]
    for function in functions:
        schema = function["parameters"]
        path = next(
            (p for p in schema.get("properties", {}) if p.lower().replace("_", "") in ("path", "filepath")), None
        )
        text = next((p for p in schema.get("properties", {}) if p.lower() in ("content", "contents", "text")), None)
        if path and text and "write" in function["name"].lower():
            return function["name"], _filled(schema, {path: FILE_NAME, text: FILE_TEXT})
    return None


def _running_call(tools: Tools) -> tuple[str, dict[str, Any]] | None:
    """A call of a tool that runs a command."""
    for function in [tool["function"] for tool in tools]:
        schema = function["parameters"]
        name = next((name for name in ("cmd", "command", "script") if name in schema.get("properties", {})), None)
        if name and re.search("shell|bash|exec|run", function["name"], re.I):
            line = f"printf {FILE_TEXT!r} > {FILE_NAME}"
            is_list = schema["properties"][name].get("type") == "array"
            return function["name"], _filled(schema, {name: ["bash", "-lc", line] if is_list else line})
    return None


def _filled(schema: Mapping[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """With something for whatever else is required, in the schema's order, which the grammar of arguments asks for."""
    plain = {"string": "write a file", "integer": 1, "number": 1, "boolean": False, "array": [], "object": {}}
    required = schema.get("required", ())
    return {
        name: arguments.get(name, plain[declared.get("type", "string")])
        for name, declared in schema["properties"].items()
        if name in arguments or name in required
    }


def _metadata() -> dict[str, object]:
    """A tokenizer of the 256 bytes and Kimi's control tokens, and Kimi's template."""
    first = 256
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": [*map(chr, np.flatnonzero(byte_alphabet() >= 0).tolist()), *_CONTROLS],
        "tokenizer.ggml.token_type": np.array([1] * first + [3] * len(_CONTROLS), np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + _CONTROLS.index("<|im_end|>"),
        "tokenizer.chat_template": KIMI_TEMPLATE,
    }


def main(arguments: Sequence[str]) -> None:
    """Serve it; flags are `serve`'s."""
    import typer

    from kimi_lite.apps.server.command import start_server
    from kimi_lite.commandline.flags import with_options
    from kimi_lite.options import Options

    @with_options("serve")
    def serve(options: Options) -> None:
        start_server(options, lambda: ScriptedEngine(write_a_file, max_running=options.num_sequences))

    app = typer.Typer()
    app.command()(serve)
    app(list(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
