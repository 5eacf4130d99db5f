"""`kimi-lite launch CLIENT`: a coding agent on this machine's model with one command.

    kimi-lite launch -m kimi-k2.5.gguf codex exec "fix the tests"

Options before the client's name are `serve`'s, what follows it is the client's. Where no server answers at the port,
one is started, with its log in the state folder, and ended with the client. The client learns of it by environment
variables, flags, or a file of ours: what the user has configured stays as it is.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from kimi_lite.apps.folders import make_private, state_folder, write_private
from kimi_lite.apps.progress import LoadProgress
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from kimi_lite.terminal import Console, echo

_ANSWERS_WITHIN_S = 5.0  # a server that runs
_ENDS_WITHIN_S = 30.0  # more than the server gives to running answers
_POLL_S = 0.2
_LOG_LINES = 8  # that are shown of a server that did not start
_ANSWER_SHARE = 4  # an answer may take a fourth of the context
_NO_KEY = "none"  # clients want some key


@dataclass(frozen=True, slots=True)
class Target:
    """What a client must know of the server."""

    url: str  # without /v1
    key: str
    model: str
    context_length: int

    @property
    def max_answer(self) -> int:
        return self.context_length // _ANSWER_SHARE


@dataclass(frozen=True, slots=True)
class Setup:
    """How a client is told: environment, flags that go before the user's, files to write first."""

    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    files: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Client:
    """A program that can be launched."""

    install: str
    set_up: Callable[[Target], Setup]


def _opencode(target: Target) -> Setup:
    """Configuration in the environment is merged over the user's."""
    model = {
        "name": target.model,
        "tool_call": True,
        "reasoning": True,
        "interleaved": {"field": "reasoning_content"},
        "limit": {"context": target.context_length, "output": target.max_answer},
    }
    options = {"baseURL": f"{target.url}/v1", "apiKey": "{env:KIMI_LITE_API_KEY}"}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "kimi-lite", "options": options}
    name = f"kimi-lite/{target.model}"
    config = {
        "provider": {"kimi-lite": {**provider, "models": {target.model: model}}},
        "model": name,
        "small_model": name,
    }
    return Setup({"OPENCODE_CONFIG_CONTENT": json.dumps(config), "KIMI_LITE_API_KEY": target.key})


def _codex(target: Target) -> Setup:
    """`-c key=value`, values in TOML, which takes JSON's texts."""
    provider = {
        "name": "kimi-lite",
        "base_url": f"{target.url}/v1",
        "wire_api": "responses",
        "env_key": "KIMI_LITE_API_KEY",
        "stream_idle_timeout_ms": 3_600_000,
    }
    values = {f"model_providers.kimi-lite.{name}": value for name, value in provider.items()}
    values |= {"model_provider": "kimi-lite", "model": target.model, "model_context_window": target.context_length}
    flags = [
        part for name, value in values.items() for part in ("-c", f"{name}={json.dumps(value, ensure_ascii=False)}")
    ]
    return Setup({"KIMI_LITE_API_KEY": target.key}, flags)


def _claude(target: Target) -> Setup:
    """All of its models are this one. A header of its own that changes with every request would spoil the cache."""
    models = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU")))
    return Setup(
        {
            "ANTHROPIC_BASE_URL": target.url,
            "ANTHROPIC_AUTH_TOKEN": target.key,
            **dict.fromkeys((*models, "CLAUDE_CODE_SUBAGENT_MODEL"), target.model),
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.max_answer),
            "API_TIMEOUT_MS": "3600000",
        }
    )


def _aider(target: Target) -> Setup:
    """A file says how long the context is, which aider asks a table of known models otherwise."""
    name = f"openai/{target.model}"
    facts = {
        "max_tokens": target.max_answer,
        "max_input_tokens": target.context_length,
        "max_output_tokens": target.max_answer,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
    }
    path = _own_folder() / "aider-models.json"
    environment = {"OPENAI_API_BASE": f"{target.url}/v1", "OPENAI_API_KEY": target.key, "AIDER_TIMEOUT": "3600"}
    arguments = ("--model", name, "--model-metadata-file", str(path))
    return Setup(environment, arguments, {path: json.dumps({name: facts}, indent=1)})


def _kimi(target: Target) -> Setup:
    """Kimi Code makes a provider of the variables that begin with KIMI_MODEL; kimi-cli, before it, of those two without
    as well."""
    own = {"BASE_URL": f"{target.url}/v1", "API_KEY": target.key}
    model = {
        **own,
        "NAME": target.model,
        "PROVIDER_TYPE": "kimi",
        "MAX_CONTEXT_SIZE": str(target.context_length),
        "CAPABILITIES": "thinking",
    }
    names = {f"KIMI_{name}": value for name, value in own.items()}
    return Setup(names | {f"KIMI_MODEL_{name}": value for name, value in model.items()})


def _qwen(target: Target) -> Setup:
    environment = {"OPENAI_BASE_URL": f"{target.url}/v1", "OPENAI_API_KEY": target.key, "OPENAI_MODEL": target.model}
    return Setup(environment, ("--auth-type", "openai"))


