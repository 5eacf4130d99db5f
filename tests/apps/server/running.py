"""A server in this process on a port of its own, around a fake or a real engine."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import uvicorn

from kimi_lite.apps.server.app import build_app
from kimi_lite.apps.server.connection import configuration
from kimi_lite.apps.server.state import ServerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.service import EngineService
from tests.engine.fakes import VOCAB_SIZE, fake_engine


@contextmanager
def running(
    open_engine: Callable[[], Engine], settings: ServerSettings | None = None, waits: bool = True, **more
) -> Iterator[str]:
    """The base URL, once the model is loaded if it `waits`; the server has ended when the block has."""
    service = EngineService(open_engine, **more)
    app = build_app(service, settings or ServerSettings(shuts_down_within_s=1.0))
    server = uvicorn.Server(configuration(app, ends_within_s=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
        assert not waits or service.is_ready.wait(120)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
    assert not thread.is_alive(), "the server did not end"


def speaking(answer: Callable[[str], tuple[str | None, str]], **more) -> Engine:
    """An engine whose model answers a prompt (its text) with (reasoning, content). Control tokens that the answer
    spells are spoken as such: that is how it calls tools. Reasoning is left out where the prompt closed it, and
    where it is None the model never reasons."""
    engine = fake_engine(**{"context_length": 4096, "num_pages": 512, "max_running": 8} | more)
    tokenizer = engine.tokenizer
    controls = re.compile("(" + "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))) + ")")

    def spoken(text: str) -> list[int]:
        ids: list[int] = []
        for part in controls.split(text):
            ids += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
        return ids

    assistant, think, think_end = (tokenizer.special[n] for n in ("<|im_assistant|>", "<think>", "</think>"))
    end = tokenizer.special["<|im_end|>"]

    def next_logits(context: list[int]) -> np.ndarray:
        if assistant not in context:  # a text, no chat: the model ends it at once
            return np.eye(VOCAB_SIZE, dtype=np.float32)[end] * 100
        turn = len(context) - 1 - context[::-1].index(assistant)
        said = context[context.index(think, turn) + 1 :]
        reasoning, content = answer(tokenizer.decode(context[:turn]))
        ids = [*spoken(content), end]
        if said[:1] == [think_end]:  # the prompt closed it
            said = said[1:]
        elif reasoning is not None:
            ids = [*spoken(reasoning), think_end, *ids]
        logits = np.zeros(VOCAB_SIZE, np.float32)
        logits[ids[len(said)] if len(said) < len(ids) else end] = 100.0
        return logits

    engine.model.next_logits = next_logits
    return engine


def call(name: str, arguments: str, index: int = 0) -> str:
    """A tool call as the model writes it, in its section."""
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        f"{arguments}<|tool_call_end|><|tool_calls_section_end|>"
    )
