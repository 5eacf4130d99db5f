"""Errors of the API: what a client did wrong or cannot have now, with the numbers, shaped as each API shapes them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kimi_lite.engine.service import QueueFull, Unavailable
from kimi_lite.engine.types import ContextExceeded
from kimi_lite.errors import KimiLiteError, MemoryEnded

if TYPE_CHECKING:  # `chat` is also the swarm's, which needs no package of the server's
    from starlette.datastructures import Headers
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

_OPENAI_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """`code` and `param` as OpenAI has them: a word for programs, and the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """Any exception as the API's: users' errors with their words, everything else without details."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFull):
            return cls(429, str(error), "queue_full", headers={"Retry-After": str(error.retry_after_s)})
        if isinstance(error, Unavailable):
            if error.state == "loading":
                return cls(503, str(error), "loading", headers={"Retry-After": "5"})
            if error.state == "failed":  # why is for the log: it may name files
                return cls(500, "The engine has stopped; the server's log says why.", "engine_stopped")
            return cls(503, str(error), "shutting_down")
        if isinstance(error, ContextExceeded):
            return cls(400, str(error), "context_length_exceeded")
        if isinstance(error, MemoryEnded):
            return cls(503, str(error), "out_of_memory")
        if isinstance(error, KimiLiteError):
            return cls(400, str(error), "invalid_request")
        return cls(500, "The server made a mistake; its log says which.", "internal_error")

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients expect."""
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body that Anthropic's clients expect."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def body_for(self, path: str, headers: "Headers") -> dict[str, Any]:
        """In the shape of the API that was asked."""
        return self.anthropic() if "/v1/messages" in path or "anthropic-version" in headers else self.openai()


def told(http: "HttpRequest", error: Exception) -> ApiError:
    """What the client is told of an error; what it is not told goes to the log."""
    known, log = ApiError.of(error), http.app.state.server.log
    if known.status == 500:
        log.failure(error)
    else:
        log.refusal(http.url.path, known.status, known.code, known.param)
    return known


def error_response(http: "HttpRequest", error: Exception) -> "Response":
    """The whole response to a request that failed."""
    from starlette.responses import JSONResponse

    known = told(http, error)
    return JSONResponse(known.body_for(http.url.path, http.headers), known.status, known.headers)
