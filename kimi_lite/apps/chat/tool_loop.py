"""Answers that call tools: run the calls, give the results back, go on, until there is an answer or enough is enough.

    loop = ToolLoop(conversation, box, ask, say)
    tokens = conversation.ask("How many lines has README.md?", report, box.declarations)
    for token in loop.follow(tokens, report): view.show(token)

Works with any `engine.conversation.Conversation`, local or remote: call ids go back as they came. `cancel` may come at
any time from a signal handler.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

from kimi_lite.apps.tools.box import Ask, Stopped, ToolBox
from kimi_lite.apps.tools.tool import UNUSABLE_CALL
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation, OnPrefill
from kimi_lite.engine.turns import Turn
from kimi_lite.engine.types import Token
from kimi_lite.text.tool_calls import ToolCall

MOST_ROUNDS = 16  # of calls for one message
_LIMIT_REACHED = (
    "Not run: {rounds} rounds of tool calls were made for this message, the limit. Answer with what you have."
)


class ToolLoop:
    """A conversation with a box of tools. `ask` confirms a call, `say` shows a remark, `pause` comes before both."""

    def __init__(
        self,
        conversation: Conversation,
        box: ToolBox,
        ask: Ask,
        say: Callable[[str], None],
        pause: Callable[[], None] = lambda: None,
        most_rounds: int = MOST_ROUNDS,
    ) -> None:
        self.conversation, self.box, self.most_rounds = conversation, box, most_rounds
        self._ask, self._say, self._pause = ask, say, pause
        self._is_cancelled = False

    def follow(
        self,
        tokens: Generator[Token, None, None],
        on_prefill: OnPrefill | None = None,
        settings: AnswerSettings | None = None,
    ) -> Iterator[Token]:
        """The tokens of an answer, then those of the answers that follow from its calls; each ends with a finish
        reason."""
        self._is_cancelled = False
        for num_rounds in range(self.most_rounds + 2):
            last, error = None, ""
            with closing(tokens):  # at once, also where what reads us stops: what was said becomes a turn
                for token in tokens:
                    last, error = token, token.error or error
                    yield token
            calls = self.conversation.pending_calls
            is_ended = last is None or last.finish_reason not in ("stop", "tool_calls")
            if self._is_cancelled or is_ended or not (calls or error):
                return
            self._pause()
            if num_rounds > self.most_rounds:
                self._say(f"stopped after {self.most_rounds} rounds of tool calls for one message")
                return
            if calls:
                results = self._run(calls, num_rounds)
                if results is None:
                    self._say("stopped; calls without a result were not run")
                    return
                tokens = self.conversation.answer_calls(results, on_prefill, settings)
            else:
                tokens = self.conversation.ask(UNUSABLE_CALL.format(error=error), on_prefill, settings=settings)

    def cancel(self) -> None:
        """Stop the answer or the call that is running, and call nothing more."""
        self._is_cancelled = True
        self.box.cancel()
        self.conversation.cancel()

    def _run(self, calls: Sequence[ToolCall], num_rounds: int) -> list[tuple[str, str]] | None:
        """A result for every call; None when the user stopped between them: then those there are stay in the
        conversation."""
        if num_rounds == self.most_rounds:
            return [(call.id, _LIMIT_REACHED.format(rounds=self.most_rounds)) for call in calls]
        results: list[tuple[str, str]] = []
        try:
            for call in calls:
                results.append((call.id, self.box.call(call, self._ask)))
                self._say(f"  ← {summary(results[-1][1])}")
                if self._is_cancelled:
                    raise Stopped
        except Stopped:
            done = zip(calls, results, strict=False)
            self.conversation.turns += [Turn("tool", text, call_id=call.id, name=call.name) for call, (_, text) in done]
            return None
        return results


def summary(text: str) -> str:
    """`12 lines: the first one`, for people."""
    lines = text.split("\n")
    first = lines[0] if len(lines[0]) <= 80 else lines[0][:79] + "…"
    return first if len(lines) == 1 else f"{len(lines)} lines: {first}"
