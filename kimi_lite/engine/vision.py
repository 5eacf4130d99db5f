"""Images and videos of a conversation: each is read once, shown to the vision tower once, and placed into prompts.

In the ids of a prompt every placeholder of an image is written as a negative number made of what the image shows
(`mark_of`). So ids that are kept for the next prompt compare equal only where their images are equal, too; `Request`
gets the vocabulary's id and the features in their place.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np

from kimi_lite.engine.types import PlacedImage, Request
from kimi_lite.errors import KimiLiteError
from kimi_lite.media.features import FeatureStore
from kimi_lite.media.medium import Item, Medium, source_of, url_of
from kimi_lite.media.reader import MediaReader
from kimi_lite.model.vision.patches import EncodingStopped, Patches
from kimi_lite.text.placeholders import is_shown, kind_of
from kimi_lite.text.template import ChatTemplate, EncodedPrompt
from kimi_lite.units import counted

MAX_KEPT_BYTES = 512 << 20  # of patches of media that were read
Key = tuple[object, ...]  # of a part: what is read once
OnMedia = Callable[[str, int, int], None]  # what is done, units done, units in all
NO_TOWER_HINT = (
    "Put the model's vision file (mmproj-*.gguf, where its GGUF is; kimi-lite pull brings it along) next to the model, "
    "or name it by --mmproj FILE; or use --endpoint URL of a server whose model sees."
)


class ShownItem(NamedTuple):
    """An item with the name that its features have in caches."""

    item: Item
    digest: bytes  # of the patches and the tower

    @property
    def num_tokens(self) -> int:
        return self.item.patches.grid.num_tokens()


class Tower(Protocol):
    """What is needed of `model.vision`'s tower."""

    def encode(
        self,
        patches: Patches,
        on_progress: OnMedia | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> np.ndarray:
        """float32 (tokens, D) of one item. Raises EncodingStopped where `should_stop` said so."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class MarkedPrompt:
    """A prompt's ids with marks in the place of what is shown, in the order of `items`."""

    ids: list[int]
    starts_in_reasoning: bool
    items: tuple[ShownItem, ...] = ()


class Vision:
    """A tower with what was read and seen so far; any thread may ask."""

    def __init__(self, tower: Tower, tower_key: str, reader: MediaReader, store: FeatureStore) -> None:
        self.tower, self.reader, self.store = tower, reader, store
        self._tower_key = tower_key
        self._media: OrderedDict[Key, Medium] = OrderedDict()  # by source, least recently used first
        self._reading, self._seeing = threading.Lock(), threading.Lock()
        self.num_encoded = 0  # items, by the tower, since the start

    def read(self, part: Mapping[str, Any], report: OnMedia | None = None) -> Medium:
        """An OpenAI content part's image or video. Raises KimiLiteError where there is none that can be read."""
        key = _key_of(part)
        with self._reading:
            medium = self._media.pop(key, None)
            if medium is None:
                source = source_of(part)
                words = f"reading {source.name}"
                medium = self.reader.read(source, report and (lambda done, total: report(words, done, total)))
            self._media[key] = medium
            total = sum(_num_bytes(*each) for each in self._media.items())
            while total > MAX_KEPT_BYTES and len(self._media) > 1:
                total -= _num_bytes(*self._media.popitem(last=False))
        return medium

    def shown(self, medium: Medium) -> tuple[ShownItem, ...]:
        names = (blake2b(item.digest, digest_size=16, key=self._tower_key.encode()[:64]) for item in medium.items)
        return tuple(ShownItem(item, name.digest()) for item, name in zip(medium.items, names, strict=True))

    def see(
        self,
        items: Sequence[ShownItem],
        report: OnMedia | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[np.ndarray] | None:
        """Features of each, float32 (tokens, D): kept ones, or by the tower. None where `should_stop` said so."""
        features = []
        for number, one in enumerate(items, 1):
            if should_stop is not None and should_stop():
                return None
            kept = self.store.get(one.digest, one.num_tokens)
            if kept is None:
                of = f" ({number} of {len(items)})" if len(items) > 1 else ""
                tell = report and (lambda what, done, total, of=of: report(f"{what}{of}", done, total))
                try:
                    kept = self._encode(one, tell, should_stop)
                except EncodingStopped:
                    return None
            features.append(kept)
        return features

    def _encode(self, one: ShownItem, report: OnMedia | None, should_stop: Callable[[], bool] | None) -> np.ndarray:
        with self._seeing:
            kept = self.store.get(one.digest, one.num_tokens)  # another thread saw it meanwhile
            if kept is None:
                features = self.tower.encode(one.item.patches, report, should_stop)
                kept = self.store.put(one.digest, features)
                self.num_encoded += 1
        return kept

    def counters(self) -> Mapping[str, float]:
        return {
            "images_seen": self.num_encoded,
            "images_found": self.store.num_found,
            "images_saved": self.store.num_saved,
        }

    def close(self) -> None:
        self.tower.close()


def encode_prompt(
    template: ChatTemplate,
    vision: Vision | None,
    messages: Sequence[Mapping[str, Any]],
    report: OnMedia | None = None,
    **settings: Any,
) -> MarkedPrompt:
    """The prompt of messages that may show images and videos; settings: as `ChatTemplate.encode` has them.
    KimiLiteError where they cannot be read, or there is no tower."""
    parts = shown_parts(messages)
    if not parts:
        prompt = template.encode(messages, media=(), **settings)
        return MarkedPrompt(prompt.ids, prompt.starts_in_reasoning)
    if vision is None:
        raise KimiLiteError(f"{counted(len(parts), 'image')} cannot be seen: no vision tower is loaded.", NO_TOWER_HINT)
    media = [vision.read(part, report) for part in parts]
    stamps = [[item.stamp for item in medium.items] for medium in media]
    items = [one for medium in media for one in vision.shown(medium)]
    prompt = template.encode(messages, media=stamps, **settings)
    return MarkedPrompt(_marked(prompt, items), prompt.starts_in_reasoning, tuple(items))


def shown_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The images and videos of messages, in order."""
    contents = [message.get("content") for message in messages]
    lists = [content for content in contents if isinstance(content, (list, tuple))]
    return [part for parts in lists for part in parts if is_shown(part)]


def mark_of(digest: bytes) -> int:
    """The negative number that stands for a placeholder of what has this digest."""
    return -1 - int.from_bytes(digest[:6])


def _marked(prompt: EncodedPrompt, items: Sequence[ShownItem]) -> list[int]:
    """Each place becomes as many marks as its item has tokens."""
    assert len(prompt.places) == len(items), (len(prompt.places), len(items))
    ids, start = [], 0
    for place, item in zip(prompt.places, items, strict=True):
        ids += [*prompt.ids[start:place], *([mark_of(item.digest)] * item.num_tokens)]
        start = place + 1
    return [*ids, *prompt.ids[start:]]


def without_marks(ids: Sequence[int], pad_id: int) -> tuple[int, ...]:
    """As the model reads them."""
    return tuple(pad_id if i < 0 else i for i in ids)


def placed(ids: Sequence[int], items: Sequence[ShownItem], features: Sequence[np.ndarray]) -> tuple[PlacedImage, ...]:
    """Where in marked ids each item stands, with its features."""
    images, position = [], 0
    for item, rows in zip(items, features, strict=True):
        position = next(i for i in range(position, len(ids)) if ids[i] < 0)
        assert all(i == mark_of(item.digest) for i in ids[position : position + item.num_tokens]), position
        images.append(PlacedImage(position, rows, item.digest))
        position += item.num_tokens
    return tuple(images)


def marked_ids(request: Request) -> list[int]:
    """A request's prompt with its marks again."""
    ids = list(request.prompt_ids)
    for image in request.images:
        ids[image.position : image.end] = [mark_of(image.digest)] * len(image.features)
    return ids


def _num_bytes(key: Key, medium: Medium) -> int:
    return medium.num_bytes + len(str(key[1]))


def _key_of(part: Mapping[str, Any]) -> Key:
    """Equal only for the same bytes, or a file that was not touched. A conversation keeps its URLs, so that they are
    mostly the same objects, which compare at once, however long."""
    source_kind, url = str(kind_of(part)), url_of(part)
    if not url.startswith("file:"):
        return source_kind, url
    path = source_of(part).path
    try:
        status = path.stat() if path is not None else None
    except OSError:
        status = None  # reading it says what is wrong
    return source_kind, url, status and (status.st_size, status.st_mtime_ns, status.st_ino)
