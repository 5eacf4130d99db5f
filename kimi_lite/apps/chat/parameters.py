"""What `/set` and `/retry-with` change: the settings of answers by the names of their flags."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.types import SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import OPTIONS

DEFAULT = "default"
_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_STARTS = {  # what is chosen when the program starts, by the names that other programs have for it
    ("num-ctx", "ctx", "context", "ctx-size"): "The context's length is set at the start: kimi-lite chat -c 64K.",
    ("model",): "The model is chosen at the start: kimi-lite chat -m FILE.",
}
_SAMPLING_FIELDS = {field.name for field in fields(SamplingParams)}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A setting: its name, the field it is, what it takes, and what it does."""

    name: str
    field: str
    parse: Callable[[str], object]
    help: str

    def value(self, settings: AnswerSettings) -> object:
        is_sampling = self.field in _SAMPLING_FIELDS and self.field != "temperature"
        return getattr(settings.sampling if is_sampling else settings, self.field)

    def show(self, settings: AnswerSettings) -> str:
        """The value as it is typed; None is what the default does."""
        value = self.value(settings)
        if self.field == "temperature" and value is None:
            return f"{settings.sampling_temperature:g} (set by the thinking mode)"
        if value is None:
            return {"seed": "random", "max_tokens": "no limit", "thinking_budget": "no limit"}[self.field]
        if isinstance(value, bool):
            return "on" if value else "off"
        return " ".join(map(repr, value)) or "none" if isinstance(value, tuple) else f"{value:g}"

    def change(self, settings: AnswerSettings, value: object) -> AnswerSettings:
        if self.field in _SAMPLING_FIELDS and self.field != "temperature":
            return replace(settings, sampling=replace(settings.sampling, **{self.field: value}))
        return replace(settings, **{self.field: value})


def _texts(text: str) -> tuple[str, ...]:
    return () if text == "none" else (_ESCAPE.sub(lambda match: _ESCAPES[match[1]], text),)


def _of(name: str) -> Parameter:
    """The setting that an option of the command line is: its name, values and help."""
    option = OPTIONS[name]
    first_sentence = option.help.partition(". ")[0].rstrip(".")

    def parse(text: str) -> object:
        return option.parse("-1" if option.none_text and text in ("none", "no") else text, option.key)

    return Parameter(option.key, name, parse, first_sentence[0].lower() + first_sentence[1:])


PARAMETERS = (
    *map(_of, ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens")),
    Parameter("stop", "stop", _texts, "a text that ends the answer; none"),
    *map(_of, ("is_thinking", "thinking_budget", "preserve_thinking")),
)
_OTHER_NAMES = {"temperature": "temp", "thinking": "think"}


def find(name: str) -> Parameter:
    """By name, with underscores or dashes; KimiLiteError with the nearest where there is none."""
    by_name = {parameter.name: parameter for parameter in PARAMETERS}
    by_name |= {other: by_name[own] for other, own in _OTHER_NAMES.items()}
    wanted = name.lower().replace("_", "-")
    start = next((hint for names, hint in _STARTS.items() if wanted in names), "")
    if wanted not in by_name:
        near = get_close_matches(wanted, by_name, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else "/set lists them."
        raise KimiLiteError(f"There is no setting {name!r}.", start or hint)
    return by_name[wanted]


def changed(conversation: Conversation, settings: AnswerSettings, name: str, text: str) -> AnswerSettings:
    """`settings` with one of them as typed; KimiLiteError for a wrong value or one the model cannot have."""
    parameter = find(name)
    if text == DEFAULT:
        return parameter.change(settings, parameter.value(AnswerSettings(is_thinking=conversation.can_think)))
    try:
        value = parameter.parse(text)
    except KimiLiteError as error:
        raise KimiLiteError(error.message, f"It is: {parameter.help}; or {DEFAULT}.") from None
    if parameter.field == "is_thinking" and value and not conversation.can_think:
        raise KimiLiteError(f"{conversation.info.name} has no thinking mode.", "It answers without.")
    if parameter.field == "thinking_budget" and value is not None:
        conversation.require_budget()
    if parameter.field == "preserve_thinking" and value and not conversation.can_preserve:
        raise KimiLiteError(
            f"The chat template of {conversation.info.name} always drops past reasoning.", "Keep it off."
        )
    return parameter.change(settings, value)


def parse_pairs(argument: str) -> list[tuple[str, str]]:
    """`temp=0.7 top-p=0.9` as pairs; KimiLiteError for anything else."""
    pairs = [word.partition("=") for word in argument.split()]
    if not pairs or not all(name and sign and value for name, sign, value in pairs):
        raise KimiLiteError(f"{argument!r} is not name=value.", "For example /retry-with temp=0.7 top-p=0.9")
    return [(name, value) for name, _, value in pairs]
