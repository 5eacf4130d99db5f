"""A server in this process on a port of its own, around a fake or a real engine."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from kimi_lite.apps.server.app import build_app
from kimi_lite.apps.server.state import ServerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.service import EngineService


@contextmanager
def running(open_engine: Callable[[], Engine], settings: ServerSettings | None = None, **more) -> Iterator[str]:
    """The base URL, once the model is loaded; the server has ended when the block has."""
    service = EngineService(open_engine, **more)
    app = build_app(service, settings or ServerSettings(shuts_down_within_s=1.0))
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
        assert service.is_ready.wait(60)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive(), "the server did not end"
