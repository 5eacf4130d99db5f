"""Where images and videos stand in a prompt: one `<|media_pad|>` for each run of tokens that the model is shown.

A template that knows images writes the pad itself, and for a video a word that is replaced here before anything is
tokenized, by a time stamp and a pad for every few frames (Kimi K2.5's processor). For a template that knows none, the
parts are given to it as texts that cannot be guessed, and those are replaced. So nothing that a message says becomes a
place for an image.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.sandbox import Segment

PAD = "<|media_pad|>"
VIDEO = "<|kimi_k25_video_placeholder|>"  # no token: Kimi's template writes it as text
_BEGINNINGS = ("<|media_begin|>", "<|media_start|>")  # K2.5's, Kimi-VL's
_CONTENT, _END = "<|media_content|>", "<|media_end|>"
_IMAGE_PARTS, _VIDEO_PARTS = ("image", "image_url"), ("video", "video_url")
Stamps = Sequence[str]  # of one image or video, for each run of its tokens: the time, "" for an image


@dataclass(slots=True)
class Placeholders:
    """The places of one prompt. `special`: the vocabulary's control tokens."""

    special: Mapping[str, int]
    _secret: str = field(default_factory=lambda: f"\ue000{secrets.token_hex(16)}\ue001")

    def hide(self, messages: list[Mapping], shows_images: bool, shows_videos: bool) -> list[Mapping]:
        """Messages whose images and videos are texts where the template cannot write them."""
        return [self._hidden(message, shows_images, shows_videos) for message in messages]

    def _hidden(self, message: Mapping, shows_images: bool, shows_videos: bool) -> Mapping:
        parts = message.get("content")
        if not isinstance(parts, list) or not any(is_shown(part) for part in parts):
            return message
        is_known = {"image": shows_images, "video": shows_videos, None: True}
        hidden = [part if is_known[kind_of(part)] else {"type": "text", "text": self._secret} for part in parts]
        if all(part.get("type") == "text" for part in hidden):
            return {**message, "content": "".join(str(part.get("text", "")) for part in hidden)}
        return {**message, "content": hidden}

    def fill(self, segments: Sequence[Segment], media: Sequence[Stamps]) -> list[Segment]:
        """The prompt with every place written out. KimiLiteError where there are more or fewer places than media."""
        waiting = list(media)
        filled: list[Segment] = []
        num_places = 0
        for segment in self._split(segments):
            if segment.text not in (PAD, VIDEO, self._secret) or not segment.is_control:
                filled.append(segment)
                continue
            num_places += 1
            stamps = waiting.pop(0) if waiting else ()
            filled += [segment] if segment.text == PAD else self._written(stamps)
        if num_places != len(media):
            raise KimiLiteError(
                f"The conversation shows {len(media)} images and videos, and the chat template made "
                f"{num_places} places for them.",
                "The model's template does not follow Kimi's: show them in messages of the user only.",
            )
        return list(_joined(filled))

    def _split(self, segments: Sequence[Segment]) -> Iterator[Segment]:
        """The hidden texts, and the word for a video, as segments of their own."""
        for segment in segments:
            if segment.is_control:
                yield segment
                continue
            first, *others = segment.text.split(self._secret)
            yield Segment(first, False)
            for text in others:
                yield Segment(self._secret, True)
                yield Segment(text, False)

    def _written(self, stamps: Stamps) -> Iterator[Segment]:
        begin = next((token for token in _BEGINNINGS if token in self.special), "")
        for stamp in stamps:
            kind = "video" if stamp else "image"
            yield Segment(stamp, False)
            if begin and _END in self.special:
                yield from (Segment(begin, True), Segment(kind, False), Segment(_CONTENT, True))
            yield Segment(PAD, True)
            if begin and _END in self.special:
                yield Segment(_END, True)
            if not stamp:
                yield Segment("\n", False)


def kind_of(part: object) -> Literal["image", "video"] | None:
    """What a content part shows; None for text and what else there may be."""
    name = part.get("type") if isinstance(part, Mapping) else None
    return "image" if name in _IMAGE_PARTS else "video" if name in _VIDEO_PARTS else None


def is_shown(part: object) -> bool:
    """Whether a content part is an image or a video."""
    return kind_of(part) is not None


def _joined(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Neighbouring texts as one: they are tokenized together."""
    text = ""
    for segment in segments:
        if not segment.is_control:
            text += segment.text
            continue
        if text:
            yield Segment(text, False)
        text = ""
        yield segment
    if text:
        yield Segment(text, False)
