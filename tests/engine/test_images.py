"""Images in requests: equal placeholder ids share pages only where they stand for equal images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.engine.types import PlacedImage, Request
from kimi_lite.kv.disk import PrefixStore
from tests.engine.fakes import LATENT_SIZE, NUM_LAYERS, fake_engine
from tests.engine.test_engine import greedy_by_hand, ids_of, prompt_of, request, run

PAD = 290
PAGE_SHAPE = (NUM_LAYERS, 64, 4 * LATENT_SIZE)  # bytes


def seeing(name: str, *images: bytes, before: int = 70, tokens: int = 100, after: int = 60) -> Request:
    """Text, images of so many placeholders each, and text: the ids are the same whatever the images are."""
    ids = [*prompt_of(before)]
    placed = []
    for digest in images:
        placed.append(PlacedImage(len(ids), np.zeros((tokens, 4), np.float32), digest))
        ids += [PAD] * tokens
    return replace(request(name, (*ids, *prompt_of(after, seed=1)), num_tokens=2), images=tuple(placed))


def cached_by(engine, one: Request) -> int:
    return run(engine, one)[-1].stats.cached_tokens


def test_pages_in_memory_are_shared_only_up_to_the_first_image_that_differs() -> None:
    engine = fake_engine(num_pages=40)
    length = len(seeing("", b"red").prompt_ids)
    assert cached_by(engine, seeing("a", b"red")) == 0
    assert cached_by(engine, seeing("b", b"blue")) == 70
    assert cached_by(engine, seeing("c", b"red")) == length - 1
    assert cached_by(engine, seeing("d", b"blue")) == length - 1
    assert cached_by(engine, seeing("e", b"red", b"blue")) == 170
    assert cached_by(engine, replace(seeing("f", b"red"), images=())) == 70


def test_pages_on_disk_are_shared_only_up_to_the_first_image_that_differs(tmp_path: Path) -> None:
    def ask(one: Request) -> int:
        """In a process of its own, as it were."""
        prefixes = PrefixStore(tmp_path, "model", PAGE_SHAPE, min_tokens=64)
        with fake_engine(prefixes=prefixes, holdings=[prefixes]) as engine:
            return cached_by(engine, one)

    first = seeing("a", b"red")
    assert ask(first) == 0
    assert ask(seeing("b", b"blue")) == 70
    assert ask(seeing("c", b"red")) == len(first.prompt_ids) - 1


@pytest.mark.parametrize(("other", "cached"), [(b"red", 192), (b"blue", 70)])
def test_a_sequence_waits_for_pages_of_another_only_where_their_images_are_equal(other: bytes, cached: int) -> None:
    """Whole pages are waited for: three of equal prompts of 230 tokens, the first one where the image differs."""
    engine = fake_engine(num_pages=40, max_step_tokens=64)
    engine.add(seeing("a", b"red"))
    for _ in range(2):
        engine.step()
    engine.add(seeing("b", other))
    ends = {}
    while not engine.is_idle:
        ends |= {token.request_id: token.stats.cached_tokens for token in engine.step() if token.finish_reason}
    assert ends == {"a": 0, "b": cached}


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 100), st.lists(st.integers(1, 120), max_size=3), st.integers(1, 40)),
        min_size=1,
        max_size=4,
    ),
    max_step_tokens=st.sampled_from([5, 64, 300]),
    num_pages=st.sampled_from([9, 40]),
)
def test_features_stand_at_their_positions_however_prompts_are_cut_and_batched(
    shapes: list[tuple[int, list[int], int]], max_step_tokens: int, num_pages: int
) -> None:
    """The fake model reads the first feature in the place of the id: every request gets what the numbers alone give."""
    engine = fake_engine(context_length=512, num_pages=num_pages, max_step_tokens=max_step_tokens)
    requests, numbers = [], {}
    for number, (before, sizes, after) in enumerate(shapes):
        ids, images = list(prompt_of(before, seed=number % 2)), []
        shown = list(ids)
        for size in sizes:
            values = np.random.default_rng(size).integers(300, 1000, size)
            images.append(PlacedImage(len(ids), np.repeat(values[:, None], 3, 1).astype(np.float32), b"%d" % size))
            ids += [PAD] * size
            shown += values.tolist()
        tail = prompt_of(after, seed=3)
        requests.append(replace(request(str(number), (*ids, *tail), 4, temperature=0), images=tuple(images)))
        numbers[str(number)] = (*shown, *tail)
    tokens = run(engine, *requests)
    for name, shown in numbers.items():
        assert ids_of(tokens, name) == greedy_by_hand(shown, 4)
