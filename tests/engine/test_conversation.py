"""Operations on turns: again, back, tools, old turns; and a conversation saved and taken up by another process."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.documents import load_document, to_document
from kimi_lite.engine.session import Session
from kimi_lite.engine.types import SamplingParams, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.template import ChatTemplate
from tests.engine.fakes import VOCAB_SIZE, fake_engine, scripted_logits

ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}
IMAGE = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]


def echo(prompt: str) -> tuple[str, str]:
    said = prompt.rpartition("<|im_user|>user<|im_middle|>")[2].removesuffix("<|im_end|>")
    return "hm", f"you said: {said}"


def echo_session(is_thinking: bool = False, **engine_options) -> Session:
    engine = fake_engine(context_length=engine_options.pop("context_length", 2048), **engine_options)
    engine.model.next_logits = scripted_logits(engine.tokenizer, echo)
    return Session(engine, settings=AnswerSettings(is_thinking))


def says(session: Session, *ids: int | str) -> None:
    """The model's next answer, whatever the prompt; control tokens by name."""
    special, tokenizer = session.engine.tokenizer.special, session.engine.tokenizer
    script = [i for part in ids for i in ([special[part]] if part in special else tokenizer.encode(part))]
    num_prompt: list[int] = []

    def next_logits(context: list[int]) -> np.ndarray:
        num_prompt.append(len(context))
        return np.eye(VOCAB_SIZE, dtype=np.float32)[script[len(context) - num_prompt[0]]] * 99

    session.engine.model.next_logits = next_logits


def talk(session: Session, text: str, **more: object) -> list[Token]:
    return list(session.ask(text, **more))


def test_regenerate_answers_again_and_keeps_the_prompt_cached() -> None:
    session = echo_session()
    talk(session, "one")
    first = talk(session, "two")[-1].stats
    tokens = list(session.regenerate(settings=replace(session.settings, temperature=0.0)))
    assert tokens[-1].stats.cached_tokens == first.prompt_tokens - 1
    assert [turn.text for turn in session.turns] == ["one", "you said: one", "two", "you said: two"]
    assert session.settings.temperature is None


def test_a_regeneration_that_is_refused_keeps_the_old_answer() -> None:
    session = echo_session(context_length=128)
    talk(session, "hi")
    before = list(session.turns)
    session.system = "x" * 300
    with pytest.raises(KimiLiteError, match="it has 128"):
        list(session.regenerate())
    assert session.turns == before


def test_undo_takes_the_last_exchange_back_and_nothing_is_read_twice() -> None:
    session = echo_session()
    known = talk(session, "one")[-1].stats
    talk(session, "two")
    assert session.undo() == "two"
    again = talk(session, "three")[-1].stats
    assert again.cached_tokens >= known.prompt_tokens + known.generated_tokens - 1
    session.undo()
    assert session.undo() == "one"
    with pytest.raises(KimiLiteError, match="no message yet"):
        session.undo()


def test_a_tool_call_waits_for_its_result_and_the_model_goes_on() -> None:
    session = echo_session()
    call = (
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "functions.add:0",
        "<|tool_call_argument_begin|>",
        '{"a": 1}',
    )
    says(session, "I add.", *call, "<|tool_call_end|>", "<|tool_calls_section_end|>", "<|im_end|>")
    first = talk(session, "add", tools=[ADD])[-1]
    assert first.finish_reason == "tool_calls"
    (pending,) = session.pending_calls
    assert (pending.id, pending.name, pending.arguments) == ("functions.add:0", "add", '{"a": 1}')
    says(session, "It is 2.", "<|im_end|>")
    last = list(session.answer_calls([(pending.id, "2")]))[-1]
    assert (
        last.stats.cached_tokens == first.stats.prompt_tokens + first.stats.generated_tokens - 1
    )  # as sampled, not as rendered
    assert [message["role"] for message in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert not session.pending_calls


def test_a_question_while_a_call_waits_says_that_it_was_not_run() -> None:
    session = echo_session()
    call = (
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "functions.add:0",
        "<|tool_call_argument_begin|>",
        "{}",
    )
    says(session, *call, "<|tool_call_end|>", "<|tool_calls_section_end|>", "<|im_end|>")
    talk(session, "add", tools=[ADD])
    says(session, "fine", "<|im_end|>")
    talk(session, "never mind")
    assert [message["role"] for message in session.messages] == ["user", "assistant", "tool", "user", "assistant"]


def test_a_call_that_was_cut_off_is_not_kept() -> None:
    session = echo_session()
    says(
        session,
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "functions.add:0",
        "<|tool_call_argument_begin|>",
        '{"a',
    )
    session.settings = replace(session.settings, sampling=SamplingParams(max_tokens=20))
    assert talk(session, "add", tools=[ADD])[-1].finish_reason == "length"
    assert not session.pending_calls
    assert [message["role"] for message in session.messages] == ["user"]
    assert len(session.turns[-1].ids) == 20


@pytest.mark.parametrize("declared", ["", "{{ tools }}<tool_call>"])
def test_tools_are_refused_where_the_template_declares_none_or_has_other_markers(declared: str) -> None:
    session = echo_session()
    calls = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments }}{% endfor %}"
    source = declared + "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    session.engine.template = ChatTemplate(source, session.engine.tokenizer)
    with pytest.raises(KimiLiteError, match="takes no tools"):
        talk(session, "add", tools=[ADD])


