"""A conversation as one JSON document and back: what session files hold and `/export json` writes.

Token ids mean something to one vocabulary only; a document that another model made is taken without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.turns import Turn, now
from kimi_lite.errors import KimiLiteError

FORMAT, VERSION = "kimi-lite session", 1


def to_document(conversation: Conversation) -> dict[str, Any]:
    """Everything that `load_document` needs, and the model's name for people."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": conversation.created,
        "updated": now(),
        "model": conversation.info.name,
        "model_key": conversation.model_key(),
        "system": conversation.system,
        "settings": conversation.settings.to_json(),
        "summary": conversation.summary,
        "num_dropped": conversation.num_dropped,
        "known_ids": list(conversation.known_ids),
        "turns": [turn.to_json() for turn in conversation.turns],
    }


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """What a document holds, checked."""

    model: str
    model_key: str
    system: str
    settings: AnswerSettings
    summary: str
    created: str
    num_dropped: int
    known_ids: list[int]
    turns: list[Turn]


def read_document(document: object, name: str) -> SavedConversation:
    """The document's parts; KimiLiteError naming `name` when it is not a whole conversation."""
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise KimiLiteError(f"{name} is not a conversation that kimi-lite saved.", "/sessions lists those that are.")
    if document.get("version") != VERSION:
        raise KimiLiteError(
            f"{name} has version {document.get('version')!r}; this program reads {VERSION}.", "Update kimi-lite."
        )
    try:
        texts = {key: document[key] for key in ("model", "model_key", "system", "summary", "created")}
        datetime.fromisoformat(texts["created"])
        saved = SavedConversation(
            **texts,
            settings=AnswerSettings.from_json(document["settings"]),
            num_dropped=int(document["num_dropped"]),
            known_ids=[int(i) for i in document["known_ids"]],
            turns=[Turn.from_json(turn) for turn in document["turns"]],
        )
        for text in (*texts.values(), *(turn.text for turn in saved.turns)):
            text.encode()  # no half characters
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, KimiLiteError) as error:
        raise KimiLiteError(
            f"{name} is damaged: {type(error).__name__}: {error}.", "Delete it or fix it by hand."
        ) from error
    if not 0 <= saved.num_dropped <= len(saved.turns):
        raise KimiLiteError(
            f"{name} is damaged: it drops {saved.num_dropped} of {len(saved.turns)} turns.",
            "Delete it or fix it by hand.",
        )
    return saved


def load_document(conversation: Conversation, document: object, name: str) -> None:
    """Make `conversation` the one in the document; KimiLiteError naming `name`, and nothing changed, when it is no such
    one."""
    saved = read_document(document, name)
    is_same_model = saved.model_key == conversation.model_key()
    conversation.turns = saved.turns if is_same_model else [turn.without_ids() for turn in saved.turns]
    conversation.known_ids = saved.known_ids if is_same_model else []
    conversation.num_dropped, conversation.summary = saved.num_dropped, saved.summary
    conversation.system, conversation.created = saved.system, saved.created
    conversation.settings = saved.settings.with_thinking(saved.settings.is_thinking and conversation.can_think)
