"""The scripted engine through the server's own APIs, and real agents on it where they are installed."""

import json
import shutil
from collections.abc import Iterator

import anthropic
import openai
import pytest

from kimi_lite.tools.serve.agents import AGENTS, drive, scripted_server
from kimi_lite.tools.serve.scripted import FILE_NAME, FILE_TEXT, TASK, ScriptedEngine, write_a_file
from tests.apps.server.running import running

WRITE = {
    "type": "object",
    "properties": {"filePath": {"type": "string"}, "content": {"type": "string"}, "why": {"type": "string"}},
    "required": ["filePath", "content", "why"],
}
SHELL = {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}}
ASKED = [{"role": "user", "content": TASK}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(lambda: ScriptedEngine(write_a_file)) as url:
        yield url


def test_a_file_is_written_with_the_declared_tool_and_the_result_is_read(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", "function": {"name": "write", "parameters": WRITE}}]
    message = client.chat.completions.create(model="x", messages=ASKED, tools=tools).choices[0].message
    (call,) = message.tool_calls
    assert (call.id, call.function.name) == ("functions.write:0", "write")
    arguments = json.loads(call.function.arguments)
    assert (arguments["filePath"], arguments["content"]) == (FILE_NAME, FILE_TEXT) and "why" in arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "ok"}
    more = [*ASKED, message.model_dump(exclude_none=True), result]
    assert (
        "is written" in client.chat.completions.create(model="x", messages=more, tools=tools).choices[0].message.content
    )
    more[-1] = {**result, "content": "Error: the path must be absolute"}
    tools.append({"type": "function", "function": {"name": "shell", "parameters": SHELL}})
    again = client.chat.completions.create(model="x", messages=more, tools=tools).choices[0].message
    assert again.tool_calls[0].function.name == "shell"


def test_a_shell_is_used_where_no_tool_writes(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", "name": "shell", "parameters": SHELL, "strict": False}]
    response = client.responses.create(model="x", input=TASK, tools=tools)
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert FILE_NAME in json.loads(call.arguments)["command"][-1]


def test_messages_get_the_call_too(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    tools = [{"name": "Write", "input_schema": WRITE}]
    message = client.messages.create(model="claude-x", max_tokens=1000, messages=ASKED, tools=tools)
    assert message.stop_reason == "tool_use"
    assert message.content[-1].input["filePath"] == FILE_NAME


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(AGENTS))
def test_an_installed_agent_does_its_task(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    with scripted_server() as port:
        deed = drive(name, port)
    assert deed.is_done, deed.said
