"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's body to a chat request, and its answer back as content
blocks.

Any model name is accepted, since clients ask for `claude-*`. What is unknown is ignored; `cache_control` is: prompts
are cached anyway. Thinking is off unless it is asked for, as the API has it.
"""

import base64
import json
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from hashlib import blake2b
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kimi_lite.apps.server import sse
from kimi_lite.apps.server.bodies import read_body
from kimi_lite.apps.server.chat import ChatRequest, Choice, Prepared
from kimi_lite.apps.server.errors import ApiError, told
from kimi_lite.apps.server.media import Kind, MediaParts
from kimi_lite.apps.server.merge import merged
from kimi_lite.apps.server.messages import read_choice, read_tools, strict_names
from kimi_lite.apps.server.openai_models import MAX_MESSAGES, Body
from kimi_lite.apps.server.outcome import Outcome, TokenCounts
from kimi_lite.apps.server.state import ServerState, client_of
from kimi_lite.engine.types import FinishReason, SamplingParams, Token

# Claude Code writes one into the system prompt, and it differs from request to request: nothing behind it would ever
# be found in the cache. It is nothing that the model needs.
_ATTRIBUTION = re.compile(r"^[ \t]*(?:x-anthropic-[\w-]+[ \t]*:.*|(?:[\w-]+=[^;\s]*;[ \t]*)*cch=[^;\s]*;?.*)(?:\n|\Z)",
                          re.MULTILINE | re.IGNORECASE)  # fmt: skip


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Metadata(Body):
    user_id: str | None = None


class CountBody(Body):
    """`/v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesBody(CountBody):
    """`/v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    metadata: Metadata | None = None


async def messages(http: HttpRequest) -> Response:
    """POST /v1/messages."""
    state: ServerState = http.app.state.server
    body = await read_body(http, MessagesBody)
    chat = to_chat(body, state, client_of(http, body.metadata and body.metadata.user_id))
    if chat.messages[-1]["role"] == "assistant":
        problem = "The last message is the assistant's: answers cannot be begun by the client. End with a user message."
        raise ApiError(400, problem, "invalid_value", "messages")
    prepared = await state.chats.prepare(chat)
    writer = _Writer(http, body, prepared, state.chats.open(prepared.requests)[0])
    return sse.EventStream(writer.events(), _ping) if body.stream else sse.Document(http, writer.document)


async def count_tokens(http: HttpRequest) -> Response:
    """POST /v1/messages/count_tokens: of the prompt that /v1/messages would read."""
    state: ServerState = http.app.state.server
    chat = to_chat(await read_body(http, CountBody), state, "")
    return JSONResponse({"input_tokens": await state.chats.count_tokens(chat)})


def to_chat(body: CountBody, state: ServerState, client: str) -> ChatRequest:
    """What the body asks for; ApiError 400 for what it cannot have."""
    engine = state.service.require_ready()
    functions = _functions(body.tools or [])
    tools = read_tools(functions, state.can_call, engine.info.name)
    choice, thinking = body.tool_choice or ToolChoice(type="auto"), body.thinking or Thinking(type="disabled")
    wanted = {"any": "required", "tool": {"name": choice.name}}.get(choice.type, choice.type)
    return ChatRequest(
        messages=read_conversation(body.system, body.messages, state.media()),
        tools=tools,
        tool_choice=read_choice(wanted, tools),
        has_parallel_calls=not choice.disable_parallel_tool_use,
        is_thinking=thinking.type != "disabled",
        strict_tools=strict_names(functions),
        max_reasoning_tokens=thinking.budget_tokens if thinking.type == "enabled" else None,
        sampling=_sampling(body, state) if isinstance(body, MessagesBody) else SamplingParams(),
        temperature=body.temperature if isinstance(body, MessagesBody) else None,
        client=client,
    )


def read_conversation(
    system: object, messages: Sequence[dict[str, Any]], media: MediaParts
) -> tuple[dict[str, Any], ...]:
    """Messages as the template takes them, the system prompt first; ApiError 400 that names the place of what is
    wrong."""
    read: list[dict[str, Any]] = []
    if prompt := _system_text(system, "system"):
        read.append({"role": "system", "content": prompt})
    for i, message in enumerate(messages):
        role, place = message.get("role"), f"messages.{i}"
        if role == "user":
            read += _user_messages(_blocks(message.get("content"), f"{place}.content"), media)
        elif role == "assistant":
            read.append(_assistant_message(_blocks(message.get("content"), f"{place}.content")))
        elif role == "system":
            read.append({"role": "system", "content": _system_text(message.get("content"), f"{place}.content")})
        else:
            problem = f"{place}.role is {role!r:.40}; it must be user, assistant or system."
            raise ApiError(400, problem, "invalid_value", f"{place}.role")
    return tuple(read)


def without_attribution(text: str) -> str:
    """A system prompt without the lines in which a client writes something new every time."""
    return _ATTRIBUTION.sub("", text)


