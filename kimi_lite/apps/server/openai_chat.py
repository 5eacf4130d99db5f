"""`/v1/chat/completions`: OpenAI's body to a chat request, and its answers back, in one document or as chunks."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kimi_lite.apps.server import sse
from kimi_lite.apps.server.bodies import read_body
from kimi_lite.apps.server.chat import ChatRequest, Choice, Prepared
from kimi_lite.apps.server.errors import ApiError, told
from kimi_lite.apps.server.merge import merged
from kimi_lite.apps.server.messages import read_choice, read_messages, read_tools, strict_names
from kimi_lite.apps.server.openai_models import ChatBody, Sampled, is_thinking_at
from kimi_lite.apps.server.outcome import Outcome, TokenCounts
from kimi_lite.apps.server.state import ServerState, client_of
from kimi_lite.engine.service import Progress
from kimi_lite.engine.types import FinishReason, Logprobs, SamplingParams, Stats, Token
from kimi_lite.text.tokenizer import Tokenizer


async def chat_completions(http: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    state: ServerState = http.app.state.server
    body = await read_body(http, ChatBody)
    chat = to_chat(body, state, client_of(http, body.prompt_cache_key or body.user))
    prepared = await state.chats.prepare(chat)
    writer = _Writer(http, body, prepared, state.chats.open(prepared.requests))
    return sse.EventStream(writer.chunks(), writer.sign_of_life) if body.stream else sse.Document(http, writer.document)


def to_chat(body: ChatBody, state: ServerState, client: str) -> ChatRequest:
    """What the body asks for; ApiError 400 for what it cannot have."""
    engine = state.service.require_ready()
    tools = [*(body.tools or []), *({"type": "function", "function": f} for f in body.functions or [])]
    declared = read_tools(tools, state.can_call, engine.info.name)
    choice = body.tool_choice if body.tool_choice is not None else body.function_call
    return ChatRequest(
        messages=read_messages(body.messages, state.media()),
        tools=declared,
        tool_choice=read_choice(choice, declared),
        has_parallel_calls=body.parallel_tool_calls is not False,
        is_thinking=_is_thinking(body),
        keeps_reasoning=_keeps_reasoning(body),
        max_reasoning_tokens=_reasoning_tokens(body),
        sampling=sampling_of(body, state, body.max_completion_tokens or body.max_tokens, _num_logprobs(body)),
        temperature=body.temperature,
        num_choices=body.n or 1,
        strict_tools=strict_names(tools),
        json_schema=_schema(body),
        client=client,
    )


def sampling_of(body: Sampled, state: ServerState, max_tokens: int | None, num_logprobs: int | None) -> SamplingParams:
    """The sampling fields; a chat's temperature is the mode's where none is given, which `Chats` fills in."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return state.sampling(
        temperature=body.temperature,
        top_k=None if body.top_k is None else max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty or body.repeat_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=_biases(body.logit_bias or {}, state.service.require_ready().tokenizer.vocab_size),
        num_logprobs=num_logprobs,
        seed=None if body.seed is None else body.seed % (1 << 63),
        max_tokens=max_tokens,
        stop=tuple(text for text in stop if text),
        ignore_eos=body.ignore_eos,
    )


