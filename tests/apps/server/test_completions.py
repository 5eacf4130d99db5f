"""Completions, asked by OpenAI's own client."""

import numpy as np
import openai
import pytest
from openai.types import Completion

from tests.apps.server.running import running
from tests.engine.fakes import VOCAB_SIZE, fake_engine

TEXT = "the world, 世界, and in the end "


def saying_text():
    """An engine that goes on with a text of its own from wherever its newest `:` (or the beginning) was."""
    engine = fake_engine(context_length=2048, num_pages=256, max_running=16)
    ids = engine.tokenizer.encode(TEXT * 30)
    colon = engine.tokenizer.encode(":")[0]

    def next_logits(context: list[int]) -> np.ndarray:
        start = len(context) - context[::-1].index(colon) if colon in context else 0
        logits = np.zeros(VOCAB_SIZE, np.float32)
        logits[ids[len(context) - start]] = 9.0
        return logits

    engine.model.next_logits = next_logits
    return engine


@pytest.fixture(scope="module")
def url():
    with running(saying_text) as address:
        yield address


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"logprobs": 2}, {"logprobs": 0}, {"n": 3, "seed": 1},
                                  {"stop": ["end"]}, {"prompt": ["a:", "b:"], "n": 2}])  # fmt: skip
def test_texts_whole_and_in_chunks_are_the_same(client, more) -> None:
    asked = {"model": "x", "prompt": "Say:", "max_tokens": 24, "temperature": 0} | more
    whole = client.completions.create(**asked)
    Completion.model_validate(whole.model_dump())
    num_prompts = 2 if isinstance(asked["prompt"], list) else 1
    assert [choice.index for choice in whole.choices] == list(range(num_prompts * more.get("n", 1)))
    texts, reasons, tokens, offsets = {}, {}, {}, {}
    chunks = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            if choice.logprobs:
                tokens[choice.index] = tokens.get(choice.index, []) + choice.logprobs.tokens
                offsets[choice.index] = offsets.get(choice.index, []) + choice.logprobs.text_offset
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens
    assert chunk.usage.prompt_tokens == whole.usage.prompt_tokens == 2 * num_prompts + (0 if num_prompts > 1 else 2)
    for choice in whole.choices:
        prompt = "Say:" if more.get("echo") else ""
        said = choice.text.removeprefix(prompt)
        assert choice.text == prompt + said and TEXT.startswith(said[:10]) and said
        assert texts[choice.index] == choice.text and reasons[choice.index] == choice.finish_reason
        assert choice.finish_reason == ("stop" if "stop" in more else "length")
        if "logprobs" in more:
            assert (tokens[choice.index], offsets[choice.index]) == (
                choice.logprobs.tokens,
                choice.logprobs.text_offset,
            )
            assert len(tokens[choice.index]) == whole.usage.completion_tokens == 24
            assert all(len(top) <= more["logprobs"] for top in choice.logprobs.top_logprobs)
            for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                assert "\ufffd" in token or choice.text.startswith(token, offset)
        else:
            assert choice.logprobs is None


def test_ids_are_taken_as_they_are_and_text_is_only_text(client) -> None:
    ids = [104, 105, 58]
    answer = client.completions.create(model="x", prompt=ids, max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens == 3
    answer = client.completions.create(model="x", prompt=[ids, ids[:2]], max_tokens=4, temperature=0)
    assert len(answer.choices) == 2 and answer.usage.prompt_tokens == 5
    answer = client.completions.create(model="x", prompt="<|im_end|>", max_tokens=1)
    assert answer.usage.prompt_tokens == len("<|im_end|>")  # its bytes, not one control token


def test_sixteen_tokens_unless_it_says_more(client) -> None:
    assert client.completions.create(model="x", prompt="a:").usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [[1], []]}, "empty"),
        ({"prompt": [300]}, "0 to 299"),
        ({"prompt": [-1]}, "0 to 299"),
        ({"prompt": [10**30]}, "0 to 299"),
        ({"prompt": ["a"] * 33, "n": 2}, "66 texts"),
        ({"prompt": "a" * 3000}, "2,048"),
        ({"logit_bias": {"300": 1}}, "0 to 299"),
        ({"logit_bias": {"x": 1}}, "0 to 299"),
    ],
)
def test_what_is_wrong_is_named(client, change, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(**({"model": "x", "prompt": "Say:"} | change))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-7, 1e-3])
def test_any_temperature_is_held(client, temperature: float) -> None:
    answer = client.completions.create(model="x", prompt="a:", max_tokens=8, temperature=temperature)
    assert answer.choices[0].text == TEXT[: len(answer.choices[0].text)]
