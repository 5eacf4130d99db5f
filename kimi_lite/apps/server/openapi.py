"""`/openapi.json`: the server described by itself, from its routes and the models of their bodies."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kimi_lite import __version__
from kimi_lite.apps.server.openai_models import Body

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_REFERENCE = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "object", "required": ["message", "type", "param", "code"], "properties": {"message": _TEXT}}
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "required": ["type", "message"], "properties": {"type": _TEXT, "message": _TEXT}},
    },
}


class ApiRoute(Route):
    """A route that knows the model of its body and the media types of its answers."""

    body: type[Body] | None = None
    media_types: tuple[str, ...] = ("application/json",)


async def openapi(http: HttpRequest) -> Response:
    """GET /openapi.json."""
    routes = tuple(route for route in http.app.routes if isinstance(route, ApiRoute))
    return JSONResponse(describe(routes))


def describe(routes: Sequence[ApiRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies = sorted({route.body for route in routes if route.body is not None}, key=lambda body: body.__name__)
    names, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        body = None if route.body is None else names[route.body, "validation"]
        path, method = _PARAMETER.sub(r"{\1}", route.path), _method(route)
        paths.setdefault(path, {})[method] = _operation(route, method, body)
    schemas = {**definitions["$defs"], "OpenAIError": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kimi-lite", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _method(route: ApiRoute) -> str:
    return next(method for method in sorted(route.methods or ()) if method != "HEAD").lower()


def _operation(route: ApiRoute, method: str, body: dict[str, Any] | None) -> dict[str, Any]:
    error = "AnthropicError" if route.path.startswith("/v1/messages") else "OpenAIError"
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=error)}}}
    answer = {media_type: {"schema": {}} for media_type in route.media_types}
    operation: dict[str, Any] = {
        "operationId": f"{method}_{re.sub(r'[^a-z]+', '_', route.path.lower()).strip('_')}",
        "summary": (route.endpoint.__doc__ or "").partition(": ")[2].strip() or route.path,
        "responses": {
            "200": {"description": "The answer", "content": answer},
            "4XX": {"description": "What is wrong with the request, or not to be had now", "content": content},
            "5XX": {"description": "The model is loading, or the server has failed", "content": content},
        },
    }
    if route.path == "/health":
        operation["responses"]["5XX"]["content"] = {"application/json": {"schema": {}}}
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                  for name in _PARAMETER.findall(route.path)]  # fmt: skip
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation
