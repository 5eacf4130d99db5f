"""Conversations: what the next prompt is made of, and how much of it the cache knows."""

from dataclasses import replace

import numpy as np
import pytest

from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.session import Session
from kimi_lite.engine.splice import splice
from kimi_lite.engine.types import SamplingParams, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.template import ChatTemplate
from tests.engine.fakes import VOCAB_SIZE, fake_engine, scripted_logits


def scripted_session(
    is_thinking: bool, reply: tuple[str, str] = ("let me see", "hello world"), **engine_options
) -> Session:
    engine = fake_engine(**engine_options)
    engine.model.next_logits = scripted_logits(engine.tokenizer, lambda prompt: reply)
    return Session(engine, settings=AnswerSettings(is_thinking=is_thinking))


def talk(session: Session, text: str) -> list[Token]:
    return list(session.ask(text))


def test_messages_are_kept_with_their_reasoning() -> None:
    session = scripted_session(is_thinking=True)
    talk(session, "hi")
    assert session.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello world", "reasoning_content": "let me see"},
    ]


def test_an_instant_conversation_prefills_only_what_is_new() -> None:
    session = scripted_session(is_thinking=False)
    first = talk(session, "hi")
    second = talk(session, "and you?")
    known = first[-1].stats.prompt_tokens + first[-1].stats.generated_tokens
    assert second[-1].stats.cached_tokens == known - 1  # the token that ended the turn was sampled but never run
    assert second[-1].stats.prompt_tokens > known


def test_sampled_ids_are_kept_where_the_text_would_be_tokenized_otherwise() -> None:
    """The model spells "hello" letter by letter; the tokenizer would write one token."""
    session = scripted_session(is_thinking=False)
    tokenizer = session.engine.tokenizer
    letters = [i for letter in "hello" for i in tokenizer.encode(letter)]
    assert tokenizer.encode("hello") != letters
    prompt = session.engine.template.encode([{"role": "user", "content": "hi"}], thinking=False).ids
    said = [*letters, tokenizer.special["<|im_end|>"]]
    session.engine.model.next_logits = lambda context: (
        np.eye(VOCAB_SIZE, dtype=np.float32)[said[len(context) - len(prompt)]] * 99
    )
    first = talk(session, "hi")
    assert session.known_ids == prompt + said
    session.engine.model.next_logits = scripted_logits(tokenizer, lambda prompt: ("", "fine"))
    second = talk(session, "again")
    assert second[-1].stats.cached_tokens == len(prompt) + len(letters)
    assert session.known_ids[: len(prompt) + len(said)] == prompt + said
    assert len(first) >= len(letters)


def test_reasoning_that_the_template_strips_costs_only_the_last_answer() -> None:
    session = scripted_session(is_thinking=True)
    stats = [talk(session, text)[-1].stats for text in ("one", "two", "three")]
    before_answer = [s.prompt_tokens for s in stats]
    assert stats[1].cached_tokens == before_answer[0]  # the prompt with its <think>; what was thought is gone
    assert stats[2].cached_tokens == before_answer[1]


def test_a_stopped_answer_stays_in_the_conversation() -> None:
    session = scripted_session(is_thinking=False)
    tokens = []
    for token in session.ask("hi"):
        tokens.append(token)
        if len(tokens) == 2:
            session.cancel()
    assert tokens[-1].finish_reason == "cancelled"
    partial = session.messages[-1]["content"]
    assert "hello world".startswith(partial)
    assert partial
    known = len(session.known_ids)
    assert talk(session, "go on")[-1].stats.cached_tokens >= known - 1
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]


def test_stopped_before_the_first_word_the_question_stays() -> None:
    session = scripted_session(is_thinking=False)
    session.engine.model.before_layer = lambda batch, layer: session.cancel()
    tokens = talk(session, "hi")
    assert [(token.text, token.finish_reason) for token in tokens] == [("", "cancelled")]
    assert session.messages == [{"role": "user", "content": "hi"}]
    session.engine.model.before_layer = lambda batch, layer: None
    assert talk(session, "hello?")[-1].finish_reason == "stop"
    assert [message["role"] for message in session.messages] == ["user", "user", "assistant"]


def test_an_abandoned_iteration_keeps_what_was_said() -> None:
    session = scripted_session(is_thinking=False)
    tokens = session.ask("hi")
    next(tokens)
    tokens.close()
    assert session.messages[-1]["role"] == "assistant"
    assert session.engine.scheduler.kv.num_available == session.engine.scheduler.kv.num_pages


def test_a_message_that_does_not_fit_is_taken_back() -> None:
    session = scripted_session(is_thinking=False, context_length=128)
    talk(session, "hi")
    before = list(session.messages)
    with pytest.raises(KimiLiteError, match="it has 128"):
        talk(session, "x" * 300)
    assert session.messages == before
    assert talk(session, "shorter")[-1].finish_reason == "stop"


def test_the_system_prompt_comes_first_and_survives_clear() -> None:
    session = scripted_session(is_thinking=False)
    session.system = "be brief"
    seen = []
    session.engine.model.next_logits = scripted_logits(
        session.engine.tokenizer, lambda prompt: seen.append(prompt) or ("", "ok")
    )
    talk(session, "hi")
    session.clear()
    talk(session, "there")
    assert seen[-1] == "<|im_system|>system<|im_middle|>be brief<|im_end|><|im_user|>user<|im_middle|>there<|im_end|>"


def test_the_mode_sets_the_temperature_unless_the_user_did() -> None:
    session = scripted_session(is_thinking=True)
    assert session.settings.params.temperature == 1.0
    session.set_thinking(False)
    assert session.settings.params == SamplingParams(temperature=0.6, top_p=0.95)
    assert replace(session.settings, temperature=0.0).params.temperature == 0.0


def test_a_model_without_thinking_says_so() -> None:
    session = scripted_session(is_thinking=False)
    session.engine.template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}", session.engine.tokenizer
    )
    assert not session.can_think
    assert not session.can_call and not session.can_preserve
    with pytest.raises(KimiLiteError, match="no thinking mode"):
        session.set_thinking(True)
    with pytest.raises(KimiLiteError, match="takes no tools"):
        next(session.ask("?", tools=[{"type": "function", "function": {"name": "f"}}]))


def test_splice_takes_the_longest_beginning_that_reads_the_same() -> None:
    tokenizer = fake_engine().tokenizer
    end = tokenizer.special["<|im_end|>"]
    letters = [i for letter in "hello" for i in tokenizer.encode(letter)]
    rendered = [*tokenizer.encode("hello"), end, *tokenizer.encode(" more")]
    assert splice([*letters, end], rendered, tokenizer) == [*letters, end, *tokenizer.encode(" more")]
    assert splice([], rendered, tokenizer) == rendered
    assert splice([*letters, *letters], rendered, tokenizer) == [*letters, *rendered[len(tokenizer.encode("hello")) :]]
    assert splice(tokenizer.encode("help"), tokenizer.encode("hello"), tokenizer) == tokenizer.encode(
        "hello"
    )  # one token: no cut inside


def test_splice_does_not_take_spelled_out_markers_for_control_tokens() -> None:
    tokenizer = fake_engine().tokenizer
    spelled, control = tokenizer.encode("<|im_end|>"), [tokenizer.special["<|im_end|>"]]
    assert splice(spelled, control, tokenizer) == control
    assert splice(control, spelled, tokenizer) == spelled
