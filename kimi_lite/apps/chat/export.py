"""A conversation as a document for people: `/export md`. `/export json` is the session's own document."""

import json
from datetime import datetime

from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.documents import to_document
from kimi_lite.engine.turns import Turn, num_images

FORMATS = ("md", "json")


def export(conversation: Conversation, form: str) -> str:
    """The whole conversation, dropped turns included."""
    if form == "json":
        return json.dumps(to_document(conversation), ensure_ascii=False, indent=2) + "\n"
    assert form == "md", form
    parts = [f"# A conversation with {conversation.info.name}", f"{_when(conversation.created)} · {conversation.mode}"]
    if conversation.system:
        parts.append(f"**System prompt**\n\n{_quoted(conversation.system)}")
    for index, turn in enumerate(conversation.turns):
        if index == conversation.num_dropped > 0:
            parts.append("*What is above was no longer sent to the model" + _summary(conversation) + "*")
        parts.append(_turn(turn))
    return "\n\n".join(parts) + "\n"


def _when(created: str) -> str:
    """`28 Nov 2026, 19:16`, the clock of this place."""
    return datetime.fromisoformat(created).astimezone().strftime("%d %b %Y, %H:%M")


def _turn(turn: Turn) -> str:
    heading = {"user": "## You", "assistant": "## Model", "tool": f"## Result of `{turn.name}`"}[turn.role]
    parts = [heading]
    if turn.reasoning.strip():
        parts.append(f"<details><summary>Reasoning</summary>\n\n{turn.reasoning.strip()}\n\n</details>")
    if num_images(turn.content):
        parts.append(f"*({num_images(turn.content)} image(s))*")
    if turn.text.strip():
        parts.append(turn.text.strip())
    parts += [f"Calls `{call.name}`:\n\n```json\n{call.arguments}\n```" for call in turn.calls]
    if turn.finish_reason in ("cancelled", "length"):
        parts.append("*(stopped)*" if turn.finish_reason == "cancelled" else "*(cut at the limit)*")
    return "\n\n".join(parts)


def _summary(conversation: Conversation) -> str:
    return f", but for this summary: {conversation.summary}" if conversation.summary else "."


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())
