"""How the server listens: uvicorn's configuration, and connections that slow clients cannot hold for ever."""

import asyncio

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_WITHIN_S = 30.0  # from the first byte that is awaited to the end of a request's headers
READS_WITHIN_S = 60.0  # a client whose buffers are full takes something of its answer
KEEPS_IDLE_S = 75  # between two requests
MAX_HEADER_BYTES = 64 << 10


def configuration(app: ASGIApp, host: str = "127.0.0.1", port: int = 0, ends_within_s: int = 15) -> uvicorn.Config:
    """For uvicorn; `ends_within_s` is how long connections may go on after the server was told to end."""
    return uvicorn.Config(
        app,
        host,
        port,
        http=PatientProtocol,
        ws="none",
        log_level="critical",
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEPS_IDLE_S,
        timeout_graceful_shutdown=ends_within_s,
    )


class PatientProtocol(H11Protocol):
    """uvicorn's, with the timeouts it lacks."""

    _headers_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio: nothing of a request has come yet."""
        super().connection_made(transport)
        self._headers_timer = self.loop.call_later(HEADERS_WITHIN_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """asyncio."""
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        """The next request's headers may have come in part."""
        super().on_response_complete()
        self._watch_headers()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; in the middle of an answer all that is left is to hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """asyncio: the client does not read."""
        super().pause_writing()
        self._reading_timer = self._reading_timer or self.loop.call_later(READS_WITHIN_S, self.transport.abort)

    def resume_writing(self) -> None:
        """asyncio: it reads again."""
        super().resume_writing()
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio."""
        super().connection_lost(exc)
        for timer in (self._headers_timer, self._reading_timer):
            if timer is not None:
                timer.cancel()

    def _watch_headers(self) -> None:
        """The timer runs while a request's headers are awaited that have begun, and from the first moment on."""
        has_request = self.cycle is not None and not self.cycle.response_complete
        is_idle = self.timeout_keep_alive_task is not None  # which has a limit of its own
        if has_request or is_idle:
            if self._headers_timer is not None:
                self._headers_timer.cancel()
                self._headers_timer = None
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADERS_WITHIN_S, self.transport.abort)
