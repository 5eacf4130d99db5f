"""The paged cache: what it hands out, what it finds again, and that nothing it finds is stale."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kimi_lite.memory.kv import KV_DTYPES, KVCache, SequencePages, bytes_per_token, value_bytes
from kimi_lite.model.batch import PAGE_TOKENS
from kimi_lite.model.config import ModelConfig
from tests.memory.cache_case import check_rows, compute, run_prompt, small_cache, write_rows
from tests.model.family import family_metadata


def test_storage_has_the_shape_the_kernels_expect() -> None:
    for name, dtype, length in (
        ("f32", np.float32, 576),
        ("f16", np.float16, 576),
        ("bf16", np.uint16, 576),
        ("q8", np.uint8, 612),
    ):
        kv = KVCache(num_layers=3, latent_size=576, num_pages=5, dtype=name)
        assert kv.storage.shape == (3, 5, 64, length)
        assert kv.storage.dtype == dtype
        assert kv.storage.flags.c_contiguous


def test_what_a_token_of_context_costs() -> None:
    config = ModelConfig.from_metadata(family_metadata("K2.5"))
    sizes = {name: bytes_per_token(config, name) for name in KV_DTYPES}
    assert sizes == {"f32": 140_544, "f16": 70_272, "bf16": 70_272, "q8": 37_332}
    assert all(config.kv_bytes_per_token(value_bytes(config, name)) == size for name, size in sizes.items())


def test_the_storage_may_lie_elsewhere() -> None:
    """A GPU's cache is a torch tensor; tables and copies are the same."""
    torch = pytest.importorskip("torch")
    kv = KVCache(2, 3, 8, "f32", storage=torch.zeros(2, 8, PAGE_TOKENS, 3))
    kv.release(run_prompt(kv, list(range(100))))
    other = kv.open([*range(80), *range(500, 540)])
    assert other.num_cached == 80
    check_rows(kv, other)
    with pytest.raises(AssertionError):
        KVCache(2, 3, 9, "f32", storage=torch.zeros(2, 8, PAGE_TOKENS, 3))


def test_a_fresh_prompt_finds_nothing() -> None:
    sequence = small_cache().open(range(200))
    assert (sequence.num_cached, len(sequence.pages)) == (0, 0)


def test_the_same_prompt_again_recomputes_only_the_last_token() -> None:
    kv = small_cache()
    prompt = list(range(150))
    kv.release(run_prompt(kv, prompt))
    again = kv.open(prompt)
    assert again.num_cached == 149
    check_rows(kv, again)


def test_whole_pages_are_shared_and_the_partial_one_is_copied() -> None:
    kv = small_cache()
    prompt = list(range(150))
    kv.release(run_prompt(kv, prompt))
    a, b = kv.open([*prompt, 7, 8]), kv.open([*prompt, 9, 9])
    assert a.pages[:2].tolist() == b.pages[:2].tolist()
    assert a.pages[2] != b.pages[2]
    compute(kv, a, [*prompt, 7, 8], 152)
    check_rows(kv, b)
    compute(kv, b, [*prompt, 9, 9], 152)
    check_rows(kv, a)


def test_a_prompt_of_whole_pages_does_not_write_into_the_shared_last_page() -> None:
    kv = small_cache()
    prompt = list(range(2 * PAGE_TOKENS))
    first = run_prompt(kv, prompt)
    again = kv.open(prompt)
    assert again.num_cached == 2 * PAGE_TOKENS - 1
    assert again.pages[0] == first.pages[0]
    assert again.pages[1] != first.pages[1]


def test_a_prompt_that_parts_inside_a_page_keeps_the_common_rows() -> None:
    kv = small_cache()
    kv.release(run_prompt(kv, list(range(100))))
    other = kv.open([*range(80), *range(500, 540)])
    assert other.num_cached == 80
    check_rows(kv, other)


def test_uncomputed_rows_are_never_found() -> None:
    kv = small_cache()
    prompt = list(range(200))
    sequence = kv.open(prompt)
    assert kv.reserve(sequence, 200)
    compute(kv, sequence, prompt, 70)
    write_rows(kv, sequence, [0] * 200, 70, 130)  # a cancelled forward leaves rows of no meaning behind
    kv.release(sequence)
    again = kv.open(prompt)
    assert again.num_cached == 70
    check_rows(kv, again)


def test_reserve_takes_all_or_nothing() -> None:
    kv = small_cache(num_pages=4)
    a, b = kv.open([1]), kv.open([2])
    assert kv.reserve(a, 3 * PAGE_TOKENS)
    assert not kv.reserve(b, 2 * PAGE_TOKENS)
    assert (len(b.pages), kv.num_available) == (0, 1)
    assert kv.reserve(b, PAGE_TOKENS)


