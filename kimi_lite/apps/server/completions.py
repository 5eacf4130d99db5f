"""`/v1/completions`: texts or token ids to go on with. No template, no reasoning, no calls: what the model says is the
text."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from uuid import uuid4

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kimi_lite.apps.server import sse
from kimi_lite.apps.server.bodies import read_body
from kimi_lite.apps.server.chat import Choice
from kimi_lite.apps.server.errors import ApiError, told
from kimi_lite.apps.server.merge import merged
from kimi_lite.apps.server.openai_chat import finish_reason, sampling_of, timings, usage
from kimi_lite.apps.server.openai_models import CompletionBody
from kimi_lite.apps.server.outcome import Outcome, TokenCounts
from kimi_lite.apps.server.state import ServerState, client_of
from kimi_lite.engine.types import Logprob, Logprobs, Request, Token
from kimi_lite.text.tokenizer import Tokenizer

MAX_CHOICES = 64  # prompts times n
DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(http: HttpRequest) -> Response:
    """POST /v1/completions."""
    state: ServerState = http.app.state.server
    body = await read_body(http, CompletionBody)
    client = client_of(http, body.prompt_cache_key or body.user)
    requests = await asyncio.to_thread(to_requests, body, state, client)
    writer = _Writer(http, body, requests, state.chats.open(requests))
    if body.stream:
        return sse.EventStream(writer.chunks(), writer.sign_of_life)
    return sse.Document(http, writer.document)


def to_requests(body: CompletionBody, state: ServerState, client: str) -> list[Request]:
    """One for each choice, the choices of a prompt together; ApiError 400 for what cannot be had."""
    if body.suffix:
        raise ApiError(400, "The model only goes on with a text: it fills no gaps (suffix).", "unsupported", "suffix")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "The prompt's own log-probabilities cannot be had (echo with logprobs).", "unsupported",
                       "logprobs")  # fmt: skip
    if (body.best_of or 1) > (body.n or 1):
        raise ApiError(400, "best_of may not be more than n.", "unsupported", "best_of")
    engine = state.service.require_ready()
    prompts = _prompts(body.prompt, engine.tokenizer)
    num_choices = len(prompts) * (body.n or 1)
    if num_choices > MAX_CHOICES:
        raise ApiError(400, f"The prompts and n ask for {num_choices} texts; {MAX_CHOICES} are allowed.", "too_many")
    max_tokens = body.max_tokens or state.settings.answers.sampling.max_tokens or DEFAULT_MAX_TOKENS
    sampling = sampling_of(body, state, max_tokens, body.logprobs)
    requests = []
    for ids in prompts:
        for i in range(body.n or 1):
            requests.append(Request(uuid4().hex, ids, sampling.with_seed_of(i), client=client, is_plain=True))
            engine.require_room(requests[-1])
    return requests


def _prompts(prompt: str | list[str] | list[int] | list[list[int]], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Token ids of each; text never becomes control tokens, ids may be any there are."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    prompts = [tuple(tokenizer.encode(each) if isinstance(each, str) else each) for each in prompt]
    if not prompts or not all(prompts):
        raise ApiError(400, "A prompt is empty.", "invalid_value", "prompt")
    wrong = [token_id for ids in prompts for token_id in ids if not 0 <= token_id < tokenizer.vocab_size]
    if wrong:
        problem = f"The prompt has the token id {str(wrong[0])[:40]}; ids go from 0 to {tokenizer.vocab_size - 1}."
        raise ApiError(400, problem, "invalid_value", "prompt")
    return prompts


class _Text:
    """One choice's text with its log-probabilities in the old shape, whole and what came last."""

    def __init__(self, echo: str) -> None:
        self.outcome = Outcome(content=echo)
        self.logprobs: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: Token, tokenizer: Tokenizer) -> dict[str, list] | None:
        """What the token adds to the log-probabilities."""
        offset = len(self.outcome.content)
        self.outcome.add(token)
        if token.logprobs is None or tokenizer.is_control(token.logprobs.chosen.token_id):
            return None
        added = _old_logprobs(token.logprobs, offset, tokenizer)
        for name, values in added.items():
            self.logprobs[name] += values
        return added


