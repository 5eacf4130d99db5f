"""A small cache, and a model's work on it: rows whose content depends on every token before them."""

from collections.abc import Sequence

from kimi_lite.kv.chain import Key, Salt, chain_hash, keys_of
from kimi_lite.kv.pages import KVCache, SequencePages
from kimi_lite.native.latent_rows import PAGE_TOKENS


def content_at(keys: Sequence[Key], position: int) -> float:
    """What a model would write: a number that depends on every token (and image) up to the position."""
    digest = chain_hash(b"row", keys[: position + 1])
    return float(int.from_bytes(digest[:3], "little"))  # 24 bits: exact in float32


def write_rows(kv: KVCache, sequence: SequencePages, token_ids: list[int], first: int, last: int) -> None:
    keys = keys_of(token_ids, sequence.digests)
    for position in range(first, last):
        page, row = sequence.pages[position // PAGE_TOKENS], position % PAGE_TOKENS
        kv.storage[:, page, row] = content_at(keys, position)


def check_rows(kv: KVCache, sequence: SequencePages) -> None:
    for position in range(sequence.num_computed):
        page, row = sequence.pages[position // PAGE_TOKENS], position % PAGE_TOKENS
        expected = content_at(sequence.keys, position)
        assert (kv.storage[:, page, row] == expected).all(), position


def compute(kv: KVCache, sequence: SequencePages, token_ids: list[int], num_tokens: int) -> None:
    """Write and account for the positions up to `num_tokens`."""
    first = sequence.num_computed
    write_rows(kv, sequence, token_ids, first, num_tokens)
    kv.advance(sequence, token_ids[first:num_tokens])


SMALL_PAGE_SHAPE = (2, PAGE_TOKENS, 12)  # bytes


def small_cache(num_pages: int = 8, **more: object) -> KVCache:
    return KVCache(num_layers=2, latent_size=3, num_pages=num_pages, dtype="f32", **more)


def run_prompt(kv: KVCache, token_ids: list[int], salts: Sequence[Salt] = ()) -> SequencePages:
    sequence = kv.open(token_ids, salts)
    assert kv.reserve(sequence, len(token_ids))
    compute(kv, sequence, token_ids, len(token_ids))
    return sequence
