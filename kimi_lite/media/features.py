"""What the vision tower made of an image, kept: in memory, and on disk where prefixes are kept, under the same limit.

    <prefix folder>/<tower key>/<digest of the patches>.features
    | "KLFEAT1\\n" | blake2b-128 of the name and the data | float32 (tokens, D) |

A file is complete or absent, and its checksum covers its name, so that a damaged one is never believed.
"""

import logging
import threading
from collections import OrderedDict
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np

from kimi_lite.files import whole_file
from kimi_lite.kv.disk import prune

MAX_MEMORY_BYTES = 1 << 30  # a dozen of the largest images for Kimi K2.5
_MAGIC = b"KLFEAT1\n"
_DIGEST_BYTES = 16


class FeatureStore:
    """Features of `width` numbers a token, of one tower; any thread may ask."""

    def __init__(
        self,
        width: int,
        folder: Path | None = None,
        tower_key: str = "",
        max_bytes: int = 0,
        max_memory_bytes: int = MAX_MEMORY_BYTES,
    ) -> None:
        """folder: that of the prefixes, which with the features may hold `max_bytes`; None: only in memory."""
        self._width, self._folder, self._max_bytes, self._max_memory_bytes = width, folder, max_bytes, max_memory_bytes
        self._own = None if folder is None else folder / tower_key
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.num_found = self.num_saved = 0  # images, since the start; found: in memory or on disk

    def get(self, digest: bytes, num_tokens: int) -> np.ndarray | None:
        """float32 (tokens, D), read-only; None where they are not kept."""
        with self._lock:
            features = self._kept.get(digest)
            if features is not None:
                self._kept.move_to_end(digest)
        if features is None:
            features = self._read(digest, num_tokens)
            if features is not None:
                self._keep(digest, features)
        if features is not None:
            assert features.shape == (num_tokens, self._width), (features.shape, num_tokens, self._width)
            self.num_found += 1
        return features

    def put(self, digest: bytes, features: np.ndarray) -> np.ndarray:
        """Keep them; the same, read-only."""
        assert features.dtype == np.float32 and features.shape[1:] == (self._width,), (features.dtype, features.shape)
        features = np.ascontiguousarray(features)
        features.flags.writeable = False
        self._keep(digest, features)
        self._write(digest, features)
        return features

    def _keep(self, digest: bytes, features: np.ndarray) -> None:
        with self._lock:
            self._kept[digest] = features
            total = sum(each.nbytes for each in self._kept.values())
            while total > self._max_memory_bytes:
                total -= self._kept.popitem(last=False)[1].nbytes

    def _path(self, digest: bytes) -> Path | None:
        return None if self._own is None else self._own / f"{digest.hex()}.features"

    def _read(self, digest: bytes, num_tokens: int) -> np.ndarray | None:
        path = self._path(digest)
        if path is None:
            return None
        num_bytes = 4 * num_tokens * self._width
        try:
            with path.open("rb") as file:
                head, data = file.read(len(_MAGIC) + _DIGEST_BYTES), file.read(num_bytes + 1)
            path.touch()
        except OSError:  # none, or a folder that is only to be read
            return None
        if len(data) != num_bytes or head != _head(path, data):
            logging.getLogger(__name__).warning("The saved image %s is damaged; it is deleted and read again.", path)
            with suppress(OSError):
                path.unlink()
            return None
        return np.frombuffer(data, np.float32).reshape(num_tokens, self._width)

    def _write(self, digest: bytes, features: np.ndarray) -> None:
        """Where the disk refuses, that is said once and the images are kept in memory alone."""
        path = self._path(digest)
        if path is None or self._folder is None:
            return
        data = features.tobytes()
        if len(data) > self._max_bytes:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_file(path, "wb", permissions=0o600) as file:
                file.write(_head(path, data))
                file.write(data)
            prune(self._folder, self._max_bytes)
        except OSError as error:
            self._own = None
            words = error.strerror or error
            logging.getLogger(__name__).warning("Images are no longer saved to %s: %s.", self._folder, words)
        else:
            self.num_saved += 1


def _head(path: Path, data: bytes) -> bytes:
    """Before the data in a file of this name."""
    key = blake2b(path.name.encode()).digest()
    return _MAGIC + blake2b(data, digest_size=_DIGEST_BYTES, key=key).digest()
