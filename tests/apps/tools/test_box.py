"""The box of tools: who may call what, and what is told to a model that calls wrongly."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from kimi_lite.apps.tools.box import Stopped, ToolBox
from kimi_lite.apps.tools.confirm import Question, ask_at_terminal
from kimi_lite.apps.tools.tool import LONGEST_RESULT, Tool, ToolError, parameters
from kimi_lite.errors import KimiLiteError
from kimi_lite.text.tool_calls import ToolCall

SCHEMA = parameters(("a",), a={"type": "integer"}, b={"type": "string"}, c={})


def add_one(arguments: dict, should_stop) -> str:
    return str(arguments["a"] + 1)


def fail(arguments: dict, should_stop) -> str:
    raise ToolError("not today")


def crash(arguments: dict, should_stop) -> str:
    raise ZeroDivisionError("by nought")


def long(arguments: dict, should_stop) -> str:
    return "begin" + "x" * 100_000 + "\ud800end"


TOOLS = [
    Tool("add_one", "Adds.", SCHEMA, add_one),
    *(Tool(f.__name__, "", parameters(), f) for f in (fail, crash, long)),
]


def call(box: ToolBox, name: str, arguments: str = "{}", answer: str = "once") -> str:
    return box.call(ToolCall(f"functions.{name}:0", name, arguments), lambda _: answer)


def test_calls_and_their_errors_are_texts_for_the_model() -> None:
    box = ToolBox(TOOLS)
    assert call(box, "add_one", '{"a": 1}') == "2"
    assert call(box, "fail") == "Error: not today"
    assert call(box, "crash") == "Error: ZeroDivisionError: by nought"
    assert call(box, "none") == "Error: there is no tool 'none'; there are: add_one, fail, crash, long"
    shown = call(box, "long", "")
    assert len(shown) < LONGEST_RESULT + 100
    assert shown.startswith("begin")
    assert shown.endswith("?end")
    assert "characters left out" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{oops", "not valid JSON.*Call again"),
        ("[1]", "not a JSON object"),
        ("{}", "missing: a"),
        ('{"a": "1"}', "a must be of type integer, and is '1'"),
        ('{"a": true}', "a must be of type integer"),
        ('{"a": 1.5}', "a must be of type integer"),
        ('{"a": 1, "b": 2}', "b must be of type string"),
        ('{"a": 1, "d": 2}', "unknown.*: d; known are: a, b, c"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_calls_are_explained(arguments: str, message: str) -> None:
    box = ToolBox(TOOLS)
    shown = call(box, "add_one", arguments)
    assert shown.startswith("Error: ")
    assert re.search(message, shown)


def test_permission_is_asked_for_once_or_always() -> None:
    box, asked = ToolBox(TOOLS, allow=["fail"]), []

    def ask(answer: str):
        return lambda one: asked.append(one.name) or answer

    one = ToolCall("functions.add_one:0", "add_one", '{"a": 1}')
    assert "did not allow" in box.call(one, ask("no"))
    assert box.call(one, ask("once")) == "2"
    assert box.call(one, ask("always")) == "2"
    assert box.call(one, ask("no")) == "2"
    assert asked == ["add_one"] * 3
    assert box.call(ToolCall("x", "fail", "{}"), ask("no")) == "Error: not today"
    with pytest.raises(Stopped):
        box.call(ToolCall("x", "crash", "{}"), ask("stop"))
    assert ToolBox(TOOLS, allow=["*"]).call(one, ask("no")) == "2"
    assert len(asked) == 4


def test_a_tool_can_be_asked_for_again_also_where_all_are_allowed() -> None:
    box = ToolBox(TOOLS, allow=["*"])
    box.disallow("add_one")
    assert [name for name in box.tools if not box.is_allowed(name)] == ["add_one"]
    assert "did not allow" in call(box, "add_one", '{"a": 1}', "no")
    assert call(box, "fail", "{}", "no") == "Error: not today"
    box.allow("add_one")
    assert call(box, "add_one", '{"a": 1}', "no") == "2"


def test_questions_show_all_arguments_and_what_hides_in_them() -> None:
    asked: list[Question] = []
    box = ToolBox([Tool("t", "", {"type": "object", "properties": {}}, add_one)])
    code = "x = 1  # \u202e evil\nimport\u200b os\x1b[2J\np\u0430y()"
    arguments = {"code": code, "short": "a b", "deep": {"x": ["\u2066"]}, "na\u202eme": 5}
    box.call(ToolCall("x", "t", json.dumps(arguments)), lambda question: asked.append(question) or "no")
    assert asked[0].lines == [
        "  code:",
        "  │ x = 1  # ⟨U+202E⟩ evil",
        "  │ import⟨U+200B⟩ os⟨U+001B⟩[2J",
        "  │ p\u0430y()",
        "  ! p\u0430y: Latin and Cyrillic letters",
        "  short: a b",
        '  deep: {"x": ["⟨U+2066⟩"]}',
        "  na⟨U+202E⟩me: 5",
    ]
    assert asked[0].default == ""


@pytest.mark.parametrize(
    ("typed", "risks", "answer"),
    [
        ("y\n", (), "once"),
        ("A\n", (), "always"),
        ("\n\nmaybe\nn\n", (), "no"),
        ("", (), "stop"),
        ("\n", ("it has the network",), "no"),
        ("what\n\n", ("it has the network",), "no"),
        ("y\n", ("it has the network",), "once"),
    ],
)
def test_answers_at_a_terminal(
    typed: str, risks: tuple, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert ask_at_terminal(Question("t", {"code": "a\nb"}, risks)) == answer
    shown = capsys.readouterr().err
    assert "  │ a\n  │ b\n" in shown
    assert ("  ! it has the network\n" in shown) == bool(risks)
    assert ("[N]o" if risks else "[n]o") in shown


def test_nobody_is_asked_about_a_call_that_cannot_run() -> None:
    assert "missing" in ToolBox(TOOLS).call(ToolCall("x", "add_one", "{}"), lambda _: pytest.fail("asked"))


def test_a_name_that_is_taken_gets_its_servers_before_it() -> None:
    box = ToolBox([*TOOLS, Tool("fail", "", {}, add_one, "web"), Tool("fail", "", {}, add_one, "web")])
    assert list(box.tools) == ["add_one", "fail", "crash", "long", "web__fail", "web__fail_"]
    assert "web__fail" in box.notes[0]
    assert box.declarations[4]["function"]["name"] == "web__fail"


def test_only_known_tools_can_be_allowed() -> None:
    with pytest.raises(KimiLiteError, match="no tool wrong"):
        ToolBox(TOOLS, allow=["wrong"])


def test_a_running_call_can_be_stopped() -> None:
    def wait(arguments: dict, should_stop) -> str:
        box.cancel()
        return f"stopped: {should_stop()}"

    box = ToolBox([Tool("wait", "", parameters(), wait)], allow=["*"])
    assert call(box, "wait") == "stopped: True"
    box.tools["wait"] = Tool("wait", "", parameters(), lambda arguments, should_stop: f"stopped: {should_stop()}")
    assert call(box, "wait") == "stopped: False"


def test_everything_together(tmp_path: Path) -> None:
    pytest.importorskip("mcp")
    (tmp_path / "a.txt").write_text("hello")
    script = Path(__file__).with_name("mcp_server.py")
    config = tmp_path / "mcp.json"
    config.write_text(
        json.dumps(
            {"mcpServers": {"t": {"command": sys.executable, "args": [str(script)]}, "gone": {"command": "no-such"}}}
        )
    )
    with ToolBox.open(tmp_path, config, ["add", "read_file"]) as box:
        assert list(box.tools)[:5] == ["list_files", "read_file", "search_files", "run_python", "add"]
        assert call(box, "add", '{"a": 1, "b": 2}', "no") == "3"
        assert call(box, "read_file", '{"path": "a.txt"}', "no") == "hello"
        assert "did not allow" in call(box, "list_files", "{}", "no")
        assert box.notes[-1] == "MCP server gone is left out: there is no program no-such."
    assert ToolBox.open().declarations == []
    with pytest.raises(KimiLiteError, match="no tool web_search"):
        ToolBox.open(tmp_path, None, ["web_search"])
