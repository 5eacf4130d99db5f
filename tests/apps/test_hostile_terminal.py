"""Hostile texts from all sides through the program itself, on a terminal: servers, tools, files, saved chats."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.apps.fake_openai import Answer, FakeOpenAI, call_delta, sse
from tests.apps.several import SEPARATOR
from tests.apps.terminal import Terminal
from tests.test_terminal import HOSTILE, assert_harmless

EVIL = "".join(HOSTILE.values())
BAD_MCP = str(Path(__file__).parent / "tools" / "bad_mcp_server.py")
ERROR = json.dumps({"error": {"message": EVIL}}, ensure_ascii=False).encode()
CALL = sse(
    call_delta(0, json.dumps({"path": EVIL}, ensure_ascii=False), "read_file", "functions.read_file:0"),
    reason="tool_calls",
)
ANSWER = sse({"reasoning_content": EVIL}, {"content": f"{EVIL}\n\n# {EVIL}\n`{EVIL}`\n\n```\n{EVIL}\n```\n"})
FLAGS = ((), ("--plain",), ("--json",))
SERVERS = {
    "answer": ([ANSWER], None),
    "error body": ([Answer([ERROR], 500, "application/json")], None),
    "error page": ([Answer([EVIL.encode()], 503, "text/html")], None),
    "error event": ([b"data: " + ERROR + b"\n\n"], None),
    "no event": ([f"data: {EVIL.splitlines()[0]}\n\n".encode()], None),
    "model's name": ([ANSWER], [{"id": f"m{EVIL}"}]),
    "models' names": ([ANSWER], [{"id": f"a{EVIL}"}, {"id": f"b{EVIL}"}]),
    "models' error": ([ANSWER], Answer([ERROR], 500, "application/json")),
    "call": ([CALL, ANSWER], None),
    "call of a tool that is not there": ([sse(call_delta(0, "{}", EVIL, "x"), reason="tool_calls"), ANSWER], None),
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    return {name: str(tmp_path / name) for name in ("KIMI_LITE_STATE", "XDG_CONFIG_HOME")}


def shown_by(*arguments: str, **environment: str) -> str:
    (shown,) = shown_by_each([arguments], **environment)
    return shown


def shown_by_each(command_lines: Sequence[Sequence[str]], **environment: str) -> list[str]:
    """What each shows on the same terminal."""
    terminal = Terminal("tests.apps.several", COMMAND_LINES=json.dumps(command_lines), **environment)
    terminal.wait()
    terminal.close()
    assert_harmless(terminal.raw)
    *shown, rest = terminal.raw.split(SEPARATOR)
    assert (len(shown), rest.strip()) == (len(command_lines), "")
    return shown


@pytest.mark.parametrize("server", SERVERS)
def test_run_against_a_hostile_server(tmp_path: Path, folders: dict, server: str) -> None:
    answers, models = SERVERS[server]
    options = {} if models is None else {"models": models}
    with FakeOpenAI(*answers * len(FLAGS), **options) as fake:
        allowed = ("--tools", str(tmp_path), "--allow", "read_file") if "call" in server else ()
        run = ("run", "--endpoint", fake.url, *allowed, "hi")
        for shown in shown_by_each([[*run, *flags] for flags in FLAGS], **folders):
            assert "EVIL" in shown or server == "no event"


def test_hostile_names_on_the_command_line(folders: dict) -> None:
    command_lines = [
        ("run", "-m", f"/tmp/{EVIL.replace(chr(0), '')}.gguf", "hi"),
        ("run", "-f", f"/tmp/{EVIL}", "hi"),
        ("run", "--image", f"/tmp/{EVIL}", "hi"),
        ("run", "-c", EVIL, "hi"),
        ("run", "--vram", EVIL, "hi"),
        ("run", EVIL, EVIL),
        ("run", f"--{EVIL}"),
        (EVIL,),
        ("plan", "-m", f"/tmp/{EVIL}"),
        ("quantize", f"/tmp/{EVIL}", "/tmp/x", "--recipe", EVIL),
        ("bench", "-m", f"/tmp/{EVIL}"),
        ("run", "--mcp-config", f"/tmp/{EVIL}", "hi"),
        ("run", "--tools", f"/tmp/{EVIL}", "hi"),
    ]
    given = [[argument.replace("/EVIL", "EVIL") for argument in arguments] for arguments in command_lines]
    for arguments, shown in zip(given, shown_by_each(given, **folders), strict=True):
        assert "EVIL" in shown, arguments


def test_hostile_names_of_files_and_settings(tmp_path: Path, folders: dict) -> None:
    name = EVIL.replace("/", "").replace("\x00", "")
    (tmp_path / "models").mkdir()
    for i in range(2):
        (tmp_path / "models" / f"{i}{name[:80]}.gguf").write_bytes(b"GGUFxxxx")
    assert "EVIL" in shown_by("run", "-m", str(tmp_path / "models"), "hi", **folders)
    config = tmp_path / "config.toml"
    config.write_text(f"{json.dumps('no-such-' + EVIL)} = 5\n", encoding="utf-8")
    assert "EVIL" in shown_by("run", "hi", KIMI_LITE_CONFIG=str(config), **folders)
    assert "EVIL" in shown_by("run", "hi", KIMI_LITE_VRAM=EVIL.replace("\x00", ""), **folders)


@pytest.mark.parametrize("mode", ["dies", "refuses", "noise"])
def test_hostile_mcp_servers(tmp_path: Path, folders: dict, mode: str) -> None:
    pytest.importorskip("mcp")
    config = tmp_path / "mcp.json"
    server = {"command": sys.executable, "args": [BAD_MCP, mode]}
    config.write_text(json.dumps({"mcpServers": {f"bad{EVIL}": server}}))
    with FakeOpenAI(ANSWER) as fake:
        shown = shown_by("run", "--endpoint", fake.url, "--mcp-config", str(config), "hi", **folders)
    assert "EVIL" in shown
    assert "Traceback" not in shown


def test_chat_with_hostile_server_file_and_saved_conversation(tmp_path: Path, folders: dict) -> None:
    name = "n\x1b]0;EVIL\x07\u202e.txt"
    (tmp_path / name).write_text(EVIL)
    with FakeOpenAI(ANSWER, CALL, ANSWER, models=[{"id": f"m{EVIL}"}]) as fake:
        terminal = Terminal("kimi_lite", "chat", "--endpoint", fake.url, "--tools", str(tmp_path), **folders)
        terminal.wait_for("❯")
        for typed, sign in (("title\u202e EVIL\r", "TTFT"), ("hi\r", "[s]top")):
            terminal.type(typed)
            terminal.wait_for(sign)
        terminal.type("n\r")
        terminal.wait_for("TTFT")
        terminal.wait_for_prompt()
        for command in ("/sessions", "/think show", "/tools", "/tools foo on", "/read .", f"/read {tmp_path}/n\u202e"):
            terminal.enter(command)
        terminal.type("\x04")
        assert terminal.wait() == 0
        terminal.close()
    assert "EVIL" in terminal.raw
    assert_harmless(terminal.raw)
    assert os.listdir(folders["KIMI_LITE_STATE"])
