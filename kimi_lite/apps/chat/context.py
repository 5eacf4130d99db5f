"""The context and the next message. Nothing is ever cut silently: the user chooses to drop, to summarise, or not to
send; only what works in this very situation is offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.turns import Content
from kimi_lite.errors import KimiLiteError
from kimi_lite.units import counted, tokens_flag

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

ANSWER_TOKENS = 256  # that an answer should have at least
LEFT_SHARE = 0.75  # of the context: when something must go, then enough for a while
NEARLY_FULL_SHARE = 0.85


def answer_tokens(context_length: int) -> int:
    return min(ANSWER_TOKENS, context_length // 8)


@dataclass(frozen=True, slots=True)
class Fit:
    """A message against the context: whether it goes, and what would help."""

    need: int  # tokens of the next prompt
    have: int  # tokens of the context
    alone: int  # tokens of the prompt with this message and nothing before it
    num_to_drop: int  # of the oldest exchanges, so that it goes; 0: nothing helps, or nothing is needed
    num_to_summarise: int  # the same for a summary in their place

    @classmethod
    def of(cls, conversation: Conversation, content: Content) -> Fit | None:
        """None where the lengths are not known here."""
        need, have = conversation.count_tokens(content), conversation.context_length
        if need is None or have is None:
            return None
        alone = conversation.count_tokens(content, num_dropped=len(conversation.turns))
        assert alone is not None
        num_exchanges = len(conversation.exchanges)
        left = [
            conversation.count_tokens(content, num_dropped=conversation.start_after(number)) or 0
            for number in range(1, num_exchanges + 1)
        ]
        num_to_drop = _first_that_fits(left, have, 0)
        num_to_summarise = _first_that_fits(left, have, conversation.summary_tokens)
        if not conversation.can_summarise(num_to_summarise):
            num_to_summarise = 0
        return cls(need, have, alone, num_to_drop, num_to_summarise)

    @property
    def is_comfortable(self) -> bool:
        return self.need + answer_tokens(self.have) <= self.have

    @property
    def goes(self) -> bool:
        """Whether there is an answer's first token, at least."""
        return self.need < self.have


def _first_that_fits(left: list[int], have: int, more: int) -> int:
    """How many exchanges must go: so many that the context has some space for a while, else all where that is enough
    for an answer at all; 0 where it is not."""
    for number, tokens in enumerate(left, start=1):
        if tokens + more + answer_tokens(have) <= LEFT_SHARE * have:
            return number
    return len(left) if left and left[-1] + more < have else 0


def ensure_fits(chat: Chat, content: Content) -> bool:
    """See to it that `content` and an answer fit; False when the user would rather not send it."""
    fit = Fit.of(chat.conversation, content)
    if fit is None or fit.is_comfortable or (fit.goes and not fit.num_to_drop):
        return True
    if not fit.num_to_drop:
        longer = longer_context(chat.conversation, fit.alone + answer_tokens(fit.have))
        shorter = "a shorter message, or /read less" if chat.attachments else "a shorter message"
        raise KimiLiteError(
            f"The message and the answer's first token need a context of {fit.alone + 1:,} tokens; it has "
            f"{fit.have:,}.",
            f"Try {shorter}{longer}.",
        )
    missing = (
        f"With this message the context holds {fit.need:,} of {fit.have:,} tokens; an answer needs "
        f"{answer_tokens(fit.have):,} more."
    )
    if not chat.is_interactive:
        summarise = f" or /ctx summarise {fit.num_to_summarise}" if fit.num_to_summarise else ""
        longer = longer_context(chat.conversation, fit.need + answer_tokens(fit.have))
        raise KimiLiteError(missing, f"Send /ctx drop {fit.num_to_drop}{summarise} before it{longer}.")
    chat.say(missing)
    return _ask_what_goes(chat, fit)


def _ask_what_goes(chat: Chat, fit: Fit) -> bool:
    """Drop, summarise or cancel; whether the message is to be sent."""
    total = counted(len(chat.conversation.exchanges), "exchange")
    question = f"[d]rop the oldest {fit.num_to_drop} of {total}, "
    if fit.num_to_summarise:
        question += f"[s]ummarise the oldest {fit.num_to_summarise}, "
    try:
        choice = chat.choose(f"{question}or [c]ancel? ", "dsc" if fit.num_to_summarise else "dc")
        if choice == "d":
            drop_oldest(chat, fit.num_to_drop)
        elif choice == "s":
            return summarise_oldest(chat, fit.num_to_summarise)
    except KeyboardInterrupt:
        choice = "c"
    if choice == "c":
        chat.say("not sent")
    return choice != "c"


def longer_context(conversation: Conversation, need: int) -> str:
    """`, or start with -c 13K` where the model is made for it; "" where it is not."""
    most = conversation.max_context_length
    if most is None or need > most:
        return ""
    return f", or start with -c {tokens_flag(min(-(-need // 1024) * 1024, most))}"


def drop_oldest(chat: Chat, num_exchanges: int) -> None:
    chat.conversation.drop_oldest(num_exchanges)
    chat.save()
    chat.say(f"{_exchanges(num_exchanges)} no longer sent; the saved conversation keeps them")


def summarise_oldest(chat: Chat, num_exchanges: int) -> bool:
    """False when the summary was stopped; what was summarised before that is replaced all the same."""
    chat.require_files()
    left = num_exchanges
    while left:
        number = chat.conversation.num_summarisable(left)
        if not number:
            raise KimiLiteError(
                "The oldest exchange is too long to be summarised in this context.", "Say /ctx drop 1 instead."
            )
        of = f" ({left} to go)" if number < left else ""
        chat.say(f"the model summarises {_exchanges(number).rsplit(' ', 1)[0]}{of} ...")
        num_before = chat.conversation.num_dropped
        chat.stream(chat.conversation.summarise_oldest(number, chat.on_prefill))
        if chat.conversation.num_dropped == num_before:
            chat.say("stopped: nothing was dropped" if left == num_exchanges else "stopped")
            return False
        chat.save()
        left -= number
    chat.say(f"{_exchanges(num_exchanges)} replaced by this summary; the saved conversation keeps them")
    return True


def warn_when_nearly_full(chat: Chat, num_used: int) -> None:
    """A word before it is too late."""
    have = chat.conversation.context_length
    if have is not None and num_used > NEARLY_FULL_SHARE * have:
        summarise = " or /ctx summarise" if chat.conversation.can_summarise(1) else ""
        chat.say(
            f"  the context is {100 * num_used / have:.0f} % full ({num_used:,} of {have:,} tokens): "
            f"/ctx drop{summarise}, or /clear"
        )


def _exchanges(number: int) -> str:
    return "the oldest exchange is" if number == 1 else f"the oldest {number} exchanges are"
