"""Chat messages to prompt ids, through the chat template the model file carries, or Kimi's where it carries none.

Control tokens come only from the template's own words (`text.sandbox`); whatever users, tools or tool descriptions say
is encoded as plain text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.isolation import IsolatedTemplate
from kimi_lite.text.kimi import KIMI_TEMPLATE
from kimi_lite.text.placeholders import PAD, VIDEO, Placeholders, Stamps
from kimi_lite.text.sandbox import Segment
from kimi_lite.text.stream import KIMI, dialect_of
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.tool_calls import with_native_ids
from kimi_lite.text.typescript import UnsupportedSchema, declare_tools, sort_keys

MAX_DEPTH = 64  # of nested lists and dicts in messages and tools
_KIMI_TURN = "<|im_middle|>"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt ready to run. `starts_in_reasoning`: it ends inside an open `<think>`, so the answer starts with
    reasoning."""

    ids: list[int]
    starts_in_reasoning: bool
    places: tuple[int, ...] = ()  # where in `ids` a placeholder stands for one run of an image's or video's tokens


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What a template can do, learned by rendering small conversations with it."""

    can_think: bool  # it has a thinking mode
    can_call: bool  # it declares tools, and calls come in markers that `text.stream` reads
    can_preserve: bool  # past reasoning can stay in the prompt
    call_content: str | None = ""  # the content of a message with calls with which they are rendered at all
    takes_objects: bool = False  # arguments of past calls are wanted as objects, not as JSON text
    fences_arguments: bool = False  # it writes the arguments of calls in code fences


class ChatTemplate:
    """The chat layout of one model."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = IsolatedTemplate(source, (*tokenizer.special, VIDEO))
        self._dialect = dialect_of(tokenizer.special)
        self._is_kimi = self._dialect is KIMI

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], tokenizer: Tokenizer) -> "ChatTemplate":
        """The file's `tokenizer.chat_template`; Kimi's own layout for a Kimi vocabulary without one; else
        KimiLiteError."""
        source = metadata.get("tokenizer.chat_template")
        if source is None and _KIMI_TURN in tokenizer.special:
            source = KIMI_TEMPLATE
        if not isinstance(source, str):
            raise KimiLiteError(
                "The file has no chat template (tokenizer.chat_template) and its vocabulary is not Kimi's.",
                "Use a chat model's GGUF, or one converted with its chat template.",
            )
        return cls(source, tokenizer)

    @cached_property
    def facts(self) -> TemplateFacts:
        """Rendered once, when it is asked for first."""
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": "!", "reasoning_content": "zq"}
        plain = self._probe([question])
        past = [question, answer, question]
        form = next(
            ((content, is_object) for content, is_object in _CALL_FORMS if self._shows_call(content, is_object)), None
        )
        content, takes_objects = form or _CALL_FORMS[0]
        past_call = "" if form is None else self._probe(_past_call(*form), [_PROBE_TOOL])
        is_readable = self._dialect is not None and (form is None or self._dialect.call_begin in past_call)
        return TemplateFacts(
            can_think=self._ends_in_think([question]) or plain != self._probe([question], thinking=False),
            can_call=is_readable and plain != self._probe([question], [_PROBE_TOOL]),
            can_preserve=self._probe(past) != self._probe(past, preserve_thinking=True),
            call_content=content,
            takes_objects=takes_objects,
            fences_arguments="```json" in past_call,
        )

    @cached_property
    def _shows(self) -> tuple[bool, bool]:
        """Whether it has a place for images, and one for videos."""
        probes = [_user({"type": f"{kind}_url", f"{kind}_url": {"url": "data:"}}) for kind in ("image", "video")]
        found = []
        for probe in probes:
            try:
                segments = self._render([probe], None, True, True, False)
            except KimiLiteError:
                segments = []
            found.append({segment.text for segment in segments if segment.is_control})
        return PAD in found[0], VIDEO in found[1]

    @property
    def pad_id(self) -> int:
        """The id that stands where an image's features do; any, where the vocabulary has none for it."""
        return self._tokenizer.special.get(PAD, self._tokenizer.bos_id or 0)

    def _probe(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        thinking: bool = True,
        preserve_thinking: bool = False,
    ) -> str:
        """What the template makes of a conversation as it is, "" where it accepts none such."""
        try:
            segments = self._render(list(messages), tools, thinking, True, preserve_thinking)
        except KimiLiteError:
            return ""
        return "".join(segment.text for segment in segments)

    def _ends_in_think(self, messages: Sequence[Mapping]) -> bool:
        return self._probe(messages).rstrip().endswith("<think>")

    def _shows_call(self, content: str | None, is_object: bool) -> bool:
        """Whether a past call in this form is rendered, its arguments as JSON."""
        text = self._probe(_past_call(content, is_object), [_PROBE_TOOL])
        return "zq_f" in text and any(f'"zq_a"{colon}1' in text for colon in (": ", ":"))

    def encode(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
        preserve_thinking: bool = False,
        media: Sequence[Stamps] | None = None,
    ) -> EncodedPrompt:
        """Prompt ids of OpenAI-style messages. media: of every image and video in them, in order, the time stamps of
        its runs of tokens ("" for an image); each gets one `pad_id`. KimiLiteError where the prompt has more or fewer
        places. None: not known, one `pad_id` for each image."""
        plain, placeholders = self._messages(messages), Placeholders(self._tokenizer.special)
        if media:
            plain = placeholders.hide(plain, *self._shows)
        segments = self._render(plain, tools, thinking, add_generation_prompt, preserve_thinking)
        if media is not None:
            segments = placeholders.fill(segments, media)
        ids: list[int] = []
        places: list[int] = []
        for segment in segments:
            if segment == _PAD_SEGMENT:
                places.append(len(ids))
                ids.append(self.pad_id)
            elif segment.is_control and segment.text != VIDEO:
                ids.append(self._tokenizer.special[segment.text])
            else:
                ids += self._tokenizer.encode(segment.text)
        return EncodedPrompt(ids, add_generation_prompt and _ends_in_think(segments), tuple(places))

    def _segments(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None,
        thinking: bool,
        add_generation_prompt: bool,
        preserve_thinking: bool,
    ) -> list[Segment]:
        return self._render(self._messages(messages), tools, thinking, add_generation_prompt, preserve_thinking)

    def _render(
        self,
        messages: list[Mapping],
        tools: Sequence[Mapping] | None,
        thinking: bool,
        add_generation_prompt: bool,
        preserve_thinking: bool,
    ) -> list[Segment]:
        variables: dict[str, object] = {
            "messages": messages,
            "tools": _plain(list(tools)) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "thinking": thinking,
            "enable_thinking": thinking,
            "preserve_thinking": preserve_thinking,
        }
        tokens = {
            "bos_token": self._token_text(self._tokenizer.bos_id),
            "eos_token": self._token_text(self._tokenizer.eos_id),
        }
        if tools and self._is_kimi:
            variables |= _kimi_tools(variables["tools"])
        return self._template.render(variables, tokens)

    def _messages(self, messages: Sequence[Mapping]) -> list[Mapping]:
        """Plain copies; a null reasoning is an absent one (templates would write "None"), foreign call ids become
        Kimi's."""
        plain = _plain(list(messages))
        for i, message in enumerate(plain):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise KimiLiteError(
                    f"Message {i} of {len(plain)} has no role.", "Each message needs a role and content."
                )
            if message.get("reasoning_content", "") is None:
                del message["reasoning_content"]
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list) or not all(isinstance(call, dict) and _has_function(call) for call in calls):
                raise KimiLiteError(
                    f"Message {i} of {len(plain)} has a tool call without function.", "See the OpenAI API."
                )
        if any(message.get("tool_calls") for message in plain):
            plain = [self._in_form(message) for message in plain]
        return with_native_ids(plain) if self._is_kimi else plain

    def _in_form(self, message: dict) -> dict:
        """A message with calls in the form in which the template renders them."""
        if not message.get("tool_calls"):
            return message
        facts = self.facts
        if not message.get("content"):
            message = {**message, "content": facts.call_content}
        if facts.takes_objects:
            message = {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        return message

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self._tokenizer.decode([token_id])


_PAD_SEGMENT = Segment(PAD, True)
_CALL_FORMS = (
    ("", False),
    (None, False),
    ("", True),
    (None, True),
)  # content of a message with a call, arguments as an object
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "zq_f",
        "description": "",
        "parameters": {"type": "object", "properties": {"zq_b": {"type": "integer"}}},
    },
}


