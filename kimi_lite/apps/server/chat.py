"""A chat request in the server's own form, its prompt, and its answers as streams of the engine's events.

OpenAI's chat completions and responses and Anthropic's messages are all turned into a `ChatRequest`; what differs
between them is only how it is written and how the answer is.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar
from uuid import uuid4

from kimi_lite.apps.server.errors import ApiError
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.grammar import AnswerForm, ToolChoice
from kimi_lite.engine.json_schema import SchemaError
from kimi_lite.engine.loop_guard import LoopLimits
from kimi_lite.engine.service import Answer, EngineService, Event
from kimi_lite.engine.splice import splice
from kimi_lite.engine.types import Constraint, Request, SamplingParams, Token
from kimi_lite.engine.vision import MarkedPrompt, encode_prompt, marked_ids, placed, shown_parts, without_marks
from kimi_lite.text.stream import DEEPSEEK, KIMI

NUM_CONVERSATIONS = 64  # whose sampled ids are remembered, so that their next prompts are found in the cache
MAX_CHOICES = 16
NUM_SEEING_THREADS = 2

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`messages` and `tools` are OpenAI-shaped. `is_thinking` None: as the model does by itself."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = "auto"
    has_parallel_calls: bool = True
    is_thinking: bool | None = None
    keeps_reasoning: bool = False  # past reasoning stays in the prompt
    max_reasoning_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    temperature: float | None = None  # None: the server's, or the mode's
    num_choices: int = 1
    strict_tools: frozenset[str] = frozenset()  # names of those whose arguments must follow their schema
    json_schema: Mapping[str, Any] | None = None  # of the answer
    schema_place: str = "response_format.json_schema.schema"  # where the client wrote it
    client: str = ""
    priority: int = 0  # among the requests of this client


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with its prompt's ids."""

    chat: ChatRequest
    requests: tuple[Request, ...]  # one for each choice

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.requests[0].prompt_ids)