def _system_text(content: object, place: str) -> str:
    texts = [without_attribution(block["text"]) for _, block in _blocks(content, place) if _is_text(block, place)]
    return "\n\n".join(text for text in texts if text.strip())


def _is_text(block: dict[str, Any], place: str) -> bool:
    if block["type"] != "text":
        raise ApiError(400, f"{place} may hold text only, not {block['type']!r:.40}.", "invalid_value", place)
    return True


def _blocks(content: object, place: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, block) of each content block; a text stands for a block of it. Texts in them are texts."""
    if content is None:
        return []
    if isinstance(content, str):
        return [(place, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise ApiError(400, f"{place} must be a text or a list of content blocks.", "invalid_value", place)
    blocks = []
    for i, block in enumerate(content):
        where = f"{place}.{i}"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise ApiError(400, f"{where} must be a content block with a type.", "invalid_value", where)
        wanted = {"text": "text", "thinking": "thinking", "tool_use": "name", "tool_result": "tool_use_id"}
        field = wanted.get(block["type"])
        if field is not None and not isinstance(block.get(field), str):
            raise ApiError(400, f"{where}.{field} must be a text.", "invalid_value", f"{where}.{field}")
        blocks.append((where, block))
    return blocks


def _user_messages(blocks: list[tuple[str, dict[str, Any]]], media: MediaParts) -> list[dict[str, Any]]:
    """Results of tools are messages of their own; the text and images around them stay in their places."""
    read: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for place, block in blocks:
        if block["type"] == "tool_result":
            if parts:
                read.append({"role": "user", "content": _joined(parts)})
                parts = []
            read.append({"role": "tool", "content": _result(place, block, media), "tool_call_id": block["tool_use_id"]})
        else:
            parts.append(_part(place, block, media))
    if parts or not read:
        read.append({"role": "user", "content": _joined(parts)})
    return read


def _result(place: str, block: dict[str, Any], media: MediaParts) -> str | list[dict[str, Any]]:
    parts = [_part(where, part, media) for where, part in _blocks(block.get("content"), f"{place}.content")]
    return _joined(parts) or ("The tool failed." if block.get("is_error") is True else "")


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One text; a list of parts only where there are images. Texts that follow each other are paragraphs."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": f"{joined[-1]['text']}\n\n{part['text']}"}
        else:
            joined.append(part)
    if all(part["type"] == "text" for part in joined):
        return joined[0]["text"] if joined else ""
    return joined


def _part(place: str, block: dict[str, Any], media: MediaParts) -> dict[str, Any]:
    """A block of a user's or a tool's as OpenAI has it."""
    if block["type"] in ("image", "video"):
        return _shown(place, block["type"], block.get("source"), media)
    return {"type": "text", "text": _text(place, block)}


def _shown(place: str, kind: Kind, source: object, media: MediaParts) -> dict[str, Any]:
    media.count(kind, place)
    if isinstance(source, dict):
        match source.get("type"):
            case "base64" if isinstance(source.get("data"), str):
                return media.data(kind, f"data:{source.get('media_type')};base64,{source['data']}", place)
            case "url" if isinstance(source.get("url"), str):
                return media.data(kind, source["url"], place)
            case "file" if isinstance(source.get("file_id"), str):
                return media.file(kind, source["file_id"], place)
    raise ApiError(400, f"{place}.source must be base64 data, or a file_id.", "invalid_value", f"{place}.source")


def _text(place: str, block: dict[str, Any]) -> str:
    """The text of a block of a user's or a tool's."""
    kind, source = block["type"], block.get("source")
    if kind == "text":
        return block["text"]
    if kind == "document" and isinstance(source, dict) and isinstance(source.get("data"), str):
        if source.get("type") == "text":
            return "\n".join(part for part in (block.get("title"), source["data"]) if isinstance(part, str) and part)
        raise ApiError(400, f"{place} is a document that is not plain text, which cannot be read.", "invalid_value")
    if kind == "tool_reference" and isinstance(block.get("tool_name"), str):
        return block["tool_name"]
    raise ApiError(400, f"{place} has the type {kind!r:.40}, which this server does not read.", "invalid_value", place)


def _assistant_message(blocks: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Text and thinking joined, calls as OpenAI has them. Thinking that was made unreadable elsewhere is left out."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for place, block in blocks:
        if block["type"] == "text":
            message["content"] += block["text"]
        elif block["type"] == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + block["thinking"]
        elif block["type"] == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block["name"], "arguments": arguments}
            calls.append({"id": str(block.get("id") or ""), "type": "function", "function": function})
        elif block["type"] != "redacted_thinking":
            problem = f"{place} has the type {block['type']!r:.40}, which this server does not read."
            raise ApiError(400, problem, "invalid_value", place)
    return {**message, "tool_calls": calls} if calls else message


def _functions(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools of the client, as OpenAI declares them."""
    functions = []
    for i, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            problem = (
                f"tools.{i} is {tool['type']!r:.40}, which runs at Anthropic; this server has its client's tools only."
            )
            raise ApiError(400, problem, "invalid_value", f"tools.{i}")
        function = {
            "name": tool.get("name"),
            "description": tool.get("description") or "",
            "strict": tool.get("strict"),
        }
        functions.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
    return functions


