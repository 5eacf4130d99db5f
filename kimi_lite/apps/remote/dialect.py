"""How a server wants to be asked: the body of a request to its `/chat/completions`, and what it was found not to know.

Servers agree on little beyond OpenAI's own fields: the vendor has a switch of its own for thinking and types its tools,
others pass arguments to the template, and some refuse every field that they do not know. A field that was refused by
name, and that changes nothing, is left out from then on.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from kimi_lite.apps.remote.endpoint import Refused
from kimi_lite.apps.remote.portable import portable, typed_tools
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.text.tool_calls import declared_names

VENDOR_HOSTS = ("moonshot.ai", "moonshot.cn", "kimi.com")
COMPLETIONS = "/chat/completions"
_OPTIONAL = ("stream_options", "reasoning_content")
_THINKING = ("chat_template_kwargs", "thinking")


class Dialect:
    """Of one model at one server."""

    def __init__(self, url: str, model: str, optional: Mapping[str, Any] | None = None) -> None:
        """optional: further fields of every request, which a server need not know."""
        host = urlsplit(url).hostname or ""
        self.model, self._optional = model, optional or {}
        self._is_vendor = any(host == vendor or host.endswith("." + vendor) for vendor in VENDOR_HOSTS)
        self._refused: set[str] = set()  # optional fields that the server does not know

    def body(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: AnswerSettings,
        tools: Sequence[Mapping[str, Any]] = (),
        may_call: bool = True,
    ) -> dict[str, Any]:
        """The request. What is as OpenAI's default is not sent: not every server knows every field. may_call False:
        tools are declared, and none may be called."""
        params = settings.params
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._portable(messages, tools),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": params.temperature,
            "top_p": params.top_p,
            **self._thinking(settings),
            **self._optional,
        }
        optional = {
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            "stop": list(params.stop) or None,
            "top_k": params.top_k or None,
            "min_p": params.min_p or None,
            "repetition_penalty": None if params.repetition_penalty == 1.0 else params.repetition_penalty,
            "tools": (typed_tools(tools) if self._is_vendor else list(tools)) or None,
            "tool_choice": "none" if tools and not may_call else None,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        return {name: value for name, value in body.items() if name not in self._refused}

    def do_without(self, error: Refused, settings: AnswerSettings, sent: Mapping[str, Any]) -> None:
        """Leave a field of the body that was `sent` out, which the server refused by name and which changes nothing;
        else the refusal stands. (Of requests that were under way together another may have left it out already.)"""
        fields = [*_OPTIONAL, *self._optional, *(_THINKING if settings.is_thinking else ())]
        named = [name for name in fields if name in error.said and _is_in(name, sent)]
        is_wanted = any(word in error.said.lower() for word in ("missing", "required", "must be"))  # and not refused
        if error.status not in (400, 422) or not named or is_wanted:
            raise error
        self._refused.add(named[0])

    @property
    def left_out(self) -> frozenset[str]:
        """The fields that it was found not to know."""
        return frozenset(self._refused)

    def _thinking(self, settings: AnswerSettings) -> dict[str, Any]:
        """The switch: the vendor has a field of its own, servers pass arguments to the template."""
        if self._is_vendor:
            return {"thinking": {"type": "enabled" if settings.is_thinking else "disabled"}}
        kept = {"preserve_thinking": True} if settings.preserve_thinking else {}
        return {"chat_template_kwargs": {"thinking": settings.is_thinking, **kept}}

    def _portable(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        sent = portable(messages, declared_names(tools))
        if "reasoning_content" not in self._refused:
            return sent
        return [{key: value for key, value in one.items() if key != "reasoning_content"} for one in sent]


def _is_in(name: str, body: Mapping[str, Any]) -> bool:
    return name in body or any(name in message for message in body["messages"])
