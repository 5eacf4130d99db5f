"""The latent cache in pages of 64 tokens, shared between sequences that begin alike.

A page's content depends only on what stands at the positions up to its end, so it is found again by a hash chained
over them (`kv.chain`; as in vLLM's prefix cache). Pages are reference-counted; a page that no sequence holds keeps its
content until it is the least recently used one and its memory is needed. Then it moves to `host`, pages in RAM behind
a GPU's, where there are some; and pages of long prefixes are also saved to `prefixes`, files that outlive the process.
`open` brings them back from either. The kernels read and write `storage`; the scheduler calls `open, reserve, advance,
release`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.kv.chain import ROOT, Key, Link, Salt, chain, chain_hash, digests_of, keys_of, num_common
from kimi_lite.kv.disk import PrefixStore
from kimi_lite.kv.host import HostPages, Storage, read_page, write_page
from kimi_lite.native.latent_rows import PAGE_TOKENS, ROW_FORMS, row_bytes, row_length


@dataclass(slots=True, eq=False)
class SequencePages:
    """One sequence's hold on the cache. Its pages beyond the last whole one are its own; the others may be shared."""

    num_cached: int  # tokens found in the cache by `open`
    keys: list[Key]  # of the positions whose rows are valid, in order; only `open` and `advance` change it
    digests: Mapping[int, bytes] = field(default_factory=dict)  # of the salts, by position
    pages: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # (pages held,) int32
    hashes: list[bytes] = field(default_factory=list)  # chained hash of every whole page in `keys`
    num_offered: int = 0  # whole pages that were given to the prefix store
    is_released: bool = False

    @property
    def num_computed(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class PublishedPage:
    """What a findable page holds: `keys` (64, or fewer when it was a sequence's last page) after the pages of
    `parent`."""

    parent: bytes
    keys: tuple[Key, ...]
    hash: bytes | None  # None: not a whole page


class KVCache:
    """Storage of shape (layers, pages, 64, row of `native.latent_rows`) and the tables that say which page holds
    what."""

    def __init__(
        self,
        num_layers: int,
        latent_size: int,
        num_pages: int,
        dtype: str = "f16",
        storage: Storage | None = None,
        num_host_pages: int = 0,
        prefixes: PrefixStore | None = None,
    ) -> None:
        """storage: memory of another place (a GPU's) for the pages, of the shape that numpy's would have.
        num_host_pages: in RAM, for pages that leave a GPU's memory. prefixes: files for pages of `page_shape`; closed
        by its maker after the cache's last use."""
        assert min(num_layers, latent_size, num_pages) > 0, (num_layers, latent_size, num_pages)
        self.dtype, self.num_layers, self.num_pages = dtype, num_layers, num_pages
        shape = (num_layers, num_pages, PAGE_TOKENS, row_length(dtype, latent_size))
        if storage is None:
            storage = np.zeros(shape, ROW_FORMS[dtype].storage)  # its memory is touched only when used
        self.storage = storage
        assert tuple(self.storage.shape) == shape, (self.storage.shape, shape)
        self.host = HostPages(num_host_pages, self.storage) if num_host_pages else None
        self.prefixes = prefixes
        self.num_spilled = self.num_returned = 0  # pages, since the start
        self._num_holders = [0] * num_pages
        self._blank = list(
            range(num_pages - 1, -1, -1)
        )  # pages without content, low numbers last so that they go first
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # published pages that no sequence holds, least recently used first
        self._published: dict[int, PublishedPage] = {}
        self._page_of: dict[bytes, int] = {}  # hash of a whole page -> page
        self._children: dict[bytes, set[int]] = {}  # hash -> published pages that come after it

    @property
    def num_available(self) -> int:
        """Pages that no sequence holds."""
        return len(self._blank) + len(self._idle)

    def counters(self) -> dict[str, float]:
        """How full the cache is, and what came and went, in pages."""
        held = self.num_pages - self.num_available
        counters = {"kv_pages": self.num_pages, "kv_pages_held": held, "kv_pages_idle": len(self._idle)}
        if self.host is not None:
            counters |= {
                "kv_pages_in_host": len(self.host),
                "kv_spilled": self.num_spilled,
                "kv_returned": self.num_returned,
            }
        return counters | (self.prefixes.counters() if self.prefixes is not None else {})

    def open(self, token_ids: Sequence[int], salts: Sequence[Salt] = ()) -> SequencePages:
        """Hold every whole page the cache has of this prompt, and copy what it has of the next one. salts: what token
        ids do not say, as of images.

        Pages in RAM or on disk come back only where all of the prompt fits. The last token is never taken from the
        cache: its logits are wanted, so it must run.
        """
        sequence = SequencePages(num_cached=0, keys=[], digests=digests_of(salts))
        limit = max(len(token_ids) - 1, 0)
        num_wanted = -(-len(token_ids) // PAGE_TOKENS)
        pages: list[int] = []
        for link, page in self._find(chain(token_ids, limit // PAGE_TOKENS, salts), num_wanted):
            pages.append(page)
            sequence.hashes.append(link.hash)
            sequence.keys.extend(link.keys)
        sequence.pages = np.array(pages, np.int32)
        first = sequence.num_computed
        wanted = keys_of(token_ids[first:limit], sequence.digests, first)
        if self.prefixes is not None and 0 < num_wanted - len(pages) <= self.num_available:
            self._load_partial(self.prefixes, sequence, wanted)
        self._copy_partial(sequence, wanted)
        sequence.num_cached = sequence.num_computed
        return sequence

    def reserve(self, sequence: SequencePages, num_tokens: int) -> bool:
        """Give the sequence pages for its first `num_tokens` positions; False, and nothing changed, when there are too
        few."""
        assert not sequence.is_released
        num_missing = -(-num_tokens // PAGE_TOKENS) - len(sequence.pages)
        if num_missing > self.num_available:
            return False
        if num_missing > 0:
            new_pages = [self._take() for _ in range(num_missing)]
            sequence.pages = np.concatenate([sequence.pages, np.array(new_pages, np.int32)])
        return True

    def advance(self, sequence: SequencePages, token_ids: Sequence[int]) -> None:
        """The rows of these next tokens have been written in every layer; pages that became whole can now be found."""
        assert not sequence.is_released
        sequence.keys.extend(keys_of(token_ids, sequence.digests, sequence.num_computed))
        assert sequence.num_computed <= PAGE_TOKENS * len(sequence.pages), (sequence.num_computed, len(sequence.pages))
        for index in range(len(sequence.hashes), sequence.num_computed // PAGE_TOKENS):
            chunk = tuple(sequence.keys[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS])
            parent, page_hash = _last_hash(sequence), chain_hash(_last_hash(sequence), chunk)
            sequence.hashes.append(page_hash)
            if page_hash not in self._page_of:  # else another sequence computed the same page first; ours stays private
                self._publish(int(sequence.pages[index]), PublishedPage(parent, chunk, page_hash))
        self._offer(sequence)

    def release(self, sequence: SequencePages) -> None:
        """It is over. Whole pages and the valid rows of the last one stay findable until their memory is needed."""
        assert not sequence.is_released
        sequence.is_released = True
        self._offer_tail(sequence)
        self._publish_tail(sequence)
        for page in reversed(
            sequence.pages.tolist()
        ):  # a page is of no use without those before it: the last goes first
            self._num_holders[page] -= 1
            assert self._num_holders[page] >= 0, (page, self._num_holders[page])
            if self._num_holders[page] == 0:
                self._let_idle(page)

    def _find(self, links: Iterator[Link], num_wanted: int) -> Iterator[tuple[Link, int]]:
        """The first of these pages, as far as they are anywhere; each is held when it is given."""
        for num_found, link in enumerate(links):
            fits = num_wanted - num_found <= self.num_available
            if link.hash in self._page_of:
                page = self._page_of[link.hash]
                self._hold(page)
            elif fits and self.host is not None and link.hash in self.host:
                page = self._bring_back(self.host, link)
            else:
                if fits and self.prefixes is not None:
                    yield from self._load(self.prefixes, [link, *links])
                return
            yield link, page

    def _bring_back(self, host: HostPages, link: Link) -> int:
        place = host.withdraw(link.hash)
        page = self._take()
        host.bring_back(place, self.storage, page)
        self._publish(page, PublishedPage(*link))
        self.num_returned += 1
        return page

    def _load(self, prefixes: PrefixStore, links: Sequence[Link]) -> Iterator[tuple[Link, int]]:
        """Pages from disk, up to the first that is not there; what is in memory none the less is taken from there."""
        with closing(prefixes.read(links)) as contents:
            for link, content in zip(links, contents, strict=False):
                if link.hash in self._page_of:
                    page = self._page_of[link.hash]
                    self._hold(page)
                else:
                    page = self._take()
                    write_page(self.storage, page, content)
                    self._publish(page, PublishedPage(*link))
                yield link, page

    def _load_partial(self, prefixes: PrefixStore, sequence: SequencePages, wanted: Sequence[Key]) -> None:
        """From disk, the page that goes on most like `wanted`, if it does so further than any in memory."""
        if not sequence.hashes or not wanted:
            return
        parent = sequence.hashes[-1]
        siblings = self._children.get(parent, ())
        least = max((num_common(self._published[page].keys, wanted) for page in siblings), default=0)
        found = prefixes.read_like(parent, wanted, least)
        if found is not None:
            link, content = found
            page = self._take()
            write_page(self.storage, page, content)
            self._publish(page, PublishedPage(parent, link.keys, link.hash if len(link.keys) == PAGE_TOKENS else None))
            self._num_holders[page] = 0
            self._let_idle(page)

    def _offer(self, sequence: SequencePages) -> None:
        """Give whole pages to the prefix store, once the sequence is long enough to be worth it."""
        if self.prefixes is None or sequence.num_computed < self.prefixes.min_tokens:
            return
        if sequence.num_offered == len(sequence.hashes):
            return
        for index, link in enumerate(self._links(sequence, sequence.num_offered), sequence.num_offered):
            self.prefixes.offer(link, index, partial(read_page, self.storage, int(sequence.pages[index])))
        sequence.num_offered = len(sequence.hashes)

    def _offer_tail(self, sequence: SequencePages) -> None:
        """The sequence ends: save its last, not whole page, and date all of them now."""
        if self.prefixes is None or not sequence.num_offered:
            return
        num_whole = len(sequence.hashes)
        if tail := tuple(sequence.keys[num_whole * PAGE_TOKENS :]):
            link = Link(_last_hash(sequence), tail, chain_hash(_last_hash(sequence), tail))
            self.prefixes.offer(link, num_whole, partial(read_page, self.storage, int(sequence.pages[num_whole])))
        self.prefixes.touch(self._links(sequence, 0))

    def _links(self, sequence: SequencePages, first: int) -> list[Link]:
        """The whole pages of a sequence from the `first` on."""
        parents = [ROOT, *sequence.hashes]
        keys = sequence.keys
        return [
            Link(parents[i], tuple(keys[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS]), sequence.hashes[i])
            for i in range(first, len(sequence.hashes))
        ]

    def _copy_partial(self, sequence: SequencePages, wanted: Sequence[Key]) -> None:
        """Copy the rows of the published page that begins most like `wanted` into a page of the sequence's own.

        Where no page is left for a copy, and no other sequence holds that one, it becomes the sequence's own itself.
        """
        siblings = self._children.get(_last_hash(sequence), ())
        matches = ((num_common(self._published[page].keys, wanted), page) for page in siblings)
        num_rows, source = max(matches, default=(0, -1))
        if num_rows == 0:
            return
        self._hold(source)  # so that taking a page does not take this one
        page = None
        if self.num_available > 0:
            page = self._take()
            self.storage[:, page, :num_rows] = self.storage[:, source, :num_rows]
        elif self._num_holders[source] == 1:
            page = source
            self._num_holders[source] += 1
            self._unpublish(source)
        self._num_holders[source] -= 1
        if self._num_holders[source] == 0:
            self._let_idle(source)
        if page is not None:
            sequence.pages = np.append(sequence.pages, np.int32(page))
            sequence.keys.extend(wanted[:num_rows])

    def _publish_tail(self, sequence: SequencePages) -> None:
        """Make the last, not whole page findable, unless one that begins with the same tokens is already."""
        num_whole = len(sequence.hashes)
        tail = tuple(sequence.keys[num_whole * PAGE_TOKENS :])
        parent = _last_hash(sequence)
        siblings = [self._published[page].keys for page in self._children.get(parent, ())]
        if tail and not any(keys[: len(tail)] == tail for keys in siblings):
            self._publish(int(sequence.pages[num_whole]), PublishedPage(parent, tail, None))

    def _publish(self, page: int, content: PublishedPage) -> None:
        """Enter a page into the tables; idle partial pages it continues say nothing more than it does, so they go
        blank."""
        assert page not in self._published, page
        self._published[page] = content
        siblings = self._children.setdefault(content.parent, set())
        siblings.add(page)
        if content.hash is not None:
            self._page_of[content.hash] = page
        for other in sorted(siblings & self._idle.keys()):
            old = self._published[other]
            if old.hash is None and content.keys[: len(old.keys)] == old.keys:
                del self._idle[other]
                self._unpublish(other)
                self._blank.append(other)

    def _unpublish(self, page: int) -> None:
        content = self._published.pop(page)
        siblings = self._children[content.parent]
        siblings.remove(page)
        if not siblings:
            del self._children[content.parent]
        if content.hash is not None:
            del self._page_of[content.hash]

    def _take(self) -> int:
        """A page that no sequence holds: a blank one, else the least recently used, whose content goes to `host` or is
        forgotten."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._spill(page)
            self._unpublish(page)
        assert self._num_holders[page] == 0, (page, self._num_holders[page])
        self._num_holders[page] = 1
        return page

    def _spill(self, page: int) -> None:
        page_hash = self._published[page].hash
        if self.host is not None and page_hash is not None:
            self.num_spilled += self.host.put(page_hash, self.storage, page)

    def _hold(self, page: int) -> None:
        self._num_holders[page] += 1
        self._idle.pop(page, None)

    def _let_idle(self, page: int) -> None:
        if page in self._published:
            self._idle[page] = None
        else:
            self._blank.append(page)


def page_shape(config: ModelConfig, kv_dtype: str) -> tuple[int, int, int]:
    """Bytes of a page: (layers, 64, row bytes)."""
    return config.num_layers, PAGE_TOKENS, row_bytes(kv_dtype, config.kv_latent_size)


def bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of cache that a token of context needs, scales included: 70,272 for Kimi K2.5 in bf16, 37,332 in q8."""
    return config.num_layers * row_bytes(kv_dtype, config.kv_latent_size)


def value_bytes(config: ModelConfig, kv_dtype: str) -> float:
    """The same for one value, for `ModelConfig.kv_bytes_per_token`: 1.0625 for q8."""
    return row_bytes(kv_dtype, config.kv_latent_size) / config.kv_latent_size


def _last_hash(sequence: SequencePages) -> bytes:
    return sequence.hashes[-1] if sequence.hashes else ROOT
