"""`kimi-lite swarm` as it is typed: a task, or a command below it."""

import pytest
from typer.testing import CliRunner

from kimi_lite.apps.swarm import report, start
from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError


@pytest.fixture
def called(monkeypatch) -> list[tuple]:
    """What was called instead of a run."""
    calls: list[tuple] = []
    monkeypatch.setattr(start, "start_run", lambda options, task, stdin: calls.append(("run", task, options)) or 0)
    monkeypatch.setattr(start, "resume_run", lambda options, run: calls.append(("resume", run, options)) or 0)
    monkeypatch.setattr(report, "list_runs", lambda: calls.append(("list",)))
    return calls


def run(*words: str):
    return CliRunner().invoke(app, ["swarm", *words])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["count the lines"], ("run", "count the lines")),
        (["list all files"], ("run", "list all files")),
        (["resume the work of yesterday", "-q"], ("run", "resume the work of yesterday")),
        (["--max-parallel", "3", "task"], ("run", "task")),
        (["--plan", "p.toml"], ("run", None)),
        (["-m", "list", "task"], ("run", "task")),
        (["--", "--odd task"], ("run", "--odd task")),
        (["list"], ("list",)),
        (["resume"], ("resume", "")),
        (["resume", "2026", "--max-parallel", "2"], ("resume", "2026")),
    ],
)
def test_a_task_is_one_argument_and_single_words_are_commands(called, words: list[str], expected: tuple) -> None:
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert called[0][: len(expected)] == expected


def test_options_come_with_the_task(called) -> None:
    run(
        "task",
        "--max-parallel",
        "3",
        "--agent-time",
        "2.5",
        "--run-tokens",
        "10K",
        "--endpoint",
        "http://a",
        "--endpoint",
        "http://b=2",
    )
    options = called[0][2]
    assert (options.max_parallel, options.agent_seconds, options.run_tokens) == (3, 2.5, 10_240)
    assert options.endpoints == ("http://a", "http://b=2")
    assert not options.is_demo


def test_several_words_want_quotes(called) -> None:
    done = run("count", "the", "lines")
    assert isinstance(done.exception, KimiLiteError)
    assert "quotes" in str(done.exception)
    assert not called


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_shows_the_options_and_names_the_other_commands(words: list[str]) -> None:
    shown = " ".join(run(*words).output.split())
    assert "--max-parallel" in shown
    assert "swarm resume" in shown
