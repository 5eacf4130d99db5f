"""Random work on a cache that is always too small: what it hands out is right, no page is lost, with one tier and with
three."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kimi_lite.kv.chain import Key, Salt, keys_of
from kimi_lite.kv.disk import PrefixStore
from kimi_lite.kv.pages import KVCache, SequencePages
from kimi_lite.native.latent_rows import PAGE_TOKENS
from tests.kv.cache_case import SMALL_PAGE_SHAPE, check_rows, compute, content_at, small_cache, write_rows

SALTS = st.lists(
    st.builds(Salt, st.sampled_from([0, 20, 63, 64, 100]), st.sampled_from([b"cat", b"dog"])),
    max_size=2,
    unique_by=lambda salt: salt.position,
)


class CacheMachine(RuleBasedStateMachine):
    """Random sequences over two letters (so that prefixes meet often) in a cache that is always too small."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = self.new_cache()
        self.live: list[tuple[SequencePages, list[int]]] = []

    def new_cache(self) -> KVCache:
        return small_cache(num_pages=7)

    @rule(
        letters=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4),
        unit=st.sampled_from([1, 29, 32, 64]),
        odd=st.booleans(),
        salts=SALTS,
    )
    def open(self, letters: list[int], unit: int, odd: bool, salts: list[Salt]) -> None:
        token_ids = [letter for letter in letters for _ in range(unit)] + [5] * odd
        sequence = self.kv.open(token_ids, salts)
        assert sequence.num_cached <= len(token_ids) - 1
        assert sequence.keys == keys_of(token_ids, sequence.digests)[: sequence.num_cached]
        check_rows(self.kv, sequence)
        self.live.append((sequence, token_ids))

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        num_tokens=st.sampled_from([1, 30, 64, 100, 256]),
        is_cancelled=st.sampled_from([False] * 4 + [True]),
    )
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
            self.after_compute(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_one(data.draw(st.integers(0, len(self.live) - 1), label="index"))

    def release_one(self, index: int) -> None:
        self.kv.release(self.live.pop(index)[0])

    def after_compute(self, sequence: SequencePages) -> None:
        """For a machine that keeps account of pages."""

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


class TieredMachine(CacheMachine):
    """The same with three pages in RAM behind it and files behind those; now and then the process ends and another
    begins."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kimi-lite-test-"))
        self.keys_of_page: dict[bytes, tuple[Key, ...]] = {}  # of every page that was ever whole, with all before it
        self.num_computed = 0
        super().__init__()

    def new_cache(self) -> KVCache:
        prefixes = PrefixStore(self.folder, "model", SMALL_PAGE_SHAPE, max_bytes=20_000, min_tokens=PAGE_TOKENS)
        return small_cache(num_pages=7, num_host_pages=3, prefixes=prefixes)

    @rule(letters=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=4))
    def whole_request(self, letters: list[int]) -> None:
        token_ids = [letter for letter in letters for _ in range(PAGE_TOKENS)] + [5]
        sequence = self.kv.open(token_ids)
        check_rows(self.kv, sequence)
        if self.kv.reserve(sequence, len(token_ids)):
            compute(self.kv, sequence, token_ids, len(token_ids))
            self.after_compute(sequence)
        self.kv.release(sequence)

    @precondition(lambda self: self.num_computed >= 8)
    @rule()
    def restart(self) -> None:
        self.num_computed = 0
        while self.live:
            self.release_one(0)
        self.kv.prefixes.close()
        self.kv = self.new_cache()

    def teardown(self) -> None:
        self.kv.prefixes.close()
        shutil.rmtree(self.folder)

    def after_compute(self, sequence: SequencePages) -> None:
        self.num_computed += 1
        self.kv.prefixes.flush()  # so that a run can be repeated exactly
        for index, page_hash in enumerate(sequence.hashes):
            self.keys_of_page[page_hash] = tuple(sequence.keys[: (index + 1) * PAGE_TOKENS])

    @invariant()
    def what_lies_in_ram_is_right(self) -> None:
        host = self.kv.host
        assert sorted([*host._place_of.values(), *host._free]) == list(range(host.num_pages))
        for page_hash, place in host._place_of.items():
            keys = self.keys_of_page[page_hash]
            expected = [content_at(keys, position) for position in (len(keys) - PAGE_TOKENS, len(keys) - 1)]
            assert (host.page(place)[:, [0, -1]] == np.array(expected)[:, None]).all()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTieredMachine = TieredMachine.TestCase
TestTieredMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
