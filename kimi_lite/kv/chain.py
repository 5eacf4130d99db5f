"""What a page of the cache is called: a hash chained over all tokens up to its end, which is all that its content
depends on.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from kimi_lite.native.latent_rows import PAGE_TOKENS

ROOT = b""  # the hash before the first page


class Link(NamedTuple):
    """A page of a prompt: `token_ids` (64, or fewer in the last) after the pages of `parent`."""

    parent: bytes
    token_ids: tuple[int, ...]
    hash: bytes


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a page."""
    return blake2b(parent + np.asarray(token_ids, np.int32).tobytes(), digest_size=16).digest()


def chain(token_ids: Sequence[int], num_pages: int) -> Iterator[Link]:
    """The first whole pages of a prompt."""
    parent = ROOT
    for first in range(0, num_pages * PAGE_TOKENS, PAGE_TOKENS):
        chunk = tuple(token_ids[first : first + PAGE_TOKENS])
        page_hash = chain_hash(parent, chunk)
        yield Link(parent, chunk, page_hash)
        parent = page_hash


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
