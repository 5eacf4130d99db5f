"""`kimi-lite swarm` from its options: what goes to stdout, exit codes, signals, and what a run is resumed with."""

import os
import signal
from pathlib import Path

import pytest

from kimi_lite.apps.swarm import start
from kimi_lite.apps.swarm.events import RunStarted
from kimi_lite.apps.swarm.journal import read
from kimi_lite.apps.swarm.runs import RunStore
from kimi_lite.apps.swarm.start import options_from_json, options_to_json, resume_run, start_run
from kimi_lite.commandline.flags import resolve
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options, options_of
from tests.apps.swarm.scripted import Asked, Say, ScriptedBackend, assign, create


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KIMI_LITE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("KIMI_LITE_CONFIG", str(tmp_path / "none.toml"))
    for name in [name for name in os.environ if name.startswith("KIMI_LITE_MAX")]:
        monkeypatch.delenv(name)


def typed(**values: object) -> Options:
    return resolve("swarm", {"model": "m.gguf", **values})


def opened(backend: ScriptedBackend):
    return lambda options, status, warn: backend


def divides(asked: Asked) -> Say | str:
    if asked.settings.is_orchestrator:
        return "the answer" if asked.num_said else Say("", (create("a"), assign("a", "x"), assign("a", "y")))
    return "part"


def test_stdout_has_the_answer_alone(capsys) -> None:
    assert start_run(typed(), "the task", opened(ScriptedBackend(divides))) == 0
    out, err = capsys.readouterr()
    assert out == "the answer\n"
    assert "a2" in err
    assert start_run(typed(is_quiet=True), "the task", opened(ScriptedBackend(divides))) == 0
    assert capsys.readouterr() == ("the answer\n", "")


def test_no_task_is_no_run(tmp_path: Path) -> None:
    for task in (None, "", " \n"):
        with pytest.raises(KimiLiteError, match="There is no task"):
            start_run(typed(), task, opened(ScriptedBackend(divides)))
    with pytest.raises(KimiLiteError, match="--plan and --agents"):
        start_run(typed(plan_file="p.toml", agents_file="a.toml"), None)
    assert not RunStore().summaries()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"work_folder": "/no/such/folder"}, "/no/such/folder"),
        ({"allowed_tools": ["no_such_tool"]}, "no_such_tool"),
        ({"mcp_config": "/no/such/file"}, "MCP configuration"),
    ],
)
def test_what_can_be_known_to_fail_leaves_no_run_behind(more: dict, told: str) -> None:
    with pytest.raises(KimiLiteError, match=told):
        start_run(typed(**more), "the task", opened(ScriptedBackend(divides)))
    assert not RunStore().summaries()


def test_a_model_that_cannot_be_loaded_leaves_no_run_behind() -> None:
    class Broken(ScriptedBackend):
        async def open(self) -> None:
            raise KimiLiteError("The file is damaged.")

    with pytest.raises(KimiLiteError, match="damaged"):
        start_run(typed(), "the task", opened(Broken(divides)))
    assert not RunStore().summaries()


def test_a_run_that_fails_says_how_to_go_on(capsys) -> None:
    def fails(asked: Asked) -> Say | str:
        return Say(failure=KimiLiteError("The server is gone.")) if asked.num_said else divides(asked)

    with pytest.raises(KimiLiteError, match=r"The server is gone\.\nkimi-lite swarm resume \S+ goes on"):
        start_run(typed(), "the task", opened(ScriptedBackend(fails)))
    assert capsys.readouterr().out == "## a1\npart\n\n## a2\npart\n"
    backend = ScriptedBackend(divides)
    assert resume_run(typed(), "", opened(backend)) == 0
    assert [(asked.agent_id, asked.num_said) for asked in backend.asked] == [("orchestrator", 1)]
    assert capsys.readouterr().out == "the answer\n"


def test_an_end_by_a_limit_is_an_answer_with_a_remark(capsys) -> None:
    def never(asked: Asked) -> Say | str:
        if asked.settings.is_orchestrator and asked.settings.may_call:
            return Say("", (create(f"a{asked.num_said}"), assign(f"a{asked.num_said}", "x")))
        return "what there is"

    assert start_run(typed(orchestrator_steps="2"), "the task", opened(ScriptedBackend(never))) == 0
    out, err = capsys.readouterr()
    assert out == "what there is\n"
    assert "not complete (step_limit)" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_run_with_what_is_there(capsys, number: signal.Signals) -> None:
    def answer(asked: Asked) -> Say | str:
        if not asked.settings.may_call:
            return "from what is there"
        return Say("half of it", hangs=True) if asked.prompt == "y" else divides(asked)

    backend = ScriptedBackend(answer, on_hang=lambda: os.kill(os.getpid(), number))
    assert start_run(typed(), "the task", opened(backend)) == 130
    out, _ = capsys.readouterr()
    assert out == "from what is there\n"
    again = ScriptedBackend(divides)
    assert resume_run(typed(), "", opened(again)) == 0
    assert "a1" not in {asked.agent_id for asked in again.asked}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_the_model_loads_leaves_no_run_behind() -> None:
    class Slow(ScriptedBackend):
        async def open(self) -> None:
            import asyncio

            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    assert start_run(typed(), "the task", opened(Slow(divides))) == 130
    assert not RunStore().summaries()


