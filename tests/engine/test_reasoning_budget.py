"""Reasoning that is not to go on for ever: after its tokens are used up the engine writes the model's </think>
itself."""

import pytest

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.types import Request, SamplingParams, Token
from tests.engine.fakes import fake_engine, scripted_logits

REASONING = "let me think about it"


def answer(engine: Engine, limit: int | None) -> list[Token]:
    prompt = engine.template.encode([{"role": "user", "content": "hi"}], thinking=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=40)
    return list(
        engine.generate(
            [Request("a", tuple(prompt.ids), greedy, prompt.starts_in_reasoning, max_reasoning_tokens=limit)]
        )
    )


def thinking_engine() -> Engine:
    """Reasons as scripted; once out of it, whoever ended it, says "yes"."""
    engine = fake_engine()
    tokenizer = engine.tokenizer
    end, think_end = tokenizer.special["<|im_end|>"], tokenizer.special["</think>"]
    scripted = scripted_logits(tokenizer, lambda prompt: (REASONING, "yes"))

    def next_logits(context: list[int]):
        if think_end not in context:
            return scripted(context)
        said = context[context.index(think_end) + 1 :]
        logits = scripted(context) * 0
        logits[[*tokenizer.encode("yes"), end][len(said)]] = 100.0
        return logits

    engine.model.next_logits = next_logits
    return engine


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_used_up_budget_ends_the_reasoning_and_the_answer_follows(limit: int) -> None:
    engine = thinking_engine()
    tokens = answer(engine, limit)
    ids = [token.id for token in tokens if token.id is not None]
    assert ids.index(engine.tokenizer.special["</think>"]) == limit
    assert engine.tokenizer.decode(ids[:limit]) == REASONING[: len(engine.tokenizer.decode(ids[:limit]))]
    assert "".join(token.text for token in tokens if token.kind == "content") == "yes"
    assert tokens[-1].finish_reason == "stop"


@pytest.mark.parametrize("limit", [None, 1000])
def test_a_budget_that_is_not_used_up_changes_nothing(limit: int | None) -> None:
    tokens = answer(thinking_engine(), limit)
    assert "".join(token.text for token in tokens if token.kind == "reasoning") == REASONING
