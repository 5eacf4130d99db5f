"""Images and videos in clients' requests: `data:` URLs, and files that were uploaded before (`ms://id`, `file_id`).

Nothing is fetched: a server that opens addresses for others opens those of its own network, too. Files are read later,
in a thread, by `media.reader`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kimi_lite.apps.server.errors import ApiError
from kimi_lite.apps.server.files import UploadedFiles

Kind = Literal["image", "video"]
_PARTS: Mapping[str, Kind] = {
    "image_url": "image",
    "image": "image",
    "input_image": "image",  # of responses
    "video_url": "video",
    "video": "video",
    "input_video": "video",
}


@dataclass(slots=True)
class MediaParts:
    """Reads the parts of one request; counts them."""

    can_see: bool
    files: UploadedFiles
    max_parts: int
    _num_parts: int = field(default=0, init=False)

    def read(self, part: Mapping[str, Any], place: str) -> dict[str, Any] | None:
        """A part of OpenAI's shape as the engine takes it; None where it shows nothing. ApiError 400 or 404."""
        kind = _PARTS.get(str(part.get("type")))
        if kind is None:
            return None
        self.count(kind, place)
        if isinstance(part.get("file_id"), str):
            return self.file(kind, part["file_id"], place)
        names = (f"{kind}_url", kind, "url")
        value = next((part[name] for name in names if part.get(name) is not None), None)
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str):
            raise ApiError(400, f"{place} has no URL.", "invalid_value", place)
        if url.startswith("ms://"):
            return self.file(kind, url.removeprefix("ms://"), place)
        return self.data(kind, url, place)

    def data(self, kind: Kind, url: str, place: str) -> dict[str, Any]:
        """A part with a `data:` URL, which was counted."""
        if not url.startswith("data:"):
            problem = f"{place} is at {url[:60]!r}: nothing is fetched here. Send the {kind} as a data: URL"
            raise ApiError(400, f"{problem}, or upload it to /v1/files.", "unsupported_url", place)
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}

    def file(self, kind: Kind, file_id: str, place: str) -> dict[str, Any]:
        """A part with an uploaded file, which was counted."""
        return {"type": f"{kind}_url", f"{kind}_url": {"url": self.files.path(file_id, place).as_uri()}}

    def count(self, kind: Kind, place: str) -> None:
        """One more; ApiError 400 where there is no tower, or they are too many."""
        if not self.can_see:
            problem = f"{place} is {'an image' if kind == 'image' else 'a video'}, and no vision tower is loaded"
            raise ApiError(400, f"{problem}: the server wants --mmproj FILE.", "vision_unsupported", place)
        self._num_parts += 1
        if self._num_parts > self.max_parts:
            problem = f"The request has more than {self.max_parts} images and videos (--max-images)."
            raise ApiError(400, problem, "too_many_images", place)
