"""A message that does not fit: what is offered works in that very situation, at any size of context and of messages."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.apps.chat.context import Fit, answer_tokens
from kimi_lite.errors import KimiLiteError
from tests.apps.talk import Talk

MAX_CONTEXT = 1024  # what the scripted model is made for


def ask_until_refused(talk: Talk, sizes: list[int]) -> None:
    """A conversation of messages of so many characters, as far as they go."""
    talk.say("/think off")
    for size in sizes:
        talk.say("x" * size, answers="c", is_interactive=True)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    context_length=st.sampled_from([128, 200, 300, 512, 1024]),
    sizes=st.lists(st.integers(1, 300), max_size=4),
    size=st.integers(1, 1200),
    choice=st.sampled_from("dsc"),
)
def test_every_remedy_that_is_offered_helps(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    context_length: int,
    sizes: list[int],
    size: int,
    choice: str,
) -> None:
    talk = Talk(tmp_path, capsys, context_length=context_length)
    talk.session.max_context_length = talk.session.engine.max_context_length = MAX_CONTEXT
    ask_until_refused(talk, sizes)
    content = "y" * size
    fit = Fit.of(talk.session, content)
    before = len(talk.session.turns)
    shown = " ".join(talk.say(content, answers=choice if choice != "s" or fit.num_to_summarise else "d").split())
    is_asked = bool(talk.input.questions)
    if is_asked and choice != "c":
        assert len(talk.input.questions) == 1, "the offer came again"
        assert len(talk.session.turns) == before + 2, shown  # sent and answered
    elif is_asked:
        assert "not sent" in shown
        assert len(talk.session.turns) == before
    elif len(talk.session.turns) == before:
        check_refusal(talk, content, shown, fit)
    talk.chat.autosave.close()


def check_refusal(talk: Talk, content: str, shown: str, fit: Fit) -> None:
    """No exchange is in the way: a shorter message goes, and so does a longer context where it is recommended."""
    assert "Try a shorter message" in shown
    talk.say("short", answers="d")
    assert talk.session.turns[-2].text == "short"
    recommended = re.search(r"start with -c (\d+)(K?)", shown)
    if recommended:
        longer = int(recommended[1]) * (1024 if recommended[2] else 1)
        assert fit.alone < longer <= MAX_CONTEXT
    else:
        assert fit.alone + answer_tokens(fit.have) > MAX_CONTEXT


@pytest.mark.parametrize("num_exchanges", [2, 3, 5])
def test_oldest_exchanges_that_do_not_fit_at_once_are_summarised_in_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_exchanges: int
) -> None:
    talk = Talk(tmp_path, capsys, context_length=1024)
    talk.session.settings = talk.session.settings.with_thinking(False)
    for number in range(num_exchanges):
        talk.session.engine.context_length = talk.session.context_length = 1024
        talk.say(f"{number} " + "word " * 16)
    talk.session.context_length = 760  # a full context, as a smaller -c and --continue make it
    pieces = []
    stream = talk.chat.stream
    talk.chat.stream = lambda tokens, settings=None: pieces.append(1) or stream(tokens, settings)
    assert talk.session.can_summarise(num_exchanges)
    shown = talk.say(f"/ctx summarise {num_exchanges}")
    assert "replaced by this summary" in shown
    assert talk.session.exchanges == []
    assert len(pieces) >= (2 if num_exchanges > 3 else 1)


def test_one_exchange_that_fills_the_context_is_not_offered_for_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(tmp_path, capsys, context_length=300)
    talk.say("/think off", "x" * 110)
    talk.say("y" * 60, answers="c")
    assert talk.input.questions == ["[d]rop the oldest 1 of 1 exchange, or [c]ancel? "]
    assert "too long to be summarised" in talk.say("/ctx summarise 1")
    assert "Say /ctx drop 1 instead" in talk.say("/ctx summarise 1")
    assert "no longer sent" in talk.say("/ctx drop 1")
    talk.say("y" * 60)
    assert talk.session.turns[-2].text == "y" * 60


@pytest.mark.parametrize(
    ("need", "remedy"), [(2000, "Try -c 3K or a shorter prompt."), (4000, "Try a shorter prompt.")]
)
def test_the_engine_recommends_no_context_that_the_model_is_not_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], need: int, remedy: str
) -> None:
    engine = Talk(tmp_path, capsys, context_length=256).session.engine
    engine.max_context_length = 3072
    from kimi_lite.engine.types import Request

    with pytest.raises(KimiLiteError, match=re.escape(remedy)):
        engine.require_room(Request("a", (1,) * need))


@pytest.mark.parametrize("way", ["drop", "summarise"])
def test_the_remedies_for_a_pipe_work_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str) -> None:
    talk = Talk(tmp_path, capsys, context_length=1024)
    talk.say("/think off", *["word " * 40] * 4)
    shown = " ".join(talk.say("word " * 100, is_interactive=False).split())
    (command,) = re.findall(rf"/ctx {way} \d+", shown)
    talk.say(command, "word " * 100, is_interactive=False)
    assert talk.session.turns[-2].text == ("word " * 100).strip()
