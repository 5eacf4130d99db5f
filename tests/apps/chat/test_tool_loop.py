"""Answers that call tools, with a scripted model here and a scripted server elsewhere: the same loop."""

import json
import re
from collections.abc import Iterator

import pytest

from kimi_lite.apps.chat.tool_loop import ToolLoop, summary
from kimi_lite.apps.remote.session import RemoteSession
from kimi_lite.apps.tools.box import ToolBox
from kimi_lite.apps.tools.confirm import Question
from kimi_lite.apps.tools.tool import Tool, parameters
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.session import Session
from kimi_lite.engine.types import SamplingParams, Token
from kimi_lite.text.tokenizer import Tokenizer
from tests.apps.fake_openai import FakeOpenAI, call_delta, sse
from tests.engine.fakes import fake_engine, scripted_logits

ADD = Tool("add", "Adds.", parameters(("a",), a={"type": "integer"}), lambda arguments, _: str(arguments["a"] + 1))
Calls = list[tuple[str, str]]  # names and arguments of one answer


def written(calls: Calls, index: int = 0) -> str:
    """Calls as the model writes them."""
    text = "".join(
        f"<|tool_call_begin|>functions.{name}:{index + i}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for i, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{text}<|tool_calls_section_end|>"


class WithControls:
    """A tokenizer that encodes control tokens where they are spelled out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special, self.decode, self._encode = tokenizer.special, tokenizer.decode, tokenizer.encode

    def encode(self, text: str) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self._encode(part))]


def local(answers: list[Calls | str]) -> Iterator[Session]:
    engine = fake_engine(context_length=4096)
    left = dict(enumerate(answers))

    def answer(prompt: str) -> tuple[str, str]:
        place = prompt.count("<|im_assistant|>") + prompt.count(
            "could not be used"
        )  # of this answer, by those before it
        said = left[min(place, len(left) - 1)]
        num_before = prompt.count("<|tool_call_begin|>")
        return "hm", said if isinstance(said, str) else written(said, num_before)

    engine.model.next_logits = scripted_logits(WithControls(engine.tokenizer), answer)
    yield Session(engine, settings=AnswerSettings(sampling=SamplingParams(top_k=1)))


def remote(answers: list[Calls | str]) -> Iterator[RemoteSession]:
    """The last answer is given again and again."""
    streams, index = [], 0
    for said in [*answers, *[answers[-1]] * 20]:
        if isinstance(said, str):
            streams.append(sse({"reasoning_content": "hm"}, {"content": said}))
            continue
        deltas = [
            call_delta(i, arguments, name, f"functions.{name}:{index + i}") for i, (name, arguments) in enumerate(said)
        ]
        index += len(said)
        streams.append(sse({"reasoning_content": "hm"}, *deltas, reason="tool_calls"))
    with FakeOpenAI(*streams) as fake:
        session = RemoteSession.open(fake.url)
        session.fake = fake
        yield session
        session.close()


@pytest.fixture(params=[local, remote])
def converse(request: pytest.FixtureRequest) -> Iterator:
    opened = []

    def begin(*answers: Calls | str) -> Conversation:
        sessions = request.param(list(answers))
        opened.append(sessions)
        return next(sessions)

    yield begin
    for sessions in opened:
        sessions.close()


class Run:
    """One message, answered to the end."""

    def __init__(
        self, session: Conversation, answer: str = "once", tools: tuple[Tool, ...] = (ADD,), **options: int
    ) -> None:
        self.said: list[str] = []
        self.asked: list[Question] = []
        self.loop = ToolLoop(
            session, ToolBox(tools), lambda call: self.asked.append(call) or answer, self.said.append, **options
        )
        self.tokens: list[Token] = []
        tokens = session.ask("go", None, self.loop.box.declarations)
        for token in self.loop.follow(tokens):
            self.tokens.append(token)

    @property
    def content(self) -> str:
        return "".join(token.text for token in self.tokens if token.kind == "content")


def results(session: Conversation) -> list[tuple[str, str]]:
    return [(turn.call_id, turn.content) for turn in session.turns if turn.role == "tool"]


def test_calls_are_run_and_answered_until_there_is_an_answer(converse) -> None:
    session = converse([("add", '{"a": 1}'), ("add", '{"a": 5}')], [("add", '{"a": 2}')], "done")
    run = Run(session)
    assert run.content == "done"
    assert results(session) == [("functions.add:0", "2"), ("functions.add:1", "6"), ("functions.add:2", "3")]
    assert [question.arguments for question in run.asked] == [{"a": 1}, {"a": 5}, {"a": 2}]
    assert run.said == ["  ← 2", "  ← 6", "  ← 3"]
    assert [turn.role for turn in session.turns] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [token.finish_reason for token in run.tokens if token.finish_reason] == ["tool_calls", "tool_calls", "stop"]


def test_what_was_sampled_is_sent_again_exactly(converse) -> None:
    session = converse([("add", '{ "a":1 }')], "done")  # spaced as no template would
    Run(session)
    if isinstance(session, RemoteSession):
        call = session.fake.bodies[1]["messages"][1]["tool_calls"][0]
        assert (call["id"], call["function"]["arguments"]) == ("functions.add:0", '{ "a":1 }')
        assert session.fake.bodies[1]["messages"][1]["reasoning_content"] == "hm"
    else:
        first = next(turn for turn in session.turns if turn.role == "assistant")
        prompt = session.known_ids
        assert any(tuple(prompt[i : i + len(first.ids)]) == first.ids for i in range(len(prompt)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("add", "{oops"), "not valid JSON"),
        (("add", '{"a": "x"}'), "must be of type integer"),
        (("sub", "{}"), "there is no tool 'sub'; there are: add"),
    ],
)
def test_wrong_calls_get_an_error_to_learn_from(converse, call: tuple[str, str], message: str) -> None:
    session = converse([call], [("add", '{"a": 1}')], "done")
    run = Run(session)
    (_, first), (_, second) = results(session)
    assert first.startswith("Error: ")
    assert message in first
    assert (second, run.content) == ("2", "done")
    assert len(run.asked) == 1


def test_a_call_without_a_name_is_said_to_be_none() -> None:
    session = next(local([written([("x", "{}")]).replace("functions.x:0", "??"), "sorry"]))
    run = Run(session)
    assert run.content == "sorry"
    assert "could not be used" in session.turns[-2].content
    assert "'??'" in session.turns[-2].content


def test_no_means_no_and_the_model_is_told(converse) -> None:
    session = converse([("add", '{"a": 1}')], "as you like")
    run = Run(session, answer="no")
    assert "did not allow" in results(session)[0][1]
    assert run.content == "as you like"


def test_stop_ends_the_answer_and_what_was_done_stays(converse) -> None:
    session = converse([("add", '{"a": 1}'), ("add", '{"a": 2}')], "never")
    permissions = iter(["once", "stop"])
    loop = ToolLoop(session, ToolBox([ADD]), lambda call: next(permissions), lambda text: None)
    list(loop.follow(session.ask("go", None, loop.box.declarations)))
    assert results(session) == [("functions.add:0", "2")]
    assert [call.id for call in session.pending_calls] == ["functions.add:1"]


def test_cancelling_during_a_call_calls_nothing_more(converse) -> None:
    session, said = converse([("slow", "{}"), ("slow", "{}")], "never"), []

    def slow(arguments: dict, should_stop) -> str:
        loop.cancel()
        return f"stopped: {should_stop()}"

    box = ToolBox([Tool("slow", "", parameters(), slow)], allow=["*"])
    loop = ToolLoop(session, box, lambda call: "no", said.append)
    list(loop.follow(session.ask("go", None, box.declarations)))
    assert results(session) == [("functions.slow:0", "stopped: True")]
    assert said[-1].startswith("stopped")


def test_rounds_are_bounded_and_the_model_is_told_to_end(converse) -> None:
    session = converse([("add", '{"a": 1}')])
    run = Run(session, most_rounds=2)
    texts = [text for _, text in results(session)]
    assert texts[:2] == ["2", "2"]
    assert texts[2].startswith("Not run: 2 rounds")
    assert len(texts) == 3
    assert run.said[-1] == "stopped after 2 rounds of tool calls for one message"
    assert len(session.pending_calls) == 1


def test_an_answer_cut_short_calls_nothing() -> None:
    session = next(local([[("add", json.dumps({"a": 1}))]]))
    loop = ToolLoop(session, ToolBox([ADD], allow=["*"]), lambda call: "no", lambda text: None)
    short = AnswerSettings(sampling=SamplingParams(max_tokens=20))
    tokens = list(loop.follow(session.ask("go", None, loop.box.declarations, short)))
    assert tokens[-1].finish_reason == "length"
    assert results(session) == []


def test_results_in_a_few_words() -> None:
    assert summary("one") == "one"
    assert summary("one\ntwo") == "2 lines: one"
    assert len(summary("x" * 200)) == 80