def _user(part: Mapping) -> Mapping:
    return {"role": "user", "content": [part]}


def _past_call(content: str | None, is_object: bool) -> list[Mapping]:
    """A conversation with a call and its result."""
    arguments = {"zq_a": 1} if is_object else '{"zq_a": 1}'
    call = {"id": "functions.zq_f:0", "type": "function", "function": {"name": "zq_f", "arguments": arguments}}
    return [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "zq_r", "tool_call_id": "functions.zq_f:0", "name": "zq_f"},
    ]


def _with_object(call: Mapping) -> Mapping:
    """A call whose arguments are an object, where they are the text of one."""
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": value}} if isinstance(value, dict) else call


def _has_function(call: Mapping) -> bool:
    return isinstance(call.get("function"), dict)


def _kimi_tools(tools: object) -> dict[str, object]:
    """Tools as Kimi's template wants them: key-sorted, and as TypeScript unless a schema has no such form (then
    JSON)."""
    tools = sort_keys(tools)
    try:
        return {"tools": tools, "tools_ts_str": declare_tools(tools)}
    except UnsupportedSchema:
        return {"tools": tools}


def _ends_in_think(segments: Iterable[Segment]) -> bool:
    return "".join(segment.text for segment in segments).rstrip().endswith("<think>")


def _without_data(key: str, value: object) -> object:
    """A picture's bytes are nothing that a template renders."""
    is_data = key in ("url", "image", "image_url", "video_url") and isinstance(value, str) and value.startswith("data:")
    return "data:" if is_data else value


def _plain(value: object, depth: int = 0) -> object:
    """A copy made of JSON's types alone: a template must not meet objects with methods of their own."""
    if depth > MAX_DEPTH:
        raise KimiLiteError(f"Messages or tools are nested deeper than {MAX_DEPTH} levels.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(_without_data(key, item), depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise KimiLiteError(f"Messages and tools are made of JSON values; a {type(value).__name__} is none.")
