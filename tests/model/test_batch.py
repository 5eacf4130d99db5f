"""A batch in parts: the same tokens, positions, pages and features, in order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.model.batch import Batch, Features, SequenceSlice


@st.composite
def batches(draw) -> Batch:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    num_generated, total = draw(st.integers(0, len(lengths))), sum(lengths)
    firsts = draw(st.lists(st.integers(0, 200), min_size=len(lengths), max_size=len(lengths)))
    starts = np.cumsum([0, *lengths])
    positions = np.concatenate([np.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)])
    pages = [np.arange(10 * i, 10 * i + 4, dtype=np.int32) for i in range(len(lengths))]
    sequences = tuple(
        SequenceSlice(int(starts[i]), n, pages[i], is_generated=i < num_generated) for i, n in enumerate(lengths)
    )
    rows = np.array(sorted(draw(st.sets(st.integers(0, total - 1)))), np.int64)
    features = Features(rows, rows[:, None].astype(np.float32)) if draw(st.booleans()) else None
    wants = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    return Batch(np.arange(total, dtype=np.int32), positions.astype(np.int32), wants, sequences, features)


@given(batch=batches(), most=st.integers(1, 50))
def test_parts_are_the_whole(batch, most):
    parts = batch.parts(most)
    assert all(0 < len(part.token_ids) <= most for part in parts)
    for name in ("token_ids", "positions", "wants_logits"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name))
    assert np.array_equal(np.concatenate([part.cache_rows() for part in parts]), batch.cache_rows())
    assert sum(part.num_generated for part in parts) == batch.num_generated
    if batch.features:
        values = [part.features.values[:, 0] for part in parts]
        firsts = np.cumsum([0, *(len(part.token_ids) for part in parts)])
        rows = [first + part.features.rows for first, part in zip(firsts, parts, strict=False)]
        assert np.array_equal(np.concatenate(values), batch.features.values[:, 0])
        assert np.array_equal(np.concatenate(rows), batch.features.rows)
