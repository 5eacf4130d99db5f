"""A small cache, and a model's work on it: rows whose content depends on every token before them."""

from kimi_lite.kv.pages import KVCache, SequencePages, chain_hash
from kimi_lite.native.latent_rows import PAGE_TOKENS


def content_at(token_ids: list[int], position: int) -> float:
    """What a model would write: a number that depends on every token up to the position."""
    digest = chain_hash(b"row", token_ids[: position + 1])
    return float(int.from_bytes(digest[:3], "little"))  # 24 bits: exact in float32


def write_rows(kv: KVCache, sequence: SequencePages, token_ids: list[int], first: int, last: int) -> None:
    for position in range(first, last):
        page, slot = sequence.pages[position // PAGE_TOKENS], position % PAGE_TOKENS
        kv.storage[:, page, slot] = content_at(token_ids, position)


def check_rows(kv: KVCache, sequence: SequencePages) -> None:
    for position in range(sequence.num_computed):
        page, slot = sequence.pages[position // PAGE_TOKENS], position % PAGE_TOKENS
        expected = content_at(sequence.token_ids, position)
        assert (kv.storage[:, page, slot] == expected).all(), position


def compute(kv: KVCache, sequence: SequencePages, token_ids: list[int], num_tokens: int) -> None:
    """Write and account for the positions up to `num_tokens`."""
    first = sequence.num_computed
    write_rows(kv, sequence, token_ids, first, num_tokens)
    kv.advance(sequence, token_ids[first:num_tokens])


def small_cache(num_pages: int = 8) -> KVCache:
    return KVCache(num_layers=2, latent_size=3, num_pages=num_pages, dtype="f32")


def run_prompt(kv: KVCache, token_ids: list[int]) -> SequencePages:
    sequence = kv.open(token_ids)
    assert kv.reserve(sequence, len(token_ids))
    compute(kv, sequence, token_ids, len(token_ids))
    return sequence
