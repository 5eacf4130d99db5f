"""Reads a request's body: bounded in bytes, time and depth, JSON of one object, checked by a pydantic model."""

import asyncio
import json
import re
import time
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from kimi_lite.apps.server.errors import ApiError

MAX_BODY_BYTES = 64 << 20  # images come inside
MAX_BRACKETS = 1_000_000  # lists and objects take a hundred times the bytes of their text
LARGE_BYTES = 64 << 10  # read in a thread of its own, so that others are answered meanwhile
MAX_DEPTH = 64  # of lists and objects inside each other
PIECE_WITHIN_S, BODY_WITHIN_S = 30.0, 300.0  # one piece of a body after the other, and all of it

_BRACKET_OR_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, model: type[Model]) -> Model:
    """The body as `model`; ApiError 400, 408 or 413 where it is none."""
    data = await _read(request, MAX_BODY_BYTES)
    if len(data) < LARGE_BYTES:
        return check(parse(data), model)
    return await asyncio.to_thread(lambda: check(parse(data), model))


def parse(data: bytes) -> dict:
    """JSON text of an object. Depth is counted before parsing: Python's parser recurses."""
    if (num_brackets := data.count(b"[") + data.count(b"{")) > MAX_BRACKETS:
        problem = f"The body has {num_brackets:,} opening brackets; {MAX_BRACKETS:,} are allowed."
        raise ApiError(400, problem, "invalid_json")
    if _depth(data) > MAX_DEPTH:
        raise ApiError(400, f"The body is nested deeper than {MAX_DEPTH} levels.", "invalid_json")
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}.", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body must be a JSON object, not a {type(value).__name__}.", "invalid_json")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "The body holds half of a surrogate pair, which is no text.", "invalid_json") from None
    return value


def check(value: dict, model: type[Model]) -> Model:
    """ApiError 400 that names the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))[:100]
        raise ApiError(400, f"{place or 'The body'}: {first['msg']}.", "invalid_value", place or None) from None


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    data, stream = bytearray(), request.stream()
    until_s = time.monotonic() + BODY_WITHIN_S
    try:
        while True:
            chunk = await asyncio.wait_for(anext(stream, None), min(PIECE_WITHIN_S, until_s - time.monotonic()))
            if chunk is None:
                return bytes(data)
            data += chunk
            if len(data) > limit:
                raise _too_large(limit)
    except TimeoutError:
        raise ApiError(408, "The body came too slowly.", "timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The connection ended before the body did.", "disconnected") from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body may have {limit >> 20} MiB.", "body_too_large")


def _is_branch(part: object) -> bool:
    """pydantic names the branch of a union it tried: `function-after[...]`, `list[...]`, `str`."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper())


def _depth(data: bytes) -> int:
    """The deepest nesting of brackets outside strings; looked for no deeper than is allowed."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    for match in _BRACKET_OR_STRING.finditer(data):
        found = match.group()
        if found in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif found in (b"]", b"}"):
            depth -= 1
    return deepest


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