def _biases(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    unknown = [name for name in biases if not (name.isdecimal() and len(name) < 10 and int(name) < vocab_size)]
    if unknown:
        problem = f"logit_bias must have token ids as keys, from 0 to {vocab_size - 1}; one is {unknown[0][:40]!r}."
        raise ApiError(400, problem, "invalid_value", "logit_bias")
    return tuple((int(token_id), bias) for token_id, bias in biases.items())


def _is_thinking(body: ChatBody) -> bool | None:
    """The vendor's field first, then vLLM's and SGLang's, then OpenAI's effort."""
    if body.thinking is not None:
        return body.thinking.type == "enabled"
    switches = body.chat_template_kwargs or {}
    for name in ("thinking", "enable_thinking"):
        if isinstance(switches.get(name), bool):
            return switches[name]
    return is_thinking_at(body.reasoning_effort)


def _keeps_reasoning(body: ChatBody) -> bool:
    switches = body.chat_template_kwargs or {}
    return bool(body.thinking and body.thinking.keep) or switches.get("preserve_thinking") is True


def _reasoning_tokens(body: ChatBody) -> int | None:
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        return body.thinking.budget_tokens
    budget = body.thinking_budget_tokens
    return None if budget is None or budget < 0 else budget


def _num_logprobs(body: ChatBody) -> int | None:
    return (body.top_logprobs or 0) if body.logprobs else None


def _schema(body: ChatBody) -> dict[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    schema = wanted.json_schema and wanted.json_schema.schema_
    if schema is None:
        raise ApiError(400, "response_format.json_schema.schema is missing.", "invalid_value", "response_format")
    return schema


class _Writer:
    """The answer to one request, in OpenAI's shape."""

    def __init__(self, http: HttpRequest, body: ChatBody, prepared: Prepared, choices: Sequence[Choice]) -> None:
        state: ServerState = http.app.state.server
        self._http, self._state, self._body, self._prepared, self._choices = http, state, body, prepared, choices
        self._tokenizer = state.service.require_ready().tokenizer
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": state.model_name}
        self._started_s = time.monotonic()
        self._num_cached: dict[int, int] = {}  # tokens of the prompt, by choice, as its first progress said
        starts = prepared.requests[0].starts_in_reasoning
        self._outcomes = [Outcome(reasoning="" if starts else None) for _ in choices]

    async def document(self) -> dict[str, Any]:
        """The whole answer at once."""
        try:
            async for i, event in merged(self._choices):
                if isinstance(event, Token):
                    self._add(i, event)
        finally:
            self._end()
        choices = [self._whole(i, outcome) for i, outcome in enumerate(self._outcomes)]
        whole = {**self._head, "object": "chat.completion", "choices": choices}
        return {**whole, "usage": self._usage(), **self._timings()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer as it comes. The first chunk goes out at once."""
        for i in range(len(self._outcomes)):
            yield self._chunk(i, {"role": "assistant", "content": ""})
        try:
            async for i, event in merged(self._choices):
                if isinstance(event, Progress):
                    if self._body.return_progress:
                        yield self._progress(i, event)
                    continue
                self._add(i, event)
                for chunk in self._chunks_of(i, event):
                    yield chunk
        except Exception as error:
            yield sse.event(told(self._http, error).openai())
            return
        finally:
            self._end()
        if self._body.stream_options and self._body.stream_options.include_usage:
            last = {**self._head, "object": "chat.completion.chunk", "choices": []}
            yield sse.event({**last, "usage": self._usage(), **self._timings()})
        yield sse.DONE

    def sign_of_life(self) -> bytes:
        """While nothing is to be said: a comment, and an empty delta for clients that count chunks."""
        return sse.KEEPALIVE + self._chunk(0, {})

    def _add(self, i: int, token: Token) -> None:
        if token.logprobs is not None and self._tokenizer.is_control(token.logprobs.chosen.token_id):
            token = replace(token, logprobs=None)  # the end is no part of the message
        self._outcomes[i].add(token)

    def _chunks_of(self, i: int, token: Token) -> Iterator[bytes]:
        """Text of its kind, and at the end a finish reason alone. What was said already is not said again as
        reasoning: a stream cannot take back."""
        delta: dict[str, Any] = {}
        if token.kind == "tool_call":
            delta = _call_delta(token)
        elif token.text and not token.unsaid:
            delta = {"reasoning_content" if token.kind == "reasoning" else "content": token.text}
        logprobs = content_logprobs(self._tokenizer, token)
        if delta or logprobs:
            yield self._chunk(i, delta, None, logprobs)
        if token.finish_reason is not None:
            yield self._chunk(i, {}, finish_reason(token.finish_reason))

    def _chunk(
        self, i: int, delta: dict[str, Any], reason: str | None = None, logprobs: list[dict[str, Any]] | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": i, "delta": delta, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = {"content": logprobs}
        return sse.event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def _progress(self, i: int, event: Progress) -> bytes:
        """As llama-server tells it: an empty delta with how far the prompt is."""
        progress = {
            "total": event.total_tokens,
            "cache": self._num_cached.setdefault(i, event.done_tokens),
            "processed": event.done_tokens,
            "time_ms": round(1e3 * (time.monotonic() - self._started_s)),
        }
        choice = {"index": i, "delta": {}, "finish_reason": None}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return sse.event({**chunk, "prompt_progress": progress})

    def _whole(self, i: int, outcome: Outcome) -> dict[str, Any]:
        content = outcome.content if outcome.content or not outcome.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if outcome.reasoning is not None:
            message["reasoning_content"] = outcome.reasoning
        if outcome.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in outcome.calls
            ]
        entries = [logprob_of(self._tokenizer, each) for each in outcome.logprobs]
        whole = {"index": i, "message": message, "finish_reason": finish_reason(outcome.finish_reason or "stop")}
        return {**whole, "logprobs": {"content": entries} if self._body.logprobs else None}

    def _usage(self) -> dict[str, Any]:
        return usage(TokenCounts.of(self._prepared.num_prompt_tokens, self._outcomes))

    def _timings(self) -> dict[str, Any]:
        stats = self._outcomes[0].stats
        return {} if stats is None else {"timings": timings(stats)}

    def _end(self) -> None:
        """However it ended: nothing goes on, and the log has its line."""
        for choice in self._choices:
            choice.close()
        self._state.log_answer(self._prepared.num_prompt_tokens, [outcome.stats for outcome in self._outcomes])


def _call_delta(token: Token) -> dict[str, Any]:
    """{} where it adds nothing: a call that cannot be used is not told."""
    if token.call is not None:
        function = {"name": token.call.name, "arguments": token.text}
        call = {"index": token.call_index, "id": token.call.id, "type": "function", "function": function}
        return {"tool_calls": [call]}
    if token.text and token.call_index is not None:
        return {"tool_calls": [{"index": token.call_index, "function": {"arguments": token.text}}]}
    return {}


def finish_reason(reason: FinishReason) -> str:
    """OpenAI's word where it has one; the others ("repetition") say what they mean."""
    return "stop" if reason == "cancelled" else reason


def content_logprobs(tokenizer: Tokenizer, token: Token) -> list[dict[str, Any]]:
    """Of a token of the answer's text, also where that is not known yet; else none."""
    logprobs = token.logprobs
    if logprobs is None or token.kind != "content" or tokenizer.is_control(logprobs.chosen.token_id):
        return []
    return [logprob_of(tokenizer, logprobs)]


def logprob_of(tokenizer: Tokenizer, logprobs: Logprobs) -> dict[str, Any]:
    """One token's log-probability and its alternatives'."""

    def entry(token_id: int, value: float) -> dict[str, Any]:
        data = tokenizer.decode_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}

    return {**entry(*logprobs.chosen), "top_logprobs": [entry(*top) for top in logprobs.top]}


def usage(counts: TokenCounts) -> dict[str, Any]:
    """OpenAI's, with the vendor's `cached_tokens`."""
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.generated,
        "total_tokens": counts.prompt + counts.generated,
        "cached_tokens": counts.cached,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning},
    }


def timings(stats: Stats) -> dict[str, Any]:
    """llama-server's names."""
    num_read = stats.prompt_tokens - stats.cached_tokens
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": num_read,
        "prompt_ms": round(1e3 * stats.prompt_s, 3),
        "prompt_per_second": stats.prompt_tok_s,
        "predicted_n": stats.generated_tokens,
        "predicted_ms": round(1e3 * stats.generation_s, 3),
        "predicted_per_second": stats.generation_tok_s,
    }
