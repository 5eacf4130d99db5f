from dataclasses import replace
from pathlib import Path

import pytest

from kimi_lite.apps.swarm.board import SharedFiles
from kimi_lite.apps.swarm.permissions import Permissions, Rules
from kimi_lite.apps.tools.tool import Tool
from kimi_lite.errors import KimiLiteError


def tool(name: str, *risks: str) -> Tool:
    return Tool(name, "", {}, lambda arguments, should_stop: "", risks=risks)


def names(tools: list[Tool]) -> list[str]:
    return [one.name for one in tools]


@pytest.fixture
def tools(tmp_path: Path) -> list[Tool]:
    files = SharedFiles(tmp_path, lambda path, agents: None)
    board = SharedFiles(tmp_path, lambda path, agents: None, "board")
    return [*files.tools("a1"), *board.tools("a1"), tool("run_python"), tool("browse", "not confined: the network")]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agents.toml"
    path.write_text(text)
    return path


def test_without_a_word_agents_change_nothing_outside_the_run(tools: list[Tool]) -> None:
    assert names(Permissions().tools_of("any", tools)) == [
        "list_files",
        "read_file",
        "search_files",
        "board_list_files",
        "board_read_file",
        "board_search_files",
        "board_write_file",
        "board_append_file",
    ]
    Permissions().require_known([])


def test_allow_adds_and_what_is_not_confined_must_be_named(tools: list[Tool]) -> None:
    assert names(Permissions().with_allowed(["*"]).tools_of("any", tools)) == names(tools)[:-1]
    assert names(Permissions().with_allowed(["b*", "browse"]).tools_of("any", tools))[-1] == "browse"
    assert "browse" not in names(Permissions().with_allowed(["brows?"]).tools_of("any", tools))


def test_a_file_gives_each_agent_its_own(tmp_path: Path, tools: list[Tool]) -> None:
    permissions = Permissions.read(
        written(
            tmp_path,
            """
            [default]
            max_steps = 5
            system_prompt = "Be brief."
            [agents.coder]
            system_prompt = "You write Python."
            tools = ["write_file", "run_python"]
            max_tokens = 1_000
            [agents.thinker]
            tools = []
            """,
        )
    ).with_allowed(["run_python"])
    permissions.require_known(tools)
    assert permissions.of("coder") == Rules("You write Python.", ("write_file", "run_python"), 5, 1000)
    assert names(permissions.tools_of("coder", tools)) == ["write_file", "run_python"]
    assert permissions.tools_of("thinker", tools) == [] and permissions.of("thinker").system_prompt == "Be brief."
    assert (
        names(permissions.tools_of("another", tools))[-1] == "run_python" and permissions.of("another").max_steps == 5
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "[agents.a]\ntool = ['x']",
            r"\[agents\.a\].* sets tool, which is not known.\nKnown are: system_prompt, tools",
        ),
        ("[agent.a]\n", "sets agent, which is not known"),
        ("agents = 3", "sets agents to 3"),
        ("[agents]\na = 1", r"\[agents\.a\] in .* is 1; it must be a table"),
        ("[default]\ntools = 'read_file'", "must be a list of names"),
        ("[default]\ntools = [1]", "must be a list of names"),
        ("[default]\nmax_steps = 0", "whole number, 1 or more"),
        ("[default]\nmax_tokens = true", "whole number, 1 or more"),
        ("[default]\nmax_tokens = 1.5", "whole number, 1 or more"),
        ("[default]\nsystem_prompt = 1", "must be a text"),
        ("[default\n", "cannot be read"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_what_would_work(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(KimiLiteError, match=reason):
        Permissions.read(written(tmp_path, text))


def test_a_tool_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, tools: list[Tool]) -> None:
    permissions = Permissions.read(written(tmp_path, "[agents.coder]\ntools = ['run_pyhton', 'board_*', 'x_*']"))
    with pytest.raises(KimiLiteError, match=r"agent coder is to have run_pyhton, x_\*.*\nThere are: list_files, "):
        permissions.require_known(tools)
    with pytest.raises(KimiLiteError, match=r"--allow is to have shell, and there is no such tool"):
        Permissions().with_allowed(["shell"]).require_known(tools)
    renamed = [replace(one, name=f"x_{one.name}") for one in tools]
    with pytest.raises(KimiLiteError, match="is to have run_pyhton, and"):
        permissions.require_known([*tools, *renamed])
