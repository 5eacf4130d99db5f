"""`--endpoint` and `--tools` as typed: the program against a scripted server, on pipes and on a terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps.fake_openai import Answer, FakeOpenAI, call_delta, sse
from tests.apps.terminal import ROOT, Terminal

READ = sse(
    {"reasoning_content": "I look."},
    {"content": "Let me see."},
    call_delta(0, '{"path": "a.txt"}', "read_file", "functions.read_file:0"),
    reason="tool_calls",
    usage={"prompt_tokens": 20, "completion_tokens": 7},
)
DONE = sse(
    {"content": "It says **hello**.\n\n```python\nx = 1\n```\n"}, usage={"prompt_tokens": 40, "completion_tokens": 9}
)

WIDE = """\
# 标题 😀

这是一个**很长**的句子，包含中文和 English 混排，用来检查在六十列终端上的换行是否正确，不会重复任何一行。

| 名称 | value |
|------|------:|
| 苹果 🍎 | 1 |

1. 你好 `code`
2. end
"""
WIDE_SHOWN = """\
标题 😀

这是一个很长的句子，包含中文和 English
混排，用来检查在六十列终端上的换行是否正确，不会重复任何一行
。

名称      value
───────────────
苹果 🍎       1

1. 你好 code
2. end
  gen"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("hello\nthere\n")
    return tmp_path / "files"


def run(fake: FakeOpenAI, *arguments: object) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "kimi_lite",
        "run",
        "--endpoint",
        fake.url,
        "what is in a.txt?",
        *map(str, arguments),
    ]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def test_run_with_a_tool_that_is_allowed(folder: Path) -> None:
    with FakeOpenAI(READ, DONE) as fake:
        done = run(fake, "--tools", folder, "--allow", "read_file")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Let me see.\nIt says **hello**.\n\n```python\nx = 1\n```\n"
    assert '→ read_file {"path": "a.txt"}\n' in done.stderr
    assert "← 2 lines: hello" in done.stderr
    assert fake.bodies[1]["messages"][-1]["content"] == "hello\nthere"
    assert [tool["function"]["name"] for tool in fake.bodies[0]["tools"]][-1] == "run_python"


def test_run_asks_nobody_and_calls_nothing(folder: Path) -> None:
    with FakeOpenAI(READ, DONE) as fake:
        done = run(fake, "--tools", folder)
    assert done.returncode == 0, done.stderr
    assert "--allow read_file" in done.stderr
    assert "did not allow" in fake.bodies[1]["messages"][-1]["content"]


def test_mistakes_are_sentences() -> None:
    with FakeOpenAI(Answer([b'{"error": {"message": "no"}}'], 500)) as fake:
        done = run(fake)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "answered 500 (refused): no." in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_on_sixty_columns_shows_every_row_once(tmp_path: Path) -> None:
    thoughts = [{"reasoning_content": f"思考 {i}, thinking about many things; "} for i in range(40)]
    events = sse(*thoughts, *({"content": char} for char in WIDE)).split(b"\n\n")
    with FakeOpenAI(Answer([event + b"\n\n" for event in events], pause_s=0.004)) as fake:
        folders = {name: str(tmp_path / name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")}
        terminal = Terminal("kimi_lite", "chat", "--endpoint", fake.url, num_columns=60, num_rows=30, **folders)
        terminal.wait_for("❯")
        terminal.type("你好 😀\r")
        terminal.wait_for("TTFT")
        shown = "\n".join(terminal.screen)
        terminal.wait_for("❯")
        terminal.type("\x04")
        assert terminal.wait() == 0
        terminal.close()
    answer = shown.partition("(/think show)\n")[2]
    assert answer.startswith(WIDE_SHOWN), shown
    assert shown.count("思考") == 0
    assert "thinking about many things" in terminal.seen


def test_chat_asks_and_renders(folder: Path, tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")}
    with FakeOpenAI(READ, DONE) as fake:
        terminal = Terminal("kimi_lite", "chat", "--endpoint", fake.url, "--tools", str(folder), **folders)
        assert "kimi-k2.5" in terminal.wait_for("❯")
        terminal.type("what is in a.txt?\r")
        terminal.wait_for("▸ thought for")
        terminal.wait_for("→ read_file")
        terminal.wait_for("read_file")
        terminal.wait_for("[s]top")
        terminal.type("y\r")
        terminal.wait_for("← 2 lines: hello")
        terminal.wait_for("It says hello.")
        terminal.wait_for("TTFT")
        terminal.wait_for("❯")
        terminal.type("\x04")
        assert terminal.wait() == 0
        terminal.close()
    assert fake.bodies[1]["messages"][-1]["content"] == "hello\nthere"


def test_run_asks_at_a_terminal_and_ctrl_c_stops_the_calls(folder: Path) -> None:
    with FakeOpenAI(READ, DONE) as fake:
        terminal = Terminal("kimi_lite", "run", "--endpoint", fake.url, "--tools", str(folder), "hi")
        terminal.wait_for("[s]top")
        terminal.type("maybe\r")
        terminal.wait_for("[s]top")
        terminal.type("\x03")
        terminal.wait_for("stopped; calls without a result were not run")
        assert terminal.wait() == 0
        terminal.close()
    assert len(fake.bodies) == 1


RUN = sse(
    call_delta(0, '{"code": "import os\\nprint(6 * 7) # \\u202eok"}', "run_python", "functions.run_python:0"),
    reason="tool_calls",
    usage={"prompt_tokens": 20, "completion_tokens": 7},
)


@pytest.mark.parametrize("flags", [(), ("-q",), ("--plain",), ("-q", "--json")])
def test_code_is_shown_before_it_is_approved(folder: Path, flags: tuple[str, ...]) -> None:
    with FakeOpenAI(RUN, DONE) as fake:
        terminal = Terminal("kimi_lite", "run", "--endpoint", fake.url, "--tools", str(folder), *flags, "hi")
        shown = terminal.wait_for("run run_python? ")
        assert "│ import os" in shown
        assert "│ print(6 * 7) # ⟨U+202E⟩ok" in shown
        terminal.wait_for("[s]top")
        terminal.type("y\r")
        assert terminal.wait() == 0
        terminal.close()
    assert fake.bodies[1]["messages"][-1]["content"] == "42"
