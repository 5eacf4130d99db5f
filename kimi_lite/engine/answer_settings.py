"""How answers are made: mode, sampling and the budget for thinking. A conversation has one; one message may have
another."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from kimi_lite.engine.types import INSTANT_TEMPERATURE, THINKING_TEMPERATURE, SamplingParams
from kimi_lite.options import Options


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """How answers are made. `temperature` None is the vendor's choice for the mode."""

    is_thinking: bool = True
    temperature: float | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)  # but for the temperature
    thinking_budget: int | None = None  # tokens of reasoning; None: no limit
    preserve_thinking: bool = False  # past reasoning stays in the prompt

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters of a request."""
        return replace(self.sampling, temperature=self.sampling_temperature)

    @property
    def sampling_temperature(self) -> float:
        default = THINKING_TEMPERATURE if self.is_thinking else INSTANT_TEMPERATURE
        return default if self.temperature is None else self.temperature

    def with_thinking(self, is_thinking: bool) -> "AnswerSettings":
        return replace(self, is_thinking=is_thinking)

    def overridden(self, other: "AnswerSettings") -> "AnswerSettings":
        """With every value of `other` that is not the default; the mode is not among them."""
        sampling = replace(self.sampling, **_differences(other.sampling, SamplingParams()))
        changes = _differences(replace(other, sampling=SamplingParams()), AnswerSettings(is_thinking=other.is_thinking))
        return replace(self, sampling=sampling, **changes)

    def describe(self) -> str:
        """`thinking on (temp 1, top-p 0.95)`, for people."""
        budget = (
            "" if self.thinking_budget is None or not self.is_thinking else f", at most {self.thinking_budget:,} tokens"
        )
        kept = ", kept in the prompt" if self.preserve_thinking else ""
        return f"thinking {'on' if self.is_thinking else 'off'}{budget}{kept} ({self.describe_sampling()})"

    def describe_sampling(self) -> str:
        return f"temp {self.sampling_temperature:g}, top-p {self.sampling.top_p:g}"

    @classmethod
    def from_options(cls, options: Options) -> "AnswerSettings":
        """What the options say of answers; but for the mode, which is also the model's to allow."""
        sampling = SamplingParams(
            temperature=THINKING_TEMPERATURE if options.temperature is None else options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        return cls(
            temperature=options.temperature,
            sampling=sampling,
            thinking_budget=options.thinking_budget,
            preserve_thinking=options.preserve_thinking,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AnswerSettings":
        sampling = dict(value["sampling"])
        biases = tuple((int(token_id), float(bias)) for token_id, bias in sampling.get("logit_bias", ()))
        lists = {"stop": tuple(sampling["stop"]), "logit_bias": biases}
        return cls(**{**value, "sampling": SamplingParams(**{**sampling, **lists})})


def _differences(value: Any, default: Any) -> dict[str, Any]:
    """The fields in which two dataclasses differ, as in `value`."""
    names = [field.name for field in fields(value)]
    return {name: getattr(value, name) for name in names if getattr(value, name) != getattr(default, name)}
