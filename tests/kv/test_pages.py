"""The paged cache: what it hands out, what it finds again, and that nothing it finds is stale."""

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.kv.pages import KVCache, bytes_per_token, value_bytes
from kimi_lite.native.latent_rows import PAGE_TOKENS, ROW_FORMS
from tests.kv.cache_case import check_rows, compute, run_prompt, small_cache, write_rows
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
    sizes = {name: bytes_per_token(config, name) for name in ROW_FORMS}
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


def test_without_room_for_a_copy_the_page_itself_is_taken() -> None:
    """The next turn of a conversation that fills the cache."""
    kv = small_cache(num_pages=3)
    kv.release(run_prompt(kv, list(range(150))))
    again = kv.open([*range(140), 7])
    assert again.num_cached == 140
    compute(kv, again, [*range(140), 7], 141)
    check_rows(kv, again)
    kv.release(again)
    assert kv.open([*range(140), 7, 8]).num_cached == 141


def test_a_page_that_another_holds_is_not_taken() -> None:
    kv = small_cache(num_pages=2)
    other = run_prompt(kv, list(range(128)))
    assert kv.open([*range(100), 7]).num_cached == 64
    check_rows(kv, other)


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


def tiered_cache(num_pages: int, num_host_pages: int) -> KVCache:
    return small_cache(num_pages, num_host_pages=num_host_pages)


def test_pages_without_room_move_to_ram_and_return() -> None:
    kv = tiered_cache(num_pages=4, num_host_pages=4)
    first, second = [1] * 200, [2] * 200
    for prompt in (first, second):
        kv.release(run_prompt(kv, prompt))
    assert kv.counters()["kv_pages_in_host"] == 3, "the part of a page at the end is not worth a place"
    again = kv.open([*first, 3])
    assert again.num_cached == 192
    check_rows(kv, again)
    kv.release(again)
    assert kv.open([*second, 3]).num_cached == 192
    assert kv.counters()["kv_returned"] == 5, "one page of the second had never left"


def test_a_full_place_in_ram_forgets_what_left_first() -> None:
    kv = tiered_cache(num_pages=4, num_host_pages=3)
    for token in (1, 2, 3):
        kv.release(run_prompt(kv, [token] * 200))
    assert [kv.open([token] * 201).num_cached for token in (1,)] == [0]
    sequence = kv.open([2] * 201)
    assert sequence.num_cached == 192
    check_rows(kv, sequence)


def test_one_place_in_ram_is_enough_to_swap() -> None:
    """The page that makes room finds none, as the only place is being left; it is forgotten, not mixed up."""
    kv = tiered_cache(num_pages=2, num_host_pages=1)
    kv.release(run_prompt(kv, [1] * 64))
    kv.release(run_prompt(kv, [2] * 128))
    assert len(kv.host) == 1
    sequence = kv.open([1] * 65)
    check_rows(kv, sequence)
    assert sequence.num_cached == 64


def test_a_page_computed_anew_while_it_lies_in_ram() -> None:
    kv = tiered_cache(num_pages=4, num_host_pages=8)
    prompt = [1] * 128
    kv.release(run_prompt(kv, prompt))
    kv.release(run_prompt(kv, [2] * 256))
    blocker = kv.open([3])
    assert kv.reserve(blocker, 3 * PAGE_TOKENS)
    short = kv.open(prompt)  # no room for both pages, so none returns
    assert short.num_cached == 0
    kv.release(short)
    kv.release(blocker)
    again = kv.open([])
    assert kv.reserve(again, 128)
    compute(kv, again, prompt, 128)
    kv.release(again)
    kv.release(run_prompt(kv, [4] * 256))
    check_rows(kv, kv.open([*prompt, 5]))


def test_a_gpu_has_tensors_in_both_places() -> None:
    torch = pytest.importorskip("torch")
    kv = KVCache(2, 3, 4, "f32", storage=torch.zeros(2, 4, PAGE_TOKENS, 3), num_host_pages=4)
    kv.release(run_prompt(kv, [1] * 200))
    kv.release(run_prompt(kv, [2] * 200))
    again = kv.open([1] * 201)
    assert again.num_cached == 192
    check_rows(kv, again)
