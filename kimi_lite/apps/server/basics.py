"""Small endpoints: models, tokens, health, metrics."""

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kimi_lite import __version__
from kimi_lite.apps.server.bodies import read_body
from kimi_lite.apps.server.chat import ChatRequest
from kimi_lite.apps.server.errors import ApiError
from kimi_lite.apps.server.messages import read_messages, read_tools
from kimi_lite.apps.server.openai_models import DetokenizeBody, TokenizeBody
from kimi_lite.apps.server.state import ServerState


async def models(http: HttpRequest) -> Response:
    """GET /v1/models: the one that is loaded."""
    found = _model_for(http)
    if "anthropic-version" in http.headers:
        return JSONResponse({"data": [found], "has_more": False, "first_id": found["id"], "last_id": found["id"]})
    return JSONResponse({"object": "list", "data": [found]})


async def model(http: HttpRequest) -> Response:
    """GET /v1/models/NAME."""
    state: ServerState = http.app.state.server
    if http.path_params["name"] != state.model_name and not http.path_params["name"].startswith("claude-"):
        raise ApiError(404, f"There is no such model; this server has {state.model_name}.", "model_not_found", "model")
    return JSONResponse(_model_for(http))


def _model_for(http: HttpRequest) -> dict[str, Any]:
    """The model as the client's API describes one."""
    state: ServerState = http.app.state.server
    engine = state.service.require_ready()
    if "anthropic-version" in http.headers:
        created = datetime.fromtimestamp(int(state.started_s), UTC).isoformat().replace("+00:00", "Z")
        head = {"type": "model", "id": state.model_name, "display_name": state.model_name, "created_at": created}
        return {**head, "max_input_tokens": engine.context_length, "max_tokens": engine.context_length}
    return {
        "id": state.model_name,
        "object": "model",
        "created": int(state.started_s),
        "owned_by": "kimi-lite",
        "context_length": engine.context_length,
        "max_model_len": engine.context_length,  # vLLM's name
        "supports_reasoning": state.can_think,
        "supports_tools": state.can_call,
        "supports_image_in": engine.vision is not None,
        "supports_video_in": engine.vision is not None,
    }


async def health(http: HttpRequest) -> Response:
    """GET /health: 200 when requests are answered, 503 while the model is loading or after the engine has stopped."""
    state: ServerState = http.app.state.server
    load, service = state.service.load(), state.service
    words = {"ready": "ok", "loading": "loading model"}
    body = {"status": words.get(service.state, service.state), "version": __version__}
    body |= {"running": load.num_running, "waiting": load.num_waiting}
    if service.loading is not None:
        body["loading"] = asdict(service.loading)
    return JSONResponse(body, 200 if service.state == "ready" else 503)


async def tokenize(http: HttpRequest) -> Response:
    """POST /tokenize: ids of a text as text, or of messages as the model's prompt."""
    state: ServerState = http.app.state.server
    body = await read_body(http, TokenizeBody)
    engine = state.service.require_ready()
    if body.messages is not None:
        tools = read_tools(body.tools or [], state.can_call, engine.info.name)
        ids = await state.chats.prompt_ids(ChatRequest(read_messages(body.messages, state.media()), tools))
    else:
        text = body.content if body.content is not None else body.prompt
        if text is None:
            raise ApiError(400, "content, prompt or messages is needed.", "invalid_value", "content")
        ids = await asyncio.to_thread(engine.tokenizer.encode, text)
    tokens = [{"id": i, "piece": engine.tokenizer.decode([i])} for i in ids] if body.with_pieces else ids
    return JSONResponse({"tokens": tokens, "count": len(ids), "max_model_len": engine.context_length})


async def detokenize(http: HttpRequest) -> Response:
    """POST /detokenize: the text of ids."""
    state: ServerState = http.app.state.server
    body = await read_body(http, DetokenizeBody)
    text = await asyncio.to_thread(state.service.require_ready().tokenizer.decode, body.tokens)
    return JSONResponse({"content": text, "prompt": text})


async def metrics(http: HttpRequest) -> Response:
    """GET /metrics, in Prometheus's text format."""
    from kimi_lite.apps.server.metrics import render

    text, media_type = render(http.app.state.server)
    return PlainTextResponse(text, media_type=media_type)