class Chats:
    """Turns chat requests into the engine's and remembers what was sampled for them."""

    def __init__(
        self,
        service: EngineService,
        loop_limits: LoopLimits | None,
        num_conversations: int = NUM_CONVERSATIONS,
        answers: AnswerSettings | None = None,
    ) -> None:
        """answers: how those are made that a request says nothing of."""
        self.service, self._loop_limits, self._num_conversations = service, loop_limits, num_conversations
        self._answers = answers or AnswerSettings()
        self._known_ids: OrderedDict[int, list[int]] = OrderedDict()  # prompts with their answers, oldest first
        self._numbers = count()
        # Images take seconds each, one after the other; threads that others need must not all wait for them.
        self._seeing = ThreadPoolExecutor(NUM_SEEING_THREADS, "kimi-lite-images")

    async def prepare(self, chat: ChatRequest) -> Prepared:
        """Render and tokenize, which may take a while for long conversations; ApiError or KimiLiteError where it
        cannot be answered."""
        engine = self.service.require_ready()
        if not 1 <= chat.num_choices <= MAX_CHOICES:
            raise ApiError(400, f"n is {chat.num_choices}; it may be 1 to {MAX_CHOICES}.", "invalid_value", "n")
        return await self._in_thread(self._prepare, engine, chat)

    async def count_tokens(self, chat: ChatRequest) -> int:
        """Tokens of the prompt: messages, tools, system prompt and the template's own."""
        engine = self.service.require_ready()
        return len((await self._in_thread(self._encode, engine, chat)).ids)

    async def prompt_ids(self, chat: ChatRequest) -> list[int]:
        """The ids of the prompt, without anything being seen or computed."""
        engine = self.service.require_ready()
        prompt = await self._in_thread(self._encode, engine, chat)
        return list(without_marks(prompt.ids, engine.template.pad_id))

    async def _in_thread(
        self, work: Callable[[Engine, ChatRequest], Result], engine: Engine, chat: ChatRequest
    ) -> Result:
        """In a thread, so that the event loop goes on."""
        pool = self._seeing if shown_parts(chat.messages) else None
        return await asyncio.get_running_loop().run_in_executor(pool, work, engine, chat)

    def open(self, requests: Sequence[Request]) -> list["Choice"]:
        """Put all choices into the queue; QueueFull where they have no place, and then none is."""
        choices: list[Choice] = []
        for request in requests:
            try:
                choices.append(Choice(self, self.service.submit(request)))
            except BaseException:
                for choice in choices:
                    choice.close()
                raise
        return choices

    def remember(self, ids: list[int]) -> None:
        """The ids of a prompt and its answer."""
        self._known_ids[next(self._numbers)] = ids
        while len(self._known_ids) > self._num_conversations:
            self._known_ids.popitem(last=False)

    def _prepare(self, engine: Engine, chat: ChatRequest) -> Prepared:
        prompt = self._encode(engine, chat)
        marked = self._with_known_ids(engine, prompt.ids)
        ids = without_marks(marked, engine.template.pad_id)
        sampling = self._sampling(engine, chat, prompt.starts_in_reasoning)
        calls = tuple(_calls_of(chat.messages))
        constraint = self._constraint(engine, chat, prompt.starts_in_reasoning, len(calls))
        requests = []
        for i in range(chat.num_choices):
            request = Request(
                uuid4().hex,
                ids,
                sampling.with_seed_of(i),
                prompt.starts_in_reasoning,
                chat.tools,
                num_calls=len(calls),
                max_reasoning_tokens=chat.max_reasoning_tokens if prompt.starts_in_reasoning else None,
                constraint=constraint,
                loop_limits=self._loop_limits,
                earlier_calls=calls,
                client=chat.client,
                priority=chat.priority,
            )
            engine.require_room(request)
            requests.append(request)
        if prompt.items:  # the tower sees them once it is known that they fit
            images = placed(marked, prompt.items, engine.vision.see(prompt.items))
            requests = [replace(request, images=images) for request in requests]
        return Prepared(chat, tuple(requests))

    def _encode(self, engine: Engine, chat: ChatRequest) -> MarkedPrompt:
        return encode_prompt(
            engine.template,
            engine.vision,
            chat.messages,
            tools=chat.tools,
            thinking=True if chat.is_thinking is None else chat.is_thinking,
            preserve_thinking=chat.keeps_reasoning,
        )

    def _constraint(
        self, engine: Engine, chat: ChatRequest, starts_in_reasoning: bool, num_calls: int
    ) -> Callable[[], Constraint] | None:
        """The grammar of the answer; ApiError 400 that names the keyword where a schema cannot be one."""
        form = AnswerForm(
            schema=chat.json_schema,
            schema_place=chat.schema_place,
            tools=chat.tools,
            choice=chat.tool_choice,
            strict_tools=chat.strict_tools,
            has_parallel_calls=chat.has_parallel_calls,
            num_calls=num_calls,
            may_think=not starts_in_reasoning and chat.is_thinking is not False,
        )
        try:
            return engine.grammars.answer(form)
        except SchemaError as error:
            param = error.place if not error.keyword else f"{error.place}.{error.keyword}"
            raise ApiError(400, str(error), "unsupported_schema", param) from None

    def _sampling(self, engine: Engine, chat: ChatRequest, is_thinking: bool) -> SamplingParams:
        temperature = chat.temperature
        if temperature is None:
            temperature = self._answers.with_thinking(is_thinking).sampling_temperature
        biases = dict(chat.sampling.logit_bias)
        if chat.tool_choice == "none" or (chat.json_schema is not None and not chat.tools):
            # Tools stay declared, so that the prompt's beginning stays in the cache.
            special = engine.tokenizer.special
            openings = [name for dialect in (KIMI, DEEPSEEK) for name in (*dialect.section_begin, dialect.call_begin)]
            biases |= {special[name]: -100.0 for name in openings if name in special}
        return replace(chat.sampling, temperature=temperature, logit_bias=tuple(biases.items()))

    def _with_known_ids(self, engine: Engine, ids: list[int]) -> list[int]:
        """The prompt in the ids that were sampled, where it goes on from a conversation that is remembered."""
        best, num_best = None, 0
        for known in list(self._known_ids.values()):
            num_common = _num_common(known, ids)
            if num_common > num_best:
                best, num_best = known, num_common
        return ids if best is None else splice(best, ids, engine.tokenizer)


class Choice:
    """The events of one choice as they come; at its end what was sampled is remembered."""

    def __init__(self, chats: Chats, answer: Answer) -> None:
        self._chats, self._answer = chats, answer
        self._ids = marked_ids(answer.request)

    def __aiter__(self) -> "Choice":
        return self

    async def __anext__(self) -> list[Event]:
        try:
            events = await anext(self._answer)
        except StopAsyncIteration:
            self._chats.remember(self._ids)
            raise
        self._ids += [event.id for event in events if isinstance(event, Token) and event.id is not None]
        return events

    def close(self) -> None:
        """No more of it is wanted."""
        self._answer.close()


def _num_common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning: halved, since lists are compared faster than one by one."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _calls_of(messages: tuple[Mapping[str, Any], ...]) -> list[tuple[str, str]]:
    """(name, arguments) of all tool calls so far."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    return [(str(call.get("name")), str(call.get("arguments"))) for call in calls]
