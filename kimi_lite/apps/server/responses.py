"""`/v1/responses`: OpenAI's items to a chat request, and its answer back as items, whole or as events.

Thinking comes as reasoning items with their text; `include: ["reasoning.encrypted_content"]` adds a form of it that
clients without a store send back (it is text in base64, not a secret). A custom tool is declared to the model as a
function with one text, `input`. Tools that run at OpenAI are left out; a request that has no others is refused.
"""

import base64
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field, StrictBool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kimi_lite.apps.server import sse
from kimi_lite.apps.server.bodies import read_body
from kimi_lite.apps.server.chat import ChatRequest, Choice, Prepared
from kimi_lite.apps.server.errors import ApiError, told
from kimi_lite.apps.server.merge import merged
from kimi_lite.apps.server.messages import read_choice, read_messages, read_tools, strict_names
from kimi_lite.apps.server.openai_chat import content_logprobs
from kimi_lite.apps.server.openai_models import Body, Effort, is_thinking_at
from kimi_lite.apps.server.outcome import Outcome, TokenCounts
from kimi_lite.apps.server.state import ServerState, client_of
from kimi_lite.apps.server.stored import Item, StoredResponse, missing
from kimi_lite.engine.types import Token
from kimi_lite.text.tool_calls import ToolCall

_CALLABLE = ("function", "custom")  # types of tools that the client runs
_SEALED = "kimi-lite:"  # in front of reasoning that a client sends back


class Reasoning(Body):
    effort: Effort | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(Body):
    format: TextFormat | None = None


class ResponsesBody(Body):
    """`/v1/responses`."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(max_length=100_000)] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    store: bool | None = None
    stream: StrictBool | None = None
    background: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


async def create(http: HttpRequest) -> Response:
    """POST /v1/responses."""
    state: ServerState = http.app.state.server
    body = await read_body(http, ResponsesBody)
    if body.background:
        raise ApiError(400, "Responses in the background are not made here.", "unsupported_value", "background")
    items = _conversation(body, state)
    tools, custom = read_response_tools(body.tools or [])
    if hosted := sorted({str(tool["type"])[:40] for tool in body.tools or [] if tool["type"] not in _CALLABLE}):
        state.log.left_out(hosted)
    chat = to_chat(body, state, items, tools, client_of(http, body.prompt_cache_key or body.user))
    prepared = await state.chats.prepare(chat)
    choice = state.chats.open(prepared.requests)[0]
    writer = _Writer(http, body, items, prepared, choice, custom)
    if body.stream:
        return sse.EventStream(writer.events(), writer.sign_of_life)
    return sse.Document(http, writer.document)


async def retrieve(http: HttpRequest) -> Response:
    """GET /v1/responses/ID."""
    state: ServerState = http.app.state.server
    return JSONResponse(state.stored.get(http.path_params["name"]).document)


async def delete(http: HttpRequest) -> Response:
    """DELETE /v1/responses/ID."""
    state: ServerState = http.app.state.server
    state.stored.remove(http.path_params["name"])
    return JSONResponse({"id": http.path_params["name"], "object": "response", "deleted": True})


def to_chat(
    body: ResponsesBody, state: ServerState, items: Sequence[Item], tools: Sequence[Mapping[str, Any]], client: str
) -> ChatRequest:
    """What the body asks for; ApiError 400 for what it cannot have."""
    engine = state.service.require_ready()
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = read_messages([*instructions, *messages_of(items)], state.media())
    if not messages:
        raise ApiError(400, "There is no input.", "invalid_value", "input")
    wanted, tools = _choice(body.tool_choice, tools)
    declared = read_tools(tools, state.can_call, engine.info.name)
    wants_logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
    effort = body.reasoning and body.reasoning.effort
    return ChatRequest(
        messages=messages,
        tools=declared,
        tool_choice=read_choice(wanted, declared),
        has_parallel_calls=body.parallel_tool_calls is not False,
        is_thinking=is_thinking_at(effort),
        sampling=state.sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            max_tokens=body.max_output_tokens,
            num_logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        ),
        temperature=body.temperature,
        strict_tools=strict_names(tools),
        json_schema=_schema(body),
        schema_place="text.format.schema",
        client=client,
    )


def _schema(body: ResponsesBody) -> dict[str, Any] | None:
    wanted = body.text and body.text.format
    if not wanted or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.schema_ is None:
        raise ApiError(400, "text.format.schema is missing.", "invalid_value", "text.format.schema")
    return wanted.schema_


def _conversation(body: ResponsesBody, state: ServerState) -> tuple[Item, ...]:
    """The items of the earlier responses and of this request, references replaced by what they stand for."""
    items: list[Item] = []
    if body.previous_response_id:
        items += state.stored.get(body.previous_response_id, "previous_response_id").items
    if isinstance(body.input, str):
        return (*items, {"type": "message", "role": "user", "content": body.input}) if body.input else tuple(items)
    has_references = any(item.get("type") == "item_reference" for item in body.input)
    known = {item.get("id"): item for item in (*state.stored.items(), *items)} if has_references else {}
    for i, item in enumerate(body.input):
        if item.get("type") == "item_reference":
            name = str(item.get("id"))
            if name not in known:
                raise missing("item", name, f"input.{i}.id")
            item = known[name]
        items.append(item)
    return tuple(items)


def messages_of(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as OpenAI's chat messages: reasoning, text and calls of one turn become one message."""
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind, place = item.get("type", "message"), f"input.{i}"
        if kind == "message":
            if item.get("role") == "assistant":
                _turn(messages, starts_with=("reasoning_content",))["content"] = item.get("content")
            else:
                messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "reasoning":
            _turn(messages, starts_with=())["reasoning_content"] = _reasoning_text(item)
        elif kind in ("function_call", "custom_tool_call"):
            turn = _turn(messages, starts_with=("reasoning_content", "content", "tool_calls"))
            turn.setdefault("tool_calls", []).append(_call(item, place))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            result = {"role": "tool", "content": _output(item.get("output"))}
            messages.append({**result, "tool_call_id": str(item.get("call_id") or "")})
        else:
            raise ApiError(400, f"{place} has the type {kind!r:.40}, which this server does not read.",
                           "invalid_value", place)  # fmt: skip
    return messages


