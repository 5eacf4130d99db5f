"""A short load on a fake model whose answers depend on every token of the context, and whose memory is scarce."""

import asyncio
import os
from collections.abc import Callable

import pytest

from kimi_lite.apps.server.state import ServerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.tools.serve.load import Outcome, Use, _compare_uses, questions, run
from tests.apps.server.running import running
from tests.engine.fakes import fake_engine


def scarce_engine() -> Engine:
    """Pages for about two of eight sequences: the youngest are put off and go on later."""
    return fake_engine(context_length=1024, num_pages=40, max_step_tokens=96, max_running=8, max_gap_s=0.05)


def load(open_engine: Callable[[], Engine], seconds: float = 3.0) -> Outcome:
    settings = ServerSettings(shuts_down_within_s=1.0, has_loop_guard=False)
    with running(open_engine, settings, max_waiting=64) as url:
        return asyncio.run(run(url, os.getpid(), 16, seconds, num_questions=8, max_prompt_words=60, max_tokens=24))


def test_under_load_everyone_gets_the_answer_they_would_get_alone() -> None:
    outcome = load(scarce_engine)
    assert outcome.wrong == []
    assert set(outcome.counts) == {"streamed", "whole", "hung up early", "hung up midway"}
    assert outcome.first_s and outcome.gaps_s


def test_answers_that_depend_on_the_others_are_found() -> None:
    """The tool's own proof: a model that adds a little where it runs with others is told from one that does not."""

    def disturbed() -> Engine:
        engine = scarce_engine()
        forward = engine.model.forward

        def other(batch, should_stop=None):
            logits = forward(batch, should_stop)
            return logits[:, ::-1] if len(batch.sequences) > 2 else logits

        engine.model.forward = other
        return engine

    assert any("instead of" in wrong for wrong in load(disturbed, 1.5).wrong)


@pytest.mark.parametrize(
    ("after", "word"),
    [(Use(10**9, 4, 9), "memory"), (Use(10**8, 9, 9), "threads"), (Use(10**8, 4, 99), "descriptors")],
)
def test_what_is_left_behind_is_found(after: Use, word: str) -> None:
    outcome = Outcome(uses=[Use(10**8, 4, 9), Use(10**8, 4, 9), after])
    _compare_uses(outcome)
    assert len(outcome.wrong) == 1 and word in outcome.wrong[0]


def test_the_same_seed_asks_the_same() -> None:
    assert questions(5, 3, True) == questions(5, 3, True) != questions(5, 4, True)