def _sampling(body: MessagesBody, state: ServerState) -> SamplingParams:
    return state.sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        max_tokens=body.max_tokens,
        stop=tuple(text for text in body.stop_sequences or () if text),
    )


class ContentBlocks:
    """The content blocks of an answer as they grow, and the events that tell of them."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._arguments = ""  # of the call that is open
        self._is_open = False

    def add(self, token: Token) -> Iterator[dict[str, Any]]:
        """What this token adds. A stream cannot take back: what came as text and was thinking stays text there."""
        if token.unsaid:
            yield from self.close()
            self._make_thinking()
        elif token.call is not None:
            yield from self._open({"type": "tool_use", "id": token.call.id, "name": token.call.name, "input": {}})
            yield from self._add_arguments(token.text)
        elif token.kind == "tool_call":
            if token.call_index is not None:
                yield from self._add_arguments(token.text)
        elif token.text:
            yield from self._add_text("thinking" if token.kind == "reasoning" else "text", token.text)

    def close(self) -> Iterator[dict[str, Any]]:
        """The open block ends, if there is one."""
        if not self._is_open:
            return
        self._is_open, block = False, self.content[-1]
        if block["type"] == "thinking":
            block["signature"] = _signature(block["thinking"])
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        elif block["type"] == "tool_use":
            block["input"], self._arguments = _input(self._arguments), ""
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _add_text(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if not self._is_open or self.content[-1]["type"] != kind:
            yield from self._open({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self.content[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _add_arguments(self, text: str) -> Iterator[dict[str, Any]]:
        if text:
            self._arguments += text
            yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _open(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self.content.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}

    def _make_thinking(self) -> None:
        for i, block in enumerate(self.content):
            if block["type"] == "text":
                text = block["text"]
                self.content[i] = {"type": "thinking", "thinking": text, "signature": _signature(text)}


def _signature(thinking: str) -> str:
    """Clients keep thinking only with a signature; it is not checked when it comes back."""
    return base64.b64encode(blake2b(thinking.encode(), digest_size=24).digest()).decode()


def _input(arguments: str) -> dict[str, Any]:
    """A document must hold an object; what the model wrote instead is told as it is."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"malformed_arguments": arguments}


class _Writer:
    """The answer to one request, in Anthropic's shape."""

    def __init__(self, http: HttpRequest, body: MessagesBody, prepared: Prepared, choice: Choice) -> None:
        self._http, self._body, self._prepared, self._choice = http, body, prepared, choice
        self._state: ServerState = http.app.state.server
        self._id, self._outcome, self._blocks = f"msg_{uuid4().hex}", Outcome(), ContentBlocks()

    async def document(self) -> dict[str, Any]:
        """The whole answer at once."""
        async for _ in self._told():
            pass
        return self._message(self._blocks.content, self._ending(), self._usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as it comes. How much of the prompt was cached is known at the end only."""
        first = self._message([], {"stop_reason": None, "stop_sequence": None}, self._usage())
        yield _event({"type": "message_start", "message": first}) + _ping()
        try:
            async for each in self._told():
                yield _event(each)
        except Exception as error:
            yield _event(told(self._http, error).anthropic())
            return
        finally:
            self._choice.close()
        yield _event({"type": "message_delta", "delta": self._ending(), "usage": self._usage()})
        yield _event({"type": "message_stop"})

    async def _told(self) -> AsyncGenerator[dict[str, Any], None]:
        source = merged([self._choice])
        try:
            async for _, token in source:
                if isinstance(token, Token):
                    self._outcome.add(token)
                    for each in self._blocks.add(token):
                        yield each
            for each in self._blocks.close():
                yield each
        finally:
            await source.aclose()
            self._state.log_answer(self._prepared.num_prompt_tokens, [self._outcome.stats])

    def _message(self, content: list[dict[str, Any]], ending: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._state.model_name}
        return {**head, "content": content, **ending, "usage": usage}

    def _ending(self) -> dict[str, Any]:
        outcome, limit = self._outcome, self._body.max_tokens
        reason = _STOP_REASONS.get(outcome.finish_reason or "stop", outcome.finish_reason)
        if outcome.stopped_by is not None:
            reason = "stop_sequence"
        elif reason == "max_tokens" and outcome.stats and outcome.stats.generated_tokens < limit:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": outcome.stopped_by}

    def _usage(self) -> dict[str, Any]:
        counts = TokenCounts.of(self._prepared.num_prompt_tokens, [self._outcome])
        return {
            "input_tokens": counts.prompt - counts.cached,  # Anthropic counts what was cached apart
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.cached,
            "output_tokens": counts.generated,
        }


_STOP_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn", "cancelled": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
}  # fmt: skip # "repetition" says what it means


def _event(data: dict[str, Any]) -> bytes:
    return sse.event(data, data["type"])


def _ping() -> bytes:
    return _event({"type": "ping"})
