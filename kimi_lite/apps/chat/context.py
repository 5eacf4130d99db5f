"""Room in the context for the next message. Nothing is ever cut silently: the user chooses to drop, to summarise, or
not to send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimi_lite.engine.turns import Content
from kimi_lite.errors import KimiLiteError

if TYPE_CHECKING:
    from kimi_lite.apps.chat.chat import Chat

ANSWER_TOKENS = 256  # room that an answer should have at least
ROOMY_SHARE = 0.75  # of the context: when something must go, then enough for a while
NEARLY_FULL_SHARE = 0.85


def answer_tokens(context_length: int) -> int:
    return min(ANSWER_TOKENS, context_length // 8)


def make_room(chat: Chat, content: Content) -> bool:
    """See to it that `content` and an answer fit; False when the user would rather not send it."""
    session = chat.session
    need, have = session.count_tokens(content), session.context_length
    if need is None or have is None or need + answer_tokens(have) <= have:
        return True
    num_old = num_to_go(chat, content, have)
    alone = session.count_tokens(content, num_dropped=len(session.turns))
    assert alone is not None
    if num_old == 0 or alone >= have:
        if need < have:  # tight, but it goes
            return True
        raise KimiLiteError(
            f"The message and the answer's first token need a context of {alone + 1:,} tokens; it has {have:,}.",
            f"Try -c {alone // 1024 + 2}K when you start, or a shorter message.",
        )
    missing = (
        f"With this message the context holds {need:,} of {have:,} tokens; an answer needs "
        f"{answer_tokens(have):,} more."
    )
    if not chat.is_interactive:
        raise KimiLiteError(
            missing, f"Send /ctx drop {num_old} or /ctx summarise {num_old} before it, or start with a larger -c."
        )
    chat.say(missing)
    what = f"the oldest {num_old} of {len(session.exchanges)} exchanges"
    choice = chat.choose(f"[d]rop {what}, [s]ummarise them, or [c]ancel? ", "dsc")
    if choice == "d":
        drop_oldest(chat, num_old)
    elif choice == "s":
        return summarise_oldest(chat, num_old)
    return choice != "c"


def num_to_go(chat: Chat, content: Content, have: int) -> int:
    """How many of the oldest exchanges must go so that the message leaves the context roomy; all of them where none is
    enough."""
    session = chat.session
    for num_exchanges in range(1, len(session.exchanges) + 1):
        need = session.count_tokens(content, num_dropped=session.start_after(num_exchanges))
        if need + answer_tokens(have) <= ROOMY_SHARE * have:
            return num_exchanges
    return len(session.exchanges)


def drop_oldest(chat: Chat, num_exchanges: int) -> None:
    chat.session.drop_oldest(num_exchanges)
    chat.autosave.save()
    chat.say(f"{_exchanges(num_exchanges)} no longer sent; the record keeps them")


def summarise_oldest(chat: Chat, num_exchanges: int) -> bool:
    """False when the summary was stopped; nothing is dropped then."""
    num_before = chat.session.num_dropped
    chat.say("the model sums the oldest exchanges up ...")
    chat.stream(lambda report: chat.session.summarise_oldest(num_exchanges, report))
    if chat.session.num_dropped == num_before:
        chat.say("stopped: nothing was dropped")
        return False
    chat.autosave.save()
    chat.say(f"{_exchanges(num_exchanges)} replaced by this summary; the record keeps them")
    return True


def warn_when_nearly_full(chat: Chat, num_used: int) -> None:
    """A word before it is too late."""
    have = chat.session.context_length
    if have is not None and num_used > NEARLY_FULL_SHARE * have:
        chat.say(
            f"  the context is {100 * num_used / have:.0f} % full ({num_used:,} of {have:,} tokens): /ctx drop "
            f"or /ctx summarise"
        )


def _exchanges(number: int) -> str:
    return "the oldest exchange is" if number == 1 else f"the oldest {number} exchanges are"
