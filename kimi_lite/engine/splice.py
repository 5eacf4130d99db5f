"""Keeps the ids that were sampled where a template renders the same text again, so that the cache still knows the
prompt.

The text of a past answer may be tokenized otherwise than it was sampled, and then nothing after it would be found in
the cache.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from kimi_lite.engine.turns import Turn
from kimi_lite.text.stream import END_THINK
from kimi_lite.text.tokenizer import Tokenizer


def splice(known_ids: Sequence[int], rendered_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """`rendered_ids` with its beginning replaced by the longest beginning of `known_ids` that reads the same."""
    known, rendered = [_spellings(ids, tokenizer) for ids in (known_ids, rendered_ids)]
    num_same_bytes = _num_common(b"".join(known), b"".join(rendered))
    known_ends, rendered_ends = [[0, *accumulate(map(len, spellings))] for spellings in (known, rendered)]
    common_end = max(end for end in set(known_ends) & set(rendered_ends) if end <= num_same_bytes)
    return [*known_ids[: known_ends.index(common_end)], *rendered_ids[rendered_ends.index(common_end) :]]


def with_sampled_ids(rendered_ids: Sequence[int], turns: Iterable[Turn], tokenizer: Tokenizer) -> list[int]:
    """`rendered_ids` with every answer that reads the same replaced by the ids that were sampled for it."""
    spellings = _spellings(rendered_ids, tokenizer)
    data = b"".join(spellings)
    index_of = {end: index for index, end in enumerate([0, *accumulate(map(len, spellings))])}
    result: list[int] = []
    index = at = 0
    for turn in turns:
        for run in _runs(turn, tokenizer):
            spelled = b"".join(_spellings(run, tokenizer))
            start = data.find(spelled, at)
            if start >= 0 and start in index_of and start + len(spelled) in index_of:
                result += [*rendered_ids[index : index_of[start]], *run]
                at = start + len(spelled)
                index = index_of[at]
                break
    return [*result, *rendered_ids[index:]]


def _runs(turn: Turn, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """What of an answer a later prompt may hold, longest first: all of it, or what follows its reasoning.

    Each begins with tokens that no message can hold by itself: the words alone may stand elsewhere too.
    """
    whole = [turn.lead_ids + turn.ids] if turn.lead_ids and turn.ids else []
    think_end = tokenizer.special.get(END_THINK)
    if think_end not in turn.ids:
        return whole
    return [*whole, turn.ids[len(turn.ids) - 1 - turn.ids[::-1].index(think_end) :]]


def _spellings(ids: Iterable[int], tokenizer: Tokenizer) -> list[bytes]:
    """Each token's bytes; control tokens, and the marks of images (`engine.vision`), get ones that no text has, so that
    text which spells them is not taken for them."""
    special = frozenset(tokenizer.special.values())
    return [b"\xff\xfe%d\xff" % i if i < 0 or i in special else tokenizer.decode_bytes(i) for i in ids]


def _num_common(a: bytes, b: bytes) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(np.frombuffer(a, np.uint8, length) != np.frombuffer(b, np.uint8, length))
    return int(differing[0]) if len(differing) else length