class _Writer:
    """The texts of one request, in the shape of completions."""

    def __init__(
        self, http: HttpRequest, body: CompletionBody, requests: Sequence[Request], choices: Sequence[Choice]
    ) -> None:
        state: ServerState = http.app.state.server
        self._http, self._state, self._body, self._choices = http, state, body, choices
        self._tokenizer = state.service.require_ready().tokenizer
        self._head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                      "model": state.model_name}  # fmt: skip
        self._echoes = [self._tokenizer.decode(each.prompt_ids) if body.echo else "" for each in requests]
        self._texts = [_Text(echo) for echo in self._echoes]
        self._num_prompt_tokens = sum(len(each.prompt_ids) for each in requests[:: body.n or 1])

    async def document(self) -> dict[str, Any]:
        """All texts at once."""
        try:
            async for i, token in merged(self._choices):
                if isinstance(token, Token):
                    self._texts[i].add(token, self._tokenizer)
        finally:
            self._end()
        choices = [
            self._choice(i, text.outcome.content, text.logprobs, finish_reason(text.outcome.finish_reason or "stop"))
            for i, text in enumerate(self._texts)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(), **self._timings()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The texts as they come; the prompts first, where they are to be echoed."""
        for i, echo in enumerate(self._echoes):
            yield self._chunk(i, echo)
        try:
            async for i, token in merged(self._choices):
                if not isinstance(token, Token):
                    continue
                logprobs = self._texts[i].add(token, self._tokenizer)
                reason = token.finish_reason and finish_reason(token.finish_reason)
                if token.text or logprobs or reason:
                    yield self._chunk(i, token.text, logprobs, reason)
        except Exception as error:
            yield sse.event(told(self._http, error).openai())
            return
        finally:
            self._end()
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield sse.event({**self._head, "choices": [], "usage": self._usage(), **self._timings()})
        yield sse.DONE

    def sign_of_life(self) -> bytes:
        """While nothing is to be said."""
        return sse.KEEPALIVE + self._chunk(0, "")

    def _chunk(self, i: int, text: str, logprobs: dict[str, list] | None = None, reason: str | None = None) -> bytes:
        return sse.event({**self._head, "choices": [self._choice(i, text, logprobs, reason)]})

    def _choice(self, i: int, text: str, logprobs: dict[str, list] | None, reason: str | None) -> dict[str, Any]:
        has_logprobs = self._body.logprobs is not None
        return {"index": i, "text": text, "logprobs": logprobs if has_logprobs else None, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        return usage(TokenCounts.of(self._num_prompt_tokens, [text.outcome for text in self._texts]))

    def _timings(self) -> dict[str, Any]:
        stats = self._texts[0].outcome.stats
        return {} if stats is None else {"timings": timings(stats)}

    def _end(self) -> None:
        """However it ended: nothing goes on, and the log has its line."""
        for choice in self._choices:
            choice.close()
        self._state.log_answer(self._num_prompt_tokens, [text.outcome.stats for text in self._texts])


def _old_logprobs(logprobs: Logprobs, offset: int, tokenizer: Tokenizer) -> dict[str, list]:
    """Of one token, as lists of one. Alternatives that read the same are one entry, the likeliest."""

    def text(entry: Logprob) -> str:
        return tokenizer.decode_bytes(entry.token_id).decode("utf-8", "replace")

    return {
        "tokens": [text(logprobs.chosen)],
        "token_logprobs": [logprobs.chosen.logprob],
        "top_logprobs": [{text(entry): entry.logprob for entry in reversed(logprobs.top)}],
        "text_offset": [offset],
    }
