"""What came of one choice so far, whichever API it is told in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kimi_lite.engine.types import FinishReason, Logprobs, Stats, Token
from kimi_lite.text.tool_calls import ToolCall


@dataclass(slots=True)
class Outcome:
    """Joined from the tokens of one choice, in their order."""

    content: str = ""
    reasoning: str | None = None  # None: it was not in a thinking mode
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)  # of the content's tokens
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None  # the stop string that was met
    num_reasoning_tokens: int = 0
    stats: Stats | None = None

    def add(self, token: Token) -> None:
        """The next token; raises its failure, if it has one."""
        if token.failure is not None:
            raise token.failure
        self.stats = token.stats
        if token.unsaid:  # it was reasoning after all
            self.reasoning, self.content = (self.reasoning or "") + self.content, ""
        elif token.kind == "reasoning":
            self.reasoning = (self.reasoning or "") + token.text
        elif token.kind == "content":
            self.content += token.text
        elif token.call is not None:
            self.calls.append(ToolCall(token.call.id, token.call.name, token.text))
        elif token.call_index is not None and token.call_index < len(self.calls):
            call = self.calls[token.call_index]
            self.calls[token.call_index] = ToolCall(call.id, call.name, call.arguments + token.text)
        if token.id is not None and token.kind == "reasoning":
            self.num_reasoning_tokens += 1
        if token.logprobs is not None and token.kind == "content":
            self.logprobs.append(token.logprobs)
        self.finish_reason = token.finish_reason or self.finish_reason
        self.stopped_by = token.stopped_by or self.stopped_by


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of a whole request. The prompt counts once, however many choices."""

    prompt: int
    cached: int  # of the prompt
    generated: int
    reasoning: int  # of those generated

    @classmethod
    def of(cls, num_prompt_tokens: int, outcomes: Sequence[Outcome]) -> "TokenCounts":
        stats = [outcome.stats for outcome in outcomes if outcome.stats is not None]
        return cls(
            prompt=num_prompt_tokens,
            cached=stats[0].cached_tokens if stats else 0,
            generated=sum(each.generated_tokens for each in stats),
            reasoning=sum(outcome.num_reasoning_tokens for outcome in outcomes),
        )