def test_a_second_signal_ends_the_process(monkeypatch) -> None:
    """At once, but not within the patience for a wish that was typed twice."""

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(start.os, "_exit", leave)
    clock = iter([10.0, 10.2, 20.0])
    monkeypatch.setattr(start.time, "monotonic", lambda: next(clock))
    calls: list[str] = []

    class Run:
        def stop(self) -> None:
            calls.append("stop")

    class View:
        def __exit__(self, *exception: object) -> None:
            calls.append("view closed")

    ends = start.Ends((signal.SIGINT,), start._exit_at_once(View()))
    ending = start._Ending(Run(), None, ends)
    ending.has_begun = True
    ending.on_signal(signal.SIGINT)
    ending.on_signal(signal.SIGINT)
    assert calls == ["stop"]
    with pytest.raises(Left, match="130"):
        ending.on_signal(signal.SIGINT)
    assert calls == ["stop", "view closed"]


def test_a_run_that_is_complete_is_only_shown(capsys) -> None:
    start_run(typed(), "the task", opened(ScriptedBackend(divides)))
    capsys.readouterr()
    backend = ScriptedBackend(divides)
    assert resume_run(typed(), "", opened(backend)) == 0
    assert not backend.asked
    assert capsys.readouterr().out == "the answer\n"


def test_a_plan_and_permissions_are_those_the_run_was_started_with(tmp_path: Path, capsys) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'task = "t"\n[agents.r]\nsystem_prompt = "You read."\n[[stages]]\n'
        'tasks = [{ agent = "r", prompt = "one" }, { agent = "r", prompt = "two" }]\n'
    )

    def dies(asked: Asked) -> Say | str:
        return Say(failure=KimiLiteError("gone")) if asked.settings.is_orchestrator else "part"

    with pytest.raises(KimiLiteError):
        start_run(typed(plan_file=str(plan)), None, opened(ScriptedBackend(dies)))
    plan.write_text("nonsense")
    backend = ScriptedBackend(lambda asked: "joined")
    assert resume_run(typed(), "", opened(backend)) == 0
    assert [asked.agent_id for asked in backend.asked] == ["orchestrator"]
    assert capsys.readouterr().out.endswith("joined\n")


def test_a_key_is_no_part_of_a_run() -> None:
    start_run(typed(api_key="sk-secret"), "the task", opened(ScriptedBackend(divides)))
    folder = RunStore().find()
    assert "sk-secret" not in (folder / "events.jsonl").read_text()
    started = read(folder).events[0]
    assert isinstance(started, RunStarted)
    assert started.settings["options"]["model"] == "m.gguf"


KEPT = [each for each in options_of("swarm") if each.name not in start._NOT_KEPT]


@pytest.mark.parametrize("option", KEPT, ids=[each.name for each in KEPT])
def test_every_option_survives_in_a_runs_record(option) -> None:
    text = {"text": "abc", "path": "/x/abc", "integer": "3", "number": "0.5", "size": "3G", "tokens": "2K"}
    written = text.get(option.kind)
    if option.kind == "choice":
        written = option.choices[-1]
    elif option.kind == "switch":
        written = True
    elif option.kind == "texts":
        written = ["http://a:1"]
    options = resolve("swarm", {option.name: written})
    again = options_from_json(options_to_json(options), resolve("swarm", {}))
    assert getattr(again, option.name) == getattr(options, option.name)
    assert again == options


def test_what_is_typed_goes_before_what_a_run_was_started_with() -> None:
    kept = options_to_json(typed(max_parallel="3", temperature="0.5"))
    again = options_from_json(kept, resolve("swarm", {"max_parallel": "7"}))
    assert (again.max_parallel, again.temperature) == (7, 0.5)


def test_what_is_piped_in_is_appended_to_the_task(tmp_path: Path) -> None:
    (tmp_path / "diff").write_text("+ a line\n")
    for task, expected in (("Review this.", "Review this.\n\n+ a line\n"), (None, "+ a line\n")):
        backend = ScriptedBackend(divides)
        with open(tmp_path / "diff", encoding="utf-8") as stdin:
            assert start_run(typed(), task, opened(backend), stdin) == 0
        assert backend.asked[0].prompt == expected


def test_a_run_goes_on_with_the_plan_it_began_with() -> None:
    def fails(asked: Asked) -> Say | str:
        return Say(failure=KimiLiteError("gone"))

    with pytest.raises(KimiLiteError):
        start_run(typed(), "the task", opened(ScriptedBackend(fails)))
    with pytest.raises(KimiLiteError, match="--plan has no effect here"):
        resume_run(typed(plan_file="other.toml"), "")
