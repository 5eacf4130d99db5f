"""What a page of the cache is called: a hash chained over the keys of all positions up to its end, on which alone its
content depends.

A position's key is its token id. Where the id does not say all, as for the placeholder ids of an image, a salt (a
digest of the image) joins it: at the first placeholder, as the chain carries it on to all pages behind. Sequences with
the same ids and other salts share the pages before the first salted position and the rows of its page before it, and
no more.
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from kimi_lite.native.latent_rows import PAGE_TOKENS

ROOT = b""  # the hash before the first page
SALT_BYTES = 16
PACKED_BYTES = 4 + PAGE_TOKENS * (4 + SALT_BYTES)  # of `pack`

Key = int | tuple[int, bytes]  # token id, with the digest of a salt where there is one


class Salt(NamedTuple):
    """What stands at `position` in addition to its token id, as any bytes: an image, or a digest of it."""

    position: int
    value: bytes


class Link(NamedTuple):
    """A page of a prompt: `keys` (64, or fewer in the last) after the pages of `parent`."""

    parent: bytes
    keys: tuple[Key, ...]
    hash: bytes


def digests_of(salts: Sequence[Salt]) -> dict[int, bytes]:
    """By position, the bytes that join the token ids there."""
    return {position: blake2b(value, digest_size=SALT_BYTES).digest() for position, value in salts}


def keys_of(token_ids: Sequence[int], digests: Mapping[int, bytes], first: int = 0) -> list[Key]:
    """The keys of the positions `first` and on, which have these ids."""
    keys: list[Key] = list(map(int, token_ids))
    for position, digest in digests.items():
        if first <= position < first + len(keys):
            keys[position - first] = (keys[position - first], digest)
    return keys


def chain_hash(parent: bytes, keys: Sequence[Key]) -> bytes:
    """The name of a page."""
    salts = b"".join(index.to_bytes(4) + key[1] for index, key in enumerate(keys) if isinstance(key, tuple))
    return blake2b(parent + len(keys).to_bytes(4) + _ids(keys).tobytes() + salts, digest_size=16).digest()


def chain(token_ids: Sequence[int], num_pages: int, salts: Sequence[Salt] = ()) -> Iterator[Link]:
    """The first whole pages of a prompt."""
    parent, digests = ROOT, digests_of(salts)
    for first in range(0, num_pages * PAGE_TOKENS, PAGE_TOKENS):
        keys = tuple(keys_of(token_ids[first : first + PAGE_TOKENS], digests, first))
        page_hash = chain_hash(parent, keys)
        yield Link(parent, keys, page_hash)
        parent = page_hash


def num_common(a: Sequence[Key], b: Sequence[Key]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pack(keys: Sequence[Key]) -> bytes:
    """At most a page of keys in PACKED_BYTES: int32 count, int32 (64,) ids, uint8 (64, 16) salts, zeros for none."""
    ids = np.zeros(1 + PAGE_TOKENS, np.int32)
    ids[0], ids[1 : 1 + len(keys)] = len(keys), _ids(keys)
    salts = b"".join(key[1] if isinstance(key, tuple) else bytes(SALT_BYTES) for key in keys)
    return (ids.tobytes() + salts).ljust(PACKED_BYTES, b"\0")


def unpack(data: bytes) -> tuple[Key, ...]:
    """What `pack` packed; of other bytes any keys, or none."""
    data = data.ljust(PACKED_BYTES, b"\0")
    count, *ids = np.frombuffer(data, np.int32, 1 + PAGE_TOKENS).tolist()
    first = 4 * (1 + PAGE_TOKENS)
    salts = [data[first + SALT_BYTES * i :][:SALT_BYTES] for i in range(min(max(count, 0), PAGE_TOKENS))]
    return tuple((ids[i], salt) if any(salt) else ids[i] for i, salt in enumerate(salts))


def _ids(keys: Sequence[Key]) -> np.ndarray:
    return np.array([key[0] if isinstance(key, tuple) else key for key in keys], np.int32)