def _turn(messages: list[dict[str, Any]], starts_with: Sequence[str]) -> dict[str, Any]:
    """The assistant's message that goes on, if it has no more than these so far; else a new one."""
    if messages and messages[-1].get("role") == "assistant" and messages[-1].keys() <= {"role", *starts_with}:
        return messages[-1]
    messages.append({"role": "assistant"})
    return messages[-1]


def _call(item: Item, place: str) -> dict[str, Any]:
    arguments = item.get("arguments")
    if item["type"] == "custom_tool_call":
        arguments = json.dumps({"input": item.get("input")}, ensure_ascii=False)
    if not isinstance(item.get("name"), str) or not isinstance(arguments, str):
        raise ApiError(400, f"{place} must be a call with a name and arguments as text.", "invalid_value", place)
    function = {"name": item["name"], "arguments": arguments}
    return {"id": str(item.get("call_id") or ""), "type": "function", "function": function}


def _output(output: object) -> object:
    """A tool's result: text, parts, or, as some clients send it, an object."""
    return json.dumps(output, ensure_ascii=False) if isinstance(output, dict) else output


def _reasoning_text(item: Item) -> str:
    """From the text, else from the form that this server sealed, else from the summary."""
    for name in ("content", "encrypted_content", "summary"):
        value = item.get(name)
        if isinstance(value, list):
            texts = [part.get("text") for part in value if isinstance(part, dict)]
            text = "".join(text for text in texts if isinstance(text, str))
        else:
            text = _opened(value) if isinstance(value, str) else ""
        if text:
            return text
    return ""


def sealed(text: str) -> str:
    """Reasoning as a client without a store sends it back."""
    return base64.b64encode((_SEALED + text).encode()).decode()


def _opened(data: str) -> str:
    """ "" where it is another server's."""
    try:
        text = base64.b64decode(data, validate=True).decode()
    except ValueError:
        return ""
    return text.removeprefix(_SEALED) if text.startswith(_SEALED) else ""


def read_response_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """Declarations as chat completions have them, and the names of those that are custom tools."""
    functions, custom = [], set()
    for i, tool in enumerate(tools):
        kind = tool.get("type")
        if kind == "function":
            fields = ("name", "description", "parameters", "strict")
            functions.append({"type": "function", "function": {f: tool[f] for f in fields if tool.get(f) is not None}})
        elif kind == "custom":
            functions.append({"type": "function", "function": _custom_function(tool)})
            custom.add(str(tool.get("name")))
        elif not isinstance(kind, str):
            raise ApiError(400, f"tools.{i} has no type.", "invalid_value", f"tools.{i}")
    if tools and not functions:
        names = ", ".join(sorted({str(tool["type"])[:40] for tool in tools}))
        raise ApiError(400, f"No tool can be called here: {names} run at OpenAI.", "unsupported_value", "tools")
    return functions, frozenset(custom)