CLIENTS: Mapping[str, Client] = {
    "opencode": Client("npm install -g opencode-ai", _opencode),
    "codex": Client("npm install -g @openai/codex", _codex),
    "claude": Client("npm install -g @anthropic-ai/claude-code", _claude),
    "aider": Client("pip install aider-chat", _aider),
    "kimi": Client("npm install -g @moonshot-ai/kimi-code", _kimi),
    "qwen": Client("npm install -g @qwen-code/qwen-code", _qwen),
}


def launch(
    name: str, arguments: Sequence[str], options: Options, server_arguments: Sequence[str], only_prints: bool
) -> int:
    """Run the client `name`; its exit code. server_arguments: as typed for `serve`. Raises KimiLiteError."""
    client = CLIENTS[name]
    program = shutil.which(name)
    if program is None and not only_prints:
        raise KimiLiteError(f"{name} is not installed.", client.install)
    port = options.port or _free_port()
    url = f"http://{_reachable(options.host)}:{port}"
    state = _state_of(url)
    if only_prints:
        _tell(client.set_up(_target(url, options, is_up=state == "ok")), [program or name, *arguments])
        return 0
    with _server(url, state, [*server_arguments, "--port", str(port)]) as is_ours:
        setup = client.set_up(_target(url, options, is_up=True))
        command = [program, *setup.arguments, *arguments]
        _tell(setup, [program, *arguments])
        for path, text in setup.files.items():
            make_private(path.parent)
            write_private(path, text)
        environment = {**os.environ, **setup.environment}
        if not is_ours:
            sys.stdout.flush()
            os.execve(program, command, environment)
        return _run(command, environment)


def _tell(setup: Setup, command: Sequence[str]) -> None:
    """What is set, so that it can be repeated by hand; keys are not shown."""
    lines = [f"{name}={shlex.quote(_hidden(name, value))} \\" for name, value in setup.environment.items()]
    program, *rest = command
    lines.append(shlex.join([program, *setup.arguments, *rest]))
    lines += [f"with {path}" for path in setup.files]
    for line in lines:
        echo(line, to_stderr=True)


def _hidden(name: str, value: str) -> str:
    return "…" if name.endswith(("_KEY", "_TOKEN")) and value != _NO_KEY else value


def _target(url: str, options: Options, is_up: bool) -> Target:
    """What the server says of itself; before it is up, what the options say."""
    key = next((key.strip() for key in (options.api_key or "").split(",") if key.strip()), _NO_KEY)
    if not is_up:
        return Target(url, key, options.alias or "kimi-lite", options.context_length or 32_768)
    answer = httpx.get(
        f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=_ANSWERS_WITHIN_S, trust_env=False
    )
    if answer.status_code == 401:
        raise KimiLiteError(f"The server at {url} wants another key.", "Add --api-key KEY before the client's name.")
    (model,) = answer.raise_for_status().json()["data"]
    return Target(url, key, model["id"], model["context_length"])


def _health(url: str, is_ours: bool = False) -> dict[str, Any] | None:
    """What /health says; None where nothing listens, or where ours is too busy with loading to answer. KimiLiteError
    where something else listens."""
    try:
        answer = httpx.get(f"{url}/health", timeout=_ANSWERS_WITHIN_S, trust_env=False)
        body = answer.json()
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return None
    except (httpx.HTTPError, ValueError) as error:
        if is_ours and isinstance(error, httpx.TimeoutException):
            return None
        body = None
    if not isinstance(body, dict) or not {"status", "version"} <= body.keys():
        raise KimiLiteError(f"Another program answers at {url}.", "Choose another port: --port N.")
    return body


def _state_of(url: str) -> str | None:
    body = _health(url)
    return None if body is None else body["status"]


@contextmanager
def _server(url: str, state: str | None, arguments: Sequence[str]):
    """A server that is ready. Yields whether it was started here, and then ends it."""
    if state is not None:
        _wait(url, None, None)
        yield False
        return
    log = make_private(state_folder(), is_ours=True) / f"server-{url.rpartition(':')[2]}.log"
    echo(f"starting kimi-lite serve, log in {log}", to_stderr=True)
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        command = [sys.executable, "-m", "kimi_lite", "serve", *arguments]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait(url, server, log)
        yield True
    finally:
        server.terminate()
        try:
            server.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait(url: str, server: subprocess.Popen | None, log: Path | None) -> None:
    """Until the server answers requests, with its progress."""
    with LoadProgress(Console(stderr=True)) as progress:
        while True:
            if server is not None and server.poll() is not None:
                last = log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:]
                raise KimiLiteError("The server did not start:\n" + "\n".join(last), f"All of it is in {log}.")
            body = _health(url, is_ours=server is not None)
            status = "loading model" if body is None else body["status"]
            if status == "ok":
                return
            if status != "loading model" and server is None:
                raise KimiLiteError(f"The server at {url} is not well: {status}.", "Start it again.")
            if body and (loading := body.get("loading")):
                progress(loading["stage"], loading["done"], loading["total"])
            time.sleep(_POLL_S)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The client's exit code. Ctrl-C is the client's to answer; a request to end goes on to it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        client = subprocess.Popen(command, env=environment, preexec_fn=_take_interrupts)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: client.send_signal(number))
        code = client.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _reachable(host: str) -> str:
    """An address to ask a server that listens on `host`."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def _own_folder() -> Path:
    return state_folder() / "launch"
