"""A conversation as a document for people: `/export md`, with its images as files of a folder next to it. `/export
json` is the session's own document, which holds them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kimi_lite.engine.conversation import Conversation
from kimi_lite.engine.documents import to_document
from kimi_lite.engine.turns import Turn, num_images
from kimi_lite.media.medium import source_of, url_of
from kimi_lite.text.placeholders import is_shown

FORMATS = ("md", "json")


@dataclass(slots=True)
class Pictures:
    """The images of a document, by their paths in it. `folder`: what they lie in."""

    folder: str
    files: dict[str, bytes] = field(default_factory=dict)

    def link(self, part: Mapping[str, Any]) -> str:
        """Markdown that shows the image; where a video was."""
        source = source_of(part)
        if source.path is not None:
            return f"*({source.kind} {source.path})*"
        suffix = _SUFFIXES.get(url_of(part).partition(";")[0].removeprefix("data:"), "")
        path = f"{self.folder}/{len(self.files) + 1}{suffix}"
        self.files[path] = source.data
        return f"![{source.kind} {len(self.files)}](<{path}>)"


_SUFFIXES = {f"image/{name}": f".{name}" for name in ("png", "gif", "webp", "bmp", "tiff", "avif", "heic")}
_SUFFIXES |= {"image/jpeg": ".jpg", "video/mp4": ".mp4", "video/webm": ".webm"}


def export(conversation: Conversation, form: str, pictures: Pictures) -> str:
    """The whole conversation, dropped turns included. For Markdown, `pictures` takes the images' files."""
    if form == "json":
        return json.dumps(to_document(conversation), ensure_ascii=False, indent=2) + "\n"
    assert form == "md", form
    parts = [f"# A conversation with {conversation.info.name}", f"{_when(conversation.created)} · {conversation.mode}"]
    if conversation.system:
        parts.append(f"**System prompt**\n\n{_quoted(conversation.system)}")
    for index, turn in enumerate(conversation.turns):
        if index == conversation.num_dropped > 0:
            parts.append("*What is above was no longer sent to the model" + _summary(conversation) + "*")
        parts.append(_turn(turn, pictures))
    return "\n\n".join(parts) + "\n"


def _when(created: str) -> str:
    """`28 Nov 2026, 19:16`, the clock of this place."""
    return datetime.fromisoformat(created).astimezone().strftime("%d %b %Y, %H:%M")


def _turn(turn: Turn, pictures: Pictures) -> str:
    heading = {"user": "## You", "assistant": "## Model", "tool": f"## Result of `{turn.name}`"}[turn.role]
    parts = [heading]
    if turn.reasoning.strip():
        parts.append(f"<details><summary>Reasoning</summary>\n\n{turn.reasoning.strip()}\n\n</details>")
    parts += [pictures.link(part) for part in turn.content if is_shown(part)] if num_images(turn.content) else []
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
