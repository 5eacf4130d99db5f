"""A conversation as one JSON document and back: what session files hold and `/export json` writes.

Token ids mean something to one vocabulary only; a document that another model made is taken without them.
"""

from collections.abc import Mapping
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


def load_document(conversation: Conversation, document: Mapping[str, Any], name: str) -> None:
    """Make `conversation` the one in the document; KimiLiteError naming `name`, and nothing changed, when it is no such
    one."""
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise KimiLiteError(f"{name} is not a conversation that kimi-lite saved.", "/sessions lists those that are.")
    if document.get("version") != VERSION:
        raise KimiLiteError(
            f"{name} has version {document.get('version')!r}; this program reads {VERSION}.", "Update kimi-lite."
        )
    try:
        turns = [Turn.from_json(turn) for turn in document["turns"]]
        settings = AnswerSettings.from_json(document["settings"])
        texts = {key: document[key] for key in ("system", "summary", "created")}
        num_dropped, known_ids = int(document["num_dropped"]), [int(i) for i in document["known_ids"]]
        is_sound = 0 <= num_dropped <= len(turns) and all(isinstance(text, str) for text in texts.values())
    except (KeyError, TypeError, ValueError, AttributeError, KimiLiteError) as error:
        raise KimiLiteError(
            f"{name} is damaged: {type(error).__name__}: {error}.", "Delete it or mend it by hand."
        ) from error
    if not is_sound:
        raise KimiLiteError(
            f"{name} is damaged: it drops {num_dropped} of {len(turns)} turns.", "Delete it or mend it by hand."
        )
    if document.get("model_key") != conversation.model_key():
        turns, known_ids = [turn.without_ids() for turn in turns], []
    conversation.turns, conversation.known_ids, conversation.num_dropped = turns, known_ids, num_dropped
    conversation.system, conversation.summary, conversation.created = (
        texts["system"],
        texts["summary"],
        texts["created"],
    )
    is_thinking = settings.is_thinking and conversation.can_think
    conversation.settings = settings.with_thinking(is_thinking)
