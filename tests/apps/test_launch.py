"""`launch` with stand-ins for the clients: what they are told, and the server that begins and ends with them."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kimi_lite.apps.launch import CLIENTS, Target
from kimi_lite.cli import app
from kimi_lite.commandline.commands import Client
from kimi_lite.errors import KimiLiteError
from tests.apps.server.running import running
from tests.engine.fakes import fake_engine
from tests.tiny import write_tiny_gguf

ROOT = Path(__file__).parents[2]
# A client that writes down what it was given, asks the server for its models, and ends with code 7.
STAND_IN = """#!{python}
import json, os, sys, urllib.request
urls = [value for value in os.environ.values() if value.startswith("http://127.0.0.1")]
json.dump([sys.argv[1:], dict(os.environ)], open(os.environ["STAND_IN_WROTE"], "w"))
if "slow" in sys.argv:
    import time; time.sleep(60)
sys.exit(7)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch) -> Path:
    """Every client is the stand-in. Returns the file that it writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in CLIENTS:
        program = folder / name
        program.write_text(STAND_IN.format(python=sys.executable))
        program.chmod(0o700)
    wrote = tmp_path / "wrote.json"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_WROTE", str(wrote))
    return wrote


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "kimi_lite", "launch", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", np.random.default_rng(0)))


def is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_every_client_of_the_command_line_is_known() -> None:
    assert set(get_args(Client)) == set(CLIENTS)


@pytest.mark.parametrize("name", sorted(CLIENTS))
def test_a_server_that_runs_is_used_and_left_alone(name: str, stand_in: Path) -> None:
    with running(lambda: fake_engine(context_length=8192, num_pages=128)) as url:
        port = int(url.rpartition(":")[2])
        launched = start("--port", str(port), name, "do", "--it", "-ngl")
        said = launched.communicate(timeout=120)[1]
        assert launched.returncode == 7, said
        assert is_up(port)
    arguments, environment = json.loads(stand_in.read_text())
    assert arguments[-3:] == ["do", "--it", "-ngl"]
    files = [Path(each).read_text() for each in arguments if each.startswith("/") and Path(each).is_file()]
    told = json.dumps([arguments, {k: v for k, v in environment.items() if k not in os.environ}, files])
    assert url in told.replace("\\", "") and "fake" in told, told
    assert url in said or any(url in text for text in files)


def test_a_server_of_its_own_begins_and_ends_with_the_client(stand_in: Path, model: str, tmp_path: Path) -> None:
    launched = start("-m", model, "-c", "256", "--port", "0", "--parallel", "2", "codex", "exec")
    said = launched.communicate(timeout=120)[1]
    assert launched.returncode == 7, said
    arguments, _ = json.loads(stand_in.read_text())
    values = tomllib.loads("\n".join(dotted_values(arguments)))
    port = int(values["model_providers"]["kimi-lite"]["base_url"].split(":")[2].partition("/")[0])
    assert not is_up(port)
    log = tmp_path / "state" / f"server-{port}.log"
    assert "listens on" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_client_and_then_the_server(number: int, stand_in: Path, model: str) -> None:
    launched = start("-m", model, "-c", "256", "--port", "0", "claude", "slow")
    until = time.monotonic() + 200
    while not stand_in.exists() or not stand_in.read_text():
        assert time.monotonic() < until and launched.poll() is None
        time.sleep(0.05)
    _, environment = json.loads(stand_in.read_text())
    port = int(environment["ANTHROPIC_BASE_URL"].rpartition(":")[2])
    assert is_up(port)
    launched.send_signal(number)
    launched.wait(120)
    assert launched.returncode == 128 + number
    assert not is_up(port)


def test_a_server_that_does_not_start_says_why(stand_in: Path) -> None:
    launched = start("--port", "0", "-m", "/nowhere/model.gguf", "codex")
    said = launched.communicate(timeout=120)[1]
    assert launched.returncode == 2 and "/nowhere/model.gguf" in said and "server-" in said, said
    assert not stand_in.exists()


def test_what_cannot_be_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(app, ["launch", "qwen"])
    assert isinstance(done.exception, KimiLiteError) and "npm install -g @qwen-code" in done.exception.hint
    assert CliRunner().invoke(app, ["launch", "--print", "--port", "1", "qwen", "-p", "hi"]).exit_code == 0
    assert CliRunner().invoke(app, ["launch", "nothing"]).exit_code == 2


def test_another_program_at_the_port_is_not_taken_for_a_server(stand_in: Path) -> None:
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]
    other = subprocess.Popen(command, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        port = other.stdout.readline().split("port ")[1].split()[0]
        launched = start("--port", port, "codex")
        said = launched.communicate(timeout=120)[1]
    finally:
        other.terminate()
        other.wait(120)
    assert launched.returncode == 2 and "Another program" in said, said


@given(
    st.sampled_from(sorted(CLIENTS)),
    st.builds(
        Target,
        st.just("http://127.0.0.1:8080"),
        st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1),
        st.text(st.characters(exclude_categories=["C"]), min_size=1),
        st.integers(1024, 1 << 20),
    ),
)
def test_any_name_and_key_is_told_whole(name: str, target: Target) -> None:
    """Quotes, spaces and other scripts in a model's name survive the flags, the environment and the files."""
    setup = CLIENTS[name].set_up(target)
    documents = [json.loads(text) for text in setup.files.values()]
    documents += [json.loads(value) for key, value in setup.environment.items() if key.endswith("_CONTENT")]
    documents.append(tomllib.loads("\n".join(dotted_values(setup.arguments))))
    said = [*setup.environment.values(), *setup.arguments, *strings(documents)]
    assert target.model in said or f"openai/{target.model}" in said
    assert target.key in said
    assert f"{target.url}/v1" in said or target.url in said


def dotted_values(arguments: Sequence[str]) -> list[str]:
    """What follows each `-c`."""
    return [value for flag, value in pairwise(arguments) if flag == "-c"]


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(each for inner in value.values() for each in strings(inner))]
    if isinstance(value, list):
        return [each for inner in value for each in strings(inner)]
    return [value] if isinstance(value, str) else []
