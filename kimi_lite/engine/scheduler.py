"""Decides which tokens of which sequences run in the next step.

Every running sequence that decodes gets its one token; what is left of the budget goes to prompts in chunks: by their
`priority`, highest first, and of equal ones the oldest first. A chunk holds tokens of the prompt or generated ones (of
a sequence that was sent back), never both, for they take different kernels (`model.batch`). A sequence waits while its
prompt does not fit, and, when a sequence that runs begins like it, until that one has computed their common pages. Of
those that wait, the client with the fewest running sequences is served first, and of its sequences the one with the
highest priority. When decoding runs out of pages the sequence with the lowest priority, of those the youngest, goes
back to waiting; it computes again what left the cache, with the same kernels, and goes on where it was.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from kimi_lite.engine.sequence import Sequence
from kimi_lite.engine.types import PlacedImage
from kimi_lite.kv.chain import Key
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Features, SequenceSlice
from kimi_lite.native.latent_rows import PAGE_TOKENS


class Work(NamedTuple):
    """The next `num_tokens` tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_generated(self) -> bool:
        """These tokens were sampled, not asked."""
        return self.sequence.is_prompt_read

    @property
    def is_last(self) -> bool:
        """After this work the sequence's next token can be sampled."""
        return self.num_tokens == self.sequence.num_left


class Scheduler:
    """Holds every sequence in progress, waiting or running, and their pages."""

    def __init__(self, kv: KVCache, max_step_tokens: int, max_running: int | None = None) -> None:
        """max_step_tokens: rows of one forward pass. max_running: sequences at the same time; None: as pages allow."""
        assert max_step_tokens > 0, max_step_tokens
        self.kv = kv
        self.max_step_tokens = max_step_tokens
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they were let in

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is; what it computed stays in the cache."""
        if sequence.pages is None:
            self.waiting.remove(sequence)
        else:
            self._stop_running(sequence)

    def schedule(self, max_prompt_tokens: int | None = None) -> list[Work]:
        """The next step's work, generated tokens first; at least one token unless nothing is in progress.

        max_prompt_tokens: of prompts in a step of sequences that decode, so that these go on soon; None: what fits.
        """
        self._secure_pages()
        decoding = [s for s in self.running if s.num_left == 1]
        work = [Work(sequence, 1) for sequence in decoding]
        budget = self.max_step_tokens - len(work)
        if decoding and max_prompt_tokens is not None:
            budget = min(budget, max_prompt_tokens)
        reading = deque(sorted((s for s in self.running if s.num_left > 1), key=_reversed_priority))
        while budget > 0:
            if self._lets_in_above(reading[0].request.priority if reading else None):
                budget = self._give_chunk(work, self.running[-1], budget)
            elif reading:
                budget = self._give_chunk(work, reading.popleft(), budget)
            else:
                break
        return sorted(work, key=lambda item: not item.is_generated)

    def _lets_in_above(self, priority: int | None) -> bool:
        """Let in who is next in line, where nothing is being read or only what has a lower priority."""
        if not self.waiting:
            return False
        sequence = self._next_in_line()
        return (priority is None or sequence.request.priority > priority) and self._let_in(sequence)

    def _next_in_line(self) -> Sequence:
        """Who had begun already goes on first; then, of the client with the fewest running sequences, the highest
        priority, and of those the oldest."""
        if self.waiting[0].num_generated:
            return self.waiting[0]
        num_running = Counter(sequence.request.client for sequence in self.running)
        return min(self.waiting, key=lambda s: (num_running[s.request.client], _reversed_priority(s)))

    def advance(self, work: list[Work]) -> None:
        """The model has run this work: its rows are valid."""
        for sequence, num_tokens in work:
            first = sequence.pages.num_computed
            self.kv.advance(sequence.pages, sequence.token_ids[first : first + num_tokens])

    def _give_chunk(self, work: list[Work], sequence: Sequence, budget: int) -> int:
        num_tokens = min(sequence.num_left_alike, budget)
        if num_tokens > 0:
            work.append(Work(sequence, num_tokens))
        return budget - num_tokens

    def _let_in(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if it need not wait."""
        if self.max_running is not None and len(self.running) >= self.max_running:
            return False
        if any(_has_pages_to_come_for(other, sequence) for other in self.running):
            return False
        pages = self.kv.open(sequence.token_ids, sequence.request.salts)
        if not self.kv.reserve(pages, len(sequence.token_ids)):
            self.kv.release(pages)
            return False
        if sequence.num_generated == 0:
            sequence.num_cached = pages.num_cached
        sequence.pages = pages
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _secure_pages(self) -> None:
        """Every running sequence has pages for the tokens it knows; the last in rank wait again if they must."""
        for sequence in list(self.running):
            while sequence.pages is not None and not self.kv.reserve(sequence.pages, len(sequence.token_ids)):
                last = max(reversed(self.running), key=_reversed_priority)  # the youngest of the lowest
                self._stop_running(last)
                self.waiting.appendleft(last)

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.kv.release(sequence.pages)
        sequence.pages = None


def _reversed_priority(sequence: Sequence) -> int:
    return -sequence.request.priority


def make_batch(work: list[Work]) -> Batch:
    """Flatten the work of a step for the model."""
    token_ids, positions, wants_logits, slices = [], [], [], []
    shown: list[Features] = []
    for item in work:
        pages, first = item.sequence.pages, item.sequence.pages.num_computed
        last = first + item.num_tokens
        num_pages = -(-last // PAGE_TOKENS)
        slices.append(SequenceSlice(len(token_ids), item.num_tokens, pages.pages[:num_pages], item.is_generated))
        shown += _features(item.sequence.request.images, first, last, len(token_ids))
        token_ids += item.sequence.token_ids[first:last]
        positions += range(first, last)
        wants_logits += [False] * (item.num_tokens - 1) + [item.is_last]
    features = Features(*map(np.concatenate, zip(*shown, strict=True))) if shown else None
    return Batch(
        np.array(token_ids, np.int32),
        np.array(positions, np.int32),
        np.array(wants_logits, np.bool_),
        tuple(slices),
        features,
    )


def _features(images: Iterable[PlacedImage], first: int, last: int, start: int) -> Iterator[Features]:
    """What is shown at the positions `first` to `last` of a prompt, which are the rows from `start` on."""
    for image in images:
        begin, end = max(image.position, first), min(image.end, last)
        if begin < end:
            rows = np.arange(start + begin - first, start + end - first)
            yield Features(rows, image.features[begin - image.position : end - image.position])


def _has_pages_to_come_for(running: Sequence, waiting: Sequence) -> bool:
    """Whether `running` is still to compute whole pages with which `waiting` begins."""
    if running.num_left == 1:
        return False
    limit = min(len(running.token_ids), len(waiting.token_ids) - 1)
    shared = 0
    while shared + PAGE_TOKENS <= limit and _page(running, shared) == _page(waiting, shared):
        shared += PAGE_TOKENS
    return running.pages.num_computed < shared


def _page(sequence: Sequence, first: int) -> list[Key]:
    """The keys of a page of its tokens so far."""
    prompt_length = len(sequence.prompt_keys)
    generated = sequence.token_ids[max(first, prompt_length) : max(first + PAGE_TOKENS, prompt_length)]
    return [*sequence.prompt_keys[first : first + PAGE_TOKENS], *generated]
