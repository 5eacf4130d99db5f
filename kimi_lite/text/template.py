"""Chat messages to prompt ids, through the chat template the model file carries, or Kimi's where it carries none.

Control tokens come only from the template's own words (`text.sandbox`); whatever users, tools or tool descriptions say
is encoded as plain text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.kimi import KIMI_TEMPLATE
from kimi_lite.text.sandbox import SandboxedTemplate, Segment
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.tool_calls import with_native_ids
from kimi_lite.text.typescript import UnsupportedSchema, declare_tools, sort_keys

MAX_DEPTH = 64  # of nested lists and dicts in messages and tools
_KIMI_CALL = "<|tool_call_begin|>"
_KIMI_TURN = "<|im_middle|>"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt ready to run. `starts_in_reasoning`: it ends inside an open `<think>`, so the answer starts with
    reasoning."""

    ids: list[int]
    starts_in_reasoning: bool


class ChatTemplate:
    """The chat layout of one model."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = SandboxedTemplate(source, tokenizer.special)
        self._is_kimi = _KIMI_CALL in tokenizer.special

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

    def encode(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
        preserve_thinking: bool = False,
    ) -> EncodedPrompt:
        """Prompt ids of OpenAI-style messages. A `<|media_pad|>` id stands for one image, in order."""
        ids: list[int] = []
        segments = self._segments(messages, tools, thinking, add_generation_prompt, preserve_thinking)
        for segment in segments:
            ids += (
                [self._tokenizer.special[segment.text]] if segment.is_control else self._tokenizer.encode(segment.text)
            )
        return EncodedPrompt(ids, add_generation_prompt and _ends_in_think(segments))

    def _segments(
        self,
        messages: Sequence[Mapping],
        tools: Sequence[Mapping] | None,
        thinking: bool,
        add_generation_prompt: bool,
        preserve_thinking: bool,
    ) -> list[Segment]:
        variables: dict[str, object] = {
            "messages": self._messages(messages),
            "tools": _plain(list(tools)) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "thinking": thinking,
            "enable_thinking": thinking,
            "preserve_thinking": preserve_thinking,
            "bos_token": self._token_text(self._tokenizer.bos_id),
            "eos_token": self._token_text(self._tokenizer.eos_id),
        }
        if tools and self._is_kimi:
            variables |= _kimi_tools(variables["tools"])
        return self._template.render(variables)

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
        return with_native_ids(plain) if self._is_kimi else plain

    def _token_text(self, token_id: int | None) -> str:
        """A token for the template to write: it, too, must carry a mark to become a control token."""
        return "" if token_id is None else self._template.mark(self._tokenizer.decode([token_id]))


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


def _plain(value: object, depth: int = 0) -> object:
    """A copy made of JSON's types alone: a template must not meet objects with methods of their own."""
    if depth > MAX_DEPTH:
        raise KimiLiteError(f"Messages or tools are nested deeper than {MAX_DEPTH} levels.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise KimiLiteError(f"Messages and tools are made of JSON values; a {type(value).__name__} is none.")
