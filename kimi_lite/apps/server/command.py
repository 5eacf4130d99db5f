"""`kimi-lite serve`: checks what can be checked, listens, loads, and says where it listens and what it serves."""

import asyncio
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from kimi_lite import __version__
from kimi_lite.apps.model_path import find_model
from kimi_lite.apps.opening import DEMO_REMARKS, check_before_loading, line_width, wrapped
from kimi_lite.apps.progress import LoadProgress
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.engine import Engine, OnProgress
from kimi_lite.engine.loader import load
from kimi_lite.engine.planning import situation_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options, unused_options
from kimi_lite.terminal import Console, echo, show_plain

if TYPE_CHECKING:
    import uvicorn

    from kimi_lite.engine.service import EngineService

_PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance", "python_multipart")
_LOADED_S = 0.05  # how soon it is seen that the model is loaded
_DRAIN_S = 10.0  # running answers have so long to end


def start_server(options: Options, open_engine: Callable[[], Engine] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Raises KimiLiteError for what would fail later, before the model is loaded.

    open_engine: another engine than the options' model."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"The server needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed."
        raise KimiLiteError(problem, "pip install 'kimi-lite[server]'")
    _require_key(options)
    check_before_loading(options)
    with _listen(options.host, options.port) as listener:
        asyncio.run(_serve(options, listener, open_engine))


async def _serve(options: Options, listener: socket.socket, open_engine: Callable[[], Engine] | None) -> None:
    import uvicorn

    from kimi_lite.apps.server.app import build_app
    from kimi_lite.apps.server.connection import configuration
    from kimi_lite.apps.server.log import set_up
    from kimi_lite.engine.service import EngineService

    status = Console(stderr=True)
    open_engine = open_engine or (lambda: _open_engine(options, status, service.on_progress))
    service = EngineService(open_engine, options.max_waiting)
    app = build_app(service, settings_of(options), set_up(options.log_level, options.has_json_log))
    server = uvicorn.Server(configuration(app, ends_within_s=int(_DRAIN_S) + 5))
    server.capture_signals = nullcontext  # uvicorn would put its own handlers in the place of these
    ending = _Ending(service, server)
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number, ending.on_signal, number)
    serving = asyncio.create_task(server.serve([listener]))
    while not serving.done() and not service.is_ready.is_set():
        await asyncio.sleep(_LOADED_S)
    if service.engine is None and service.failure is not None:  # one that fails later goes on telling why
        server.should_exit = True
        await serving
        raise service.failure
    if not serving.done():
        _say_ready(service.engine, options, listener, status)
    await serving


class _Ending:
    """What signals do: the first lets running answers end in time and saves what is to be saved, the second ends the
    process as it is; files are written whole or not at all."""

    def __init__(self, service: "EngineService", server: "uvicorn.Server") -> None:
        self._service, self._server = service, server
        self._task: asyncio.Task | None = None

    def on_signal(self, number: int) -> None:
        if self._task is not None:
            os._exit(128 + number)
        if self._service.load().num_running:
            echo(f"ending: answers have {_DRAIN_S:.0f} s; a second signal ends at once", to_stderr=True)
        self._server.should_exit = True
        self._task = asyncio.get_running_loop().create_task(self._service.close(_DRAIN_S))


def settings_of(options: Options):
    """What of the options is about serving."""
    from kimi_lite.apps.server.security import LOCAL_HOSTS
    from kimi_lite.apps.server.state import ServerSettings

    names = (*LOCAL_HOSTS, socket.gethostname().lower(), options.host.lower(), *options.server_names)
    keys = tuple(key.strip() for key in (options.api_key or "").split(",") if key.strip())
    is_open = "*" in options.server_names or not _is_local(options.host)  # a key protects what is not local
    return ServerSettings(
        model_name=options.alias,
        api_keys=keys,
        hosts=None if is_open else names,
        origins=options.origins,
        max_images=options.max_images,
        has_loop_guard=options.has_loop_guard,
        answers=AnswerSettings.from_options(options),
        shuts_down_within_s=_DRAIN_S,
    )


def _open_engine(options: Options, status: Console, on_progress: OnProgress) -> Engine:
    with LoadProgress(status) as progress:

        def report(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            on_progress(stage, done, total)

        return load(find_model(options, progress), options, report)


def _say_ready(engine: Engine, options: Options, listener: socket.socket, status: Console) -> None:
    """The panel of the plan, and the address on a line of its own, for people and scripts."""
    from kimi_lite.plan.view import start_panel

    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    width = line_width(status)
    num_running = engine.plan.situation.num_running if engine.plan else options.num_sequences
    mode = "one request at a time" if num_running == 1 else f"{num_running} requests at a time"
    lines = start_panel(engine.plan, mode, f"{address}/v1", width=width) if engine.plan else []
    lines += [*(engine.plan.warnings if engine.plan else ())]
    if engine.plan:
        lines += unused_options(options, replace(situation_of(engine.plan, options), is_serving=True))
    lines += DEMO_REMARKS if options.is_demo and engine.plan else ()
    for line in lines:
        show_plain(status, wrapped(line, width))
    echo(f"kimi-lite {__version__} listens on {address}", to_stderr=True)
    sys.stderr.flush()


def _require_key(options: Options) -> None:
    """A server that others can reach wants a key, or the word that it shall have none."""
    if _is_local(options.host) or options.api_key or options.is_insecure:
        return
    raise KimiLiteError(
        f"{options.host} can be reached from other machines, and there is no --api-key.",
        "Add --api-key KEY, or --insecure if all of them may use it.",
    )


def _is_local(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded: a port in use is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise KimiLiteError(f"{host} is no address of this machine: {error.strerror or error}.") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        problem = f"Port {port} of {host} cannot be had: {(error.strerror or str(error)).lower()}."
        raise KimiLiteError(problem, "Try --port 0 for a free one, or another number.") from error
    return listener
