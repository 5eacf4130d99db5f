"""The server as an ASGI application: routes, errors, start and end."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from kimi_lite.apps.server import anthropic_messages, basics, completions, files, openapi, page, responses
from kimi_lite.apps.server.chat import Chats
from kimi_lite.apps.server.errors import ApiError, error_response
from kimi_lite.apps.server.log import AnswerLog
from kimi_lite.apps.server.openai_chat import chat_completions
from kimi_lite.apps.server.openai_models import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from kimi_lite.apps.server.openapi import ApiRoute
from kimi_lite.apps.server.security import Guard
from kimi_lite.apps.server.state import ServerSettings, ServerState
from kimi_lite.engine.loop_guard import LoopLimits
from kimi_lite.engine.service import EngineService

Endpoint = Callable[[HttpRequest], Awaitable[Response]]
_STREAMED = ("application/json", "text/event-stream")


def build_app(service: EngineService, settings: ServerSettings, log: AnswerLog | None = None) -> Starlette:
    """The application. It starts the service when it starts, and closes it when it ends."""
    log = log or AnswerLog()
    service.on_failure = log.failure
    chats = Chats(service, LoopLimits() if settings.has_loop_guard else None, answers=settings.answers)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close(settings.shuts_down_within_s)
        app.state.server.files.close()

    guard = Middleware(Guard, api_keys=settings.api_keys, hosts=settings.hosts, origins=settings.origins)
    handlers = {HTTPException: _on_http_error, Exception: _on_error}
    app = Starlette(routes=routes(), middleware=[guard], exception_handlers=handlers, lifespan=lifespan)
    app.state.server = ServerState(service, settings, chats, log)
    return app


def routes() -> list[Route]:
    """Every endpoint."""
    return [
        _route("/", page.page, media_types=("text/html",)),
        _route("/status", page.status),
        _route("/v1/chat/completions", chat_completions, "POST", ChatBody, _STREAMED),
        _route("/v1/completions", completions.completions, "POST", CompletionBody, _STREAMED),
        _route("/v1/responses", responses.create, "POST", responses.ResponsesBody, _STREAMED),
        _route("/v1/responses/{name}", responses.retrieve),
        _route("/v1/responses/{name}", responses.delete, "DELETE"),
        _route("/v1/messages", anthropic_messages.messages, "POST", anthropic_messages.MessagesBody, _STREAMED),
        _route("/v1/messages/count_tokens", anthropic_messages.count_tokens, "POST", anthropic_messages.CountBody),
        _route("/v1/files", files.upload, "POST"),
        _route("/v1/files", files.list_files),
        _route("/v1/files/{name}", files.retrieve),
        _route("/v1/files/{name}", files.delete, "DELETE"),
        _route("/v1/models", basics.models),
        _route("/v1/models/{name:path}", basics.model),
        _route("/tokenize", basics.tokenize, "POST", TokenizeBody),
        _route("/detokenize", basics.detokenize, "POST", DetokenizeBody),
        _route("/health", basics.health),
        _route("/metrics", basics.metrics, media_types=("text/plain",)),
        _route("/openapi.json", openapi.openapi),
    ]


def _route(
    path: str,
    endpoint: Endpoint,
    method: str = "GET",
    body: type[Body] | None = None,
    media_types: tuple[str, ...] = ("application/json",),
) -> Route:
    async def answer(http: HttpRequest) -> Response:
        started_s = time.monotonic()
        try:
            response = await endpoint(http)
        except Exception as error:
            response = error_response(http, error)
        seconds = time.monotonic() - started_s
        http.app.state.server.log.request(http.method, http.url.path, response.status_code, seconds)
        return response

    answer.__doc__ = endpoint.__doc__
    route = ApiRoute(path, answer, methods=[method], name=endpoint.__name__)
    route.body, route.media_types = body, media_types
    return route


async def _on_http_error(http: HttpRequest, error: HTTPException) -> Response:
    missing = "There is no such endpoint."
    if http.url.path.startswith("/v1/v1/"):
        missing += " The base URL of Anthropic's clients ends before /v1."
    words = {404: missing, 405: "This endpoint takes another method."}
    detail = words.get(error.status_code, str(error.detail))
    return error_response(http, ApiError(error.status_code, detail, headers=dict(error.headers or {})))


async def _on_error(http: HttpRequest, error: Exception) -> Response:
    return error_response(http, error)
