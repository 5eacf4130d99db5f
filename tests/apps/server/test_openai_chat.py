"""Chat completions, asked by OpenAI's own client."""

import openai
import pytest

from tests.apps.server.running import running
from tests.engine.fakes import fake_engine, scripted_logits


def says(content: str, reasoning: str = "Let me see."):
    """An engine whose model answers every prompt with this, after its reasoning where it is to think."""
    engine = fake_engine(context_length=4096, num_pages=256, max_running=8)
    engine.model.next_logits = scripted_logits(engine.tokenizer, lambda prompt: (reasoning, content))
    return engine


@pytest.fixture
def client_of():
    def make(url: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)

    return make


INSTANT = {"thinking": {"type": "disabled"}}
HELLO = [{"role": "user", "content": "Hello"}]


def test_an_answer_whole_and_in_chunks_is_the_same(client_of) -> None:
    with running(lambda: says("Good day, 世界!")) as url:
        client = client_of(url)
        whole = client.chat.completions.create(model="x", messages=HELLO, temperature=0, extra_body=INSTANT)
        assert whole.choices[0].message.content == "Good day, 世界!" and whole.choices[0].finish_reason == "stop"
        usage = whole.usage
        assert usage.completion_tokens > 5
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        chunks = list(
            client.chat.completions.create(
                model="x",
                messages=HELLO,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=INSTANT,
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "Good day, 世界!"
        assert chunks[-1].usage.prompt_tokens == usage.prompt_tokens
        assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_reasoning_is_apart_and_goes_back_into_the_next_prompt(client_of) -> None:
    with running(lambda: says("42")) as url:
        client = client_of(url)
        answer = client.chat.completions.create(model="x", messages=HELLO, temperature=0).choices[0].message
        assert (answer.content, answer.reasoning_content) == ("42", "Let me see.")
        chunks = client.chat.completions.create(model="x", messages=HELLO, temperature=0, stream=True)
        deltas = [chunk.choices[0].delta for chunk in chunks]
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert (reasoning, "".join(delta.content or "" for delta in deltas)) == ("Let me see.", "42")