def _custom_function(tool: Mapping[str, Any]) -> dict[str, Any]:
    description, form = str(tool.get("description") or ""), tool.get("format")
    if isinstance(form, dict) and form.get("type") == "grammar":
        description += f"\n\nThe input follows this {form.get('syntax')} grammar:\n{form.get('definition')}"
    properties = {"input": {"type": "string", "description": "The whole input, as it is."}}
    parameters = {"type": "object", "properties": properties, "required": ["input"], "additionalProperties": False}
    return {"name": tool.get("name"), "description": description.strip(), "parameters": parameters}


def _choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> tuple[object, Sequence[Mapping[str, Any]]]:
    """`allowed_tools` declares fewer; all else is as in chat completions."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return choice, tools
    allowed = choice.get("tools") if isinstance(choice.get("tools"), list) else []
    names = [tool.get("name") for tool in allowed if isinstance(tool, dict)]
    mode = choice.get("mode") if choice.get("mode") in ("auto", "required") else "auto"
    return mode, [tool for tool in tools if tool["function"].get("name") in names]


class OutputItems:
    """The items of an answer as they grow, and the events that tell of them, without their numbers."""

    def __init__(self, custom: frozenset[str], seals: bool) -> None:
        """custom: names of custom tools. seals: reasoning gets an `encrypted_content`."""
        self.items: list[dict[str, Any]] = []
        self._custom, self._seals = custom, seals
        self._is_open = False
        self._arguments = ""  # of the call that is open

    def add(self, token: Token, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """What this token adds. What came as text and was thinking stays text: events cannot be taken back."""
        if token.unsaid:
            yield from self.close()
        elif token.call is not None:
            yield from self._open_call(token.call)
            yield from self._add_arguments(token.text)
        elif token.kind == "tool_call":
            if token.call_index is not None:
                yield from self._add_arguments(token.text)
        elif token.kind == "reasoning" and token.text:
            yield from self._add_text("reasoning", token.text, [])
        elif token.text or logprobs:
            yield from self._add_text("message", token.text, logprobs)

    def close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """The open item ends, if there is one."""
        if not self._is_open:
            return
        self._is_open, item = False, self.items[-1]
        place = self._place()
        if item["type"] in ("message", "reasoning"):
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            kind = part["type"]
            yield {"type": f"response.{kind}.done", **place, "content_index": 0, "text": part["text"], **more}
            yield {"type": "response.content_part.done", **place, "content_index": 0, "part": dict(part)}
            if item["type"] == "reasoning" and self._seals:
                item["encrypted_content"] = sealed(part["text"])
        elif item["type"] == "custom_tool_call":
            item["input"] = _custom_input(self._arguments)
            kind = "response.custom_tool_call_input"
            yield {"type": f"{kind}.delta", **place, "delta": item["input"]}
            yield {"type": f"{kind}.done", **place, "input": item["input"]}
        else:
            item["arguments"] = self._arguments
            kind = "response.function_call_arguments.done"
            yield {"type": kind, **place, "name": item["name"], "arguments": item["arguments"]}
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": _copy(item)}

    def _add_text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if not self._is_open or self.items[-1]["type"] != kind:
            yield from self._open(
                {"id": f"msg_{uuid4().hex}", "type": kind, "role": "assistant", "content": []}
                if kind == "message"
                else {"id": f"rs_{uuid4().hex}", "type": kind, "summary": [], "content": []}
            )
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.items[-1]["content"].append(part if kind == "message" else {"type": "reasoning_text", "text": ""})
            part = _copy(self.items[-1]["content"][0])
            yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": part}
        part = self.items[-1]["content"][0]
        part["text"] += text
        more = {}
        if kind == "message":
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        yield {"type": f"response.{part['type']}.delta", **self._place(), "content_index": 0, "delta": text, **more}

    def _open_call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        self._arguments = ""
        if call.name in self._custom:
            item = {"id": f"ctc_{uuid4().hex}", "type": "custom_tool_call", "input": ""}
        else:
            item = {"id": f"fc_{uuid4().hex}", "type": "function_call", "arguments": ""}
        yield from self._open({**item, "call_id": call.id, "name": call.name})

    def _add_arguments(self, text: str) -> Iterator[dict[str, Any]]:
        """Of a function as they come; the one text of a custom tool is known when it has ended."""
        self._arguments += text
        if text and self.items[-1]["type"] == "function_call":
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": text}

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self.items.append({**item, "status": "in_progress"})
        self._is_open = True
        index = len(self.items) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": _copy(self.items[-1])}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def _copy(item: Mapping[str, Any]) -> dict[str, Any]:
    """As it is now: its content grows on."""
    content = [dict(part) for part in item.get("content", ())]
    return {**item, "content": content} if "content" in item else dict(item)


def _custom_input(arguments: str) -> str:
    """The one text of a custom tool; arguments that are no such object are told as they are."""
    try:
        value = json.loads(arguments)["input"]
    except (ValueError, KeyError, TypeError):
        return arguments
    return value if isinstance(value, str) else arguments


class _Writer:
    """The answer to one request as a response."""

    def __init__(
        self, http: HttpRequest, body: ResponsesBody, items: tuple[Item, ...], prepared: Prepared, choice: Choice,
        custom: frozenset[str],
    ) -> None:  # fmt: skip
        self._http, self._body, self._input, self._prepared, self._choice = http, body, items, prepared, choice
        self._state: ServerState = http.app.state.server
        self._tokenizer = self._state.service.require_ready().tokenizer
        self._outcome = Outcome()
        self._output = OutputItems(custom, "reasoning.encrypted_content" in (body.include or ()))
        self._id, self._created_s, self._num_events = f"resp_{uuid4().hex}", int(time.time()), 0

    async def document(self) -> dict[str, Any]:
        """The whole answer at once."""
        async for _ in self._told():
            pass
        return self._ended()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as it comes."""
        for name in ("created", "in_progress"):
            yield self._event({"type": f"response.{name}", "response": self._document("in_progress")})
        try:
            async for each in self._told():
                yield self._event(each)
        except Exception as error:
            known = told(self._http, error)
            failure = {"code": "server_error" if known.status >= 500 else "invalid_prompt", "message": known.message}
            yield self._event({"type": "response.failed", "response": self._document("failed", error=failure)})
            return
        finally:
            self._choice.close()
        response = self._ended()
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def sign_of_life(self) -> bytes:
        """A comment, and an event for clients that wait for one."""
        response = self._document("in_progress")
        return sse.KEEPALIVE + self._event({"type": "response.in_progress", "response": response})

    async def _told(self) -> AsyncGenerator[dict[str, Any], None]:
        source = merged([self._choice])
        try:
            async for _, token in source:
                if isinstance(token, Token):
                    self._outcome.add(token)
                    for each in self._output.add(token, content_logprobs(self._tokenizer, token)):
                        yield each
            for each in self._output.close("completed" if self._incomplete() is None else "incomplete"):
                yield each
        finally:
            await source.aclose()
            self._state.log_answer(self._prepared.num_prompt_tokens, [self._outcome.stats])

    def _incomplete(self) -> str | None:
        """Why the answer is not whole."""
        reasons = {"length": "max_output_tokens", "repetition": "repetition", "cancelled": "cancelled"}
        return reasons.get(self._outcome.finish_reason or "")

    def _ended(self) -> dict[str, Any]:
        """The whole response, which from now on can be gone on from."""
        reason = self._incomplete()
        response = self._document(
            "completed" if reason is None else "incomplete",
            incomplete_details=None if reason is None else {"reason": reason},
            usage=_usage(TokenCounts.of(self._prepared.num_prompt_tokens, [self._outcome])),
        )
        if self._body.store is not False:
            size = len(sse.dump(response)) + len(sse.dump(self._body.input))
            self._state.stored.add(StoredResponse(response, (*self._input, *response["output"]), size))
        return response

    def _document(self, status: str, **more: Any) -> dict[str, Any]:
        body, chat = self._body, self._prepared.chat
        effort = body.reasoning and body.reasoning.effort
        form = (body.text and body.text.format) or TextFormat()
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._state.model_name,
            "output": [_copy(item) for item in self._output.items],
            "parallel_tool_calls": chat.has_parallel_calls,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "store": body.store is not False,
            "temperature": self._prepared.requests[0].sampling.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool for tool in body.tools or [] if tool.get("type") in _CALLABLE],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self._prepared.requests[0].sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **more,
        }

    def _event(self, data: dict[str, Any]) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return sse.event({**data, "sequence_number": number}, data["type"])


def _usage(counts: TokenCounts) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.generated,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.generated,
    }