def test_the_least_recently_used_prefix_is_forgotten_first_and_from_its_end() -> None:
    kv = small_cache(num_pages=6)
    old, new = [1] * 128, [2] * 128
    kv.release(run_prompt(kv, old))
    kv.release(run_prompt(kv, new))
    blocker = kv.open([3])
    assert kv.reserve(blocker, 3 * PAGE_TOKENS)  # two pages were blank, so one of the four idle ones goes
    kv.release(blocker)
    assert kv.open([*old, 0]).num_cached == 64
    assert kv.open([*new, 0]).num_cached == 128


def test_a_longer_tail_replaces_a_shorter_one() -> None:
    kv = small_cache()
    for length in (10, 20, 30):
        kv.release(run_prompt(kv, list(range(length))))
    assert len(kv._published) == 1
    assert kv.open(range(40)).num_cached == 30


def test_a_page_computed_twice_at_once_is_found_once() -> None:
    kv = small_cache()
    prompt = list(range(70))
    a, b = kv.open(prompt), kv.open(prompt)
    for sequence in (a, b):
        assert kv.reserve(sequence, 70)
        compute(kv, sequence, prompt, 70)
    kv.release(b)
    kv.release(a)
    again = kv.open(prompt)
    assert again.pages[0] == a.pages[0]
    assert (len(kv._published), kv.num_available) == (2, kv.num_pages - 2)


def test_releasing_twice_is_a_bug() -> None:
    kv = small_cache()
    sequence = run_prompt(kv, [1, 2, 3])
    kv.release(sequence)
    with pytest.raises(AssertionError):
        kv.release(sequence)


class CacheMachine(RuleBasedStateMachine):
    """Random sequences over two letters (so that prefixes meet often) in a cache that is always too small."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = small_cache(num_pages=7)
        self.live: list[tuple[SequencePages, list[int]]] = []

    @rule(
        letters=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4),
        unit=st.sampled_from([1, 29, 32, 64]),
        odd=st.booleans(),
    )
    def open(self, letters: list[int], unit: int, odd: bool) -> None:
        token_ids = [letter for letter in letters for _ in range(unit)] + [5] * odd
        sequence = self.kv.open(token_ids)
        assert sequence.num_cached <= len(token_ids) - 1
        assert sequence.token_ids == token_ids[: sequence.num_cached]
        check_rows(self.kv, sequence)
        self.live.append((sequence, token_ids))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_tokens=st.integers(1, 100), is_cancelled=st.booleans())
    def extend(self, data: st.DataObject, num_tokens: int, is_cancelled: bool) -> None:
        sequence, token_ids = data.draw(st.sampled_from(self.live), label="sequence")
        token_ids += [len(token_ids) % 3] * max(0, sequence.num_computed + 1 - len(token_ids))  # decode: one more token
        end = min(len(token_ids), sequence.num_computed + num_tokens)
        before, available = sequence.pages, self.kv.num_available
        if not self.kv.reserve(sequence, end):
            assert sequence.pages is before
            assert self.kv.num_available == available
        elif is_cancelled:
            write_rows(self.kv, sequence, [9] * end, sequence.num_computed, end)
        else:
            compute(self.kv, sequence, token_ids, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1), label="index")
        self.kv.release(self.live.pop(index)[0])

    @invariant()
    def holders_are_counted(self) -> None:
        held = [page for sequence, _ in self.live for page in sequence.pages.tolist()]
        assert self.kv._num_holders == [held.count(page) for page in range(self.kv.num_pages)]

    @invariant()
    def every_page_is_held_or_available_once(self) -> None:
        held = {page for sequence, _ in self.live for page in sequence.pages.tolist()}
        pages = [*held, *self.kv._blank, *self.kv._idle]
        assert sorted(pages) == list(range(self.kv.num_pages))
        assert not set(self.kv._published) & set(self.kv._blank)
        assert set(self.kv._idle) <= set(self.kv._published)

    @invariant()
    def unfinished_pages_have_one_owner(self) -> None:
        for sequence, _ in self.live:
            own = sequence.pages[sequence.num_computed // PAGE_TOKENS :].tolist()
            assert all(self.kv._num_holders[page] == 1 for page in own)
            assert not set(own) & set(self.kv._published)

    @invariant()
    def valid_rows_stay_right(self) -> None:
        for sequence, _ in self.live:
            check_rows(self.kv, sequence)

    @invariant()
    def tables_agree(self) -> None:
        for page, content in self.kv._published.items():
            assert page in self.kv._children[content.parent]
            if content.hash is not None:
                assert self.kv._page_of[content.hash] == page
        assert sum(map(len, self.kv._children.values())) == len(self.kv._published)
        assert len(self.kv._page_of) == sum(c.hash is not None for c in self.kv._published.values())


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