def test_images_are_refused_without_a_vision_tower_and_text_parts_are_text() -> None:
    session = echo_session()
    with pytest.raises(KimiLiteError, match="1 image"):
        list(session.ask(IMAGE))
    assert session.turns == []
    talk(session, "x")
    list(session.ask([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))
    assert session.messages[-1]["content"] == "you said: ab"


def test_sampled_ids_of_every_past_answer_are_kept_even_where_reasoning_is_stripped() -> None:
    session = echo_session(is_thinking=True)
    tokenizer = session.engine.tokenizer
    letters = [i for letter in "hello" for i in tokenizer.encode(letter)]
    pieces = [tokenizer.decode([i]) for i in letters]
    says(session, "hm", "</think>", *pieces, "<|im_end|>")
    talk(session, "one")
    says(session, "</think>", "ok", "<|im_end|>")
    talk(session, "two")
    turns_ids = session.known_ids
    think_end = tokenizer.special["</think>"]
    assert any(
        turns_ids[i : i + 7] == [think_end, *letters, tokenizer.special["<|im_end|>"]] for i in range(len(turns_ids))
    )


def test_dropped_turns_stay_in_the_record_but_are_not_sent() -> None:
    session = echo_session()
    for text in ("one", "two", "three"):
        talk(session, text)
    num_before = session.count_tokens()
    session.drop_oldest(2)
    assert [message["content"] for message in session.messages] == ["three", "you said: three"]
    assert len(session.turns) == 6
    assert session.count_tokens() < num_before
    assert session.count_tokens() == session.count_tokens(num_dropped=4)


def test_a_summary_stands_for_what_was_dropped() -> None:
    session = echo_session()
    session.system = "be brief"
    for text in ("one", "two"):
        talk(session, text)
    seen: list[str] = []
    reply = ("", "they counted")
    session.engine.model.next_logits = scripted_logits(
        session.engine.tokenizer, lambda prompt: seen.append(prompt) or reply
    )
    assert "".join(token.text for token in session.summarise_oldest(1)) == "they counted"
    assert "you said: one" in seen[-1]
    assert "you said: two" not in seen[-1]
    talk(session, "three")
    assert "be brief\n\nSummary of the earlier conversation:\nthey counted" in seen[-1]
    assert "you said: one" not in seen[-1]
    assert len(session.turns) == 6


def test_a_summary_that_is_stopped_drops_nothing() -> None:
    session = echo_session()
    for text in ("one", "two"):
        talk(session, text)
    known = list(session.known_ids)
    for token in session.summarise_oldest(1):
        assert token.request_id
        session.cancel()
    assert (session.num_dropped, session.summary, session.known_ids) == (0, "", known)


def test_a_saved_conversation_goes_on_with_what_the_cache_knows() -> None:
    session = echo_session()
    talk(session, "one")
    last = talk(session, "two")[-1].stats
    document = json.loads(json.dumps(to_document(session)))
    other = Session(session.engine)
    load_document(other, document, "x.json")
    assert (other.turns, other.settings, other.known_ids) == (session.turns, session.settings, session.known_ids)
    assert talk(other, "three")[-1].stats.cached_tokens == last.prompt_tokens + last.generated_tokens - 1


def test_a_conversation_of_another_model_is_taken_without_its_ids() -> None:
    session = echo_session()
    talk(session, "one")
    document = to_document(session) | {"model_key": "other/7"}
    load_document(session, document, "x.json")
    assert session.known_ids == []
    assert all(turn.ids == () for turn in session.turns)
    assert talk(session, "two")[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a conversation"),
        ({"version": 99}, "version 99"),
        ({"turns": [{"role": "king", "content": ""}]}, "damaged"),
        ({"turns": 3}, "damaged"),
        ({"settings": {"sampling": {"temperature": -1, "stop": []}}}, "damaged"),
        ({"num_dropped": 9}, "damaged"),
        ({"system": None}, "damaged"),
    ],
)
def test_foreign_or_damaged_documents_are_a_sentence_and_change_nothing(change: dict, message: str) -> None:
    session = echo_session()
    talk(session, "one")
    before = list(session.turns)
    with pytest.raises(KimiLiteError, match=message):
        load_document(session, to_document(session) | change, "x.json")
    with pytest.raises(KimiLiteError, match="not a conversation"):
        load_document(session, [], "x.json")
    assert session.turns == before


def test_the_budget_of_thinking_is_the_engines_to_keep() -> None:
    session = echo_session(is_thinking=True)
    session.settings = replace(session.settings, thinking_budget=1)
    tokens = talk(session, "hi")
    think_end = session.engine.tokenizer.special["</think>"]
    assert [token.id for token in tokens].index(think_end) == 1
