"""Prefixes on disk: found again by the next process, never believed when damaged, never larger than they may be."""

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.chain import PACKED_BYTES, Salt, chain_hash
from kimi_lite.kv.disk import PrefixStore, model_key
from kimi_lite.kv.host import read_page, write_page
from kimi_lite.kv.pages import KVCache
from kimi_lite.native.latent_rows import PAGE_TOKENS
from tests.kv.cache_case import SMALL_PAGE_SHAPE, check_rows, run_prompt, small_cache
from tests.tiny import write_tiny_gguf

PROMPT = list(range(300))  # four whole pages and a tail of 44
PAGE_BYTES = 2 * PAGE_TOKENS * 12 + 24 + PACKED_BYTES


def open_cache(folder: Path, key: str = "a", max_bytes: int = 10**9, num_pages: int = 8) -> KVCache:
    return small_cache(num_pages, prefixes=PrefixStore(folder, key, SMALL_PAGE_SHAPE, max_bytes, min_tokens=128))


def save(folder: Path, prompt: list[int], salts: Sequence[Salt] = (), **options) -> None:
    kv = open_cache(folder, **options)
    kv.release(run_prompt(kv, prompt, salts))
    kv.prefixes.close()


def pages_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def num_cached(folder: Path, prompt: list[int], salts: Sequence[Salt] = (), **options) -> int:
    kv = open_cache(folder, **options)
    sequence = kv.open(prompt, salts)
    check_rows(kv, sequence)
    kv.prefixes.close()
    return sequence.num_cached


def test_the_next_process_finds_all_of_it(tmp_path: Path) -> None:
    save(tmp_path, PROMPT)
    assert [path.stat().st_size for path in pages_in(tmp_path)] == [PAGE_BYTES] * 5
    kv = open_cache(tmp_path)
    sequence = kv.open([*PROMPT, 7])
    assert sequence.num_cached == 300
    check_rows(kv, sequence)
    again = kv.open([*PROMPT, 8])
    assert again.pages[:4].tolist() == sequence.pages[:4].tolist(), "now they are in memory"
    assert again.num_cached == 300
    assert kv.counters()["prefix_pages_found"] == 5


def test_only_what_is_common_is_found(tmp_path: Path) -> None:
    save(tmp_path, PROMPT)
    assert num_cached(tmp_path, [*PROMPT[:150], *PROMPT]) == 150, "two pages and 22 rows of the third"
    assert num_cached(tmp_path, [*PROMPT[:270], 0, 0]) == 270
    assert num_cached(tmp_path, [9, *PROMPT]) == 0
    assert num_cached(tmp_path, PROMPT, key="b") == 0


def test_the_last_token_is_always_computed(tmp_path: Path) -> None:
    save(tmp_path, PROMPT)
    assert num_cached(tmp_path, PROMPT[:256]) == 255
    assert num_cached(tmp_path, PROMPT) == 299


def test_short_prompts_are_not_worth_a_file(tmp_path: Path) -> None:
    save(tmp_path, PROMPT[:127])
    assert pages_in(tmp_path) == []
    save(tmp_path, PROMPT[:128])
    assert len(pages_in(tmp_path)) == 2


def test_pages_from_disk_are_not_written_again(tmp_path: Path) -> None:
    save(tmp_path, PROMPT)
    kv = open_cache(tmp_path)
    kv.release(run_prompt(kv, [*PROMPT, *range(100)]))
    kv.prefixes.close()
    assert (kv.prefixes.num_found, kv.prefixes.num_saved) == (5, 3), "two whole pages more, and another tail"


def test_a_tail_gives_way_to_a_newer_one_but_not_to_its_own_beginning(tmp_path: Path) -> None:
    save(tmp_path, PROMPT)
    save(tmp_path, PROMPT[:280])
    assert num_cached(tmp_path, [*PROMPT, 0]) == 300
    other = [*PROMPT[:256], *range(900, 920)]
    save(tmp_path, other)
    assert num_cached(tmp_path, [*other, 0]) == 276
    assert num_cached(tmp_path, [*PROMPT, 0]) == 256
    assert len(pages_in(tmp_path)) == 5


def test_the_longest_of_many_continuations_is_taken(tmp_path: Path) -> None:
    """A system prompt that ends inside a page, after which each conversation had another one."""
    for question in range(5):
        save(tmp_path, [*PROMPT[:200], *range(1000 + question, 1100 + question)])
    assert num_cached(tmp_path, [*PROMPT[:200], 1003, 1004, 1005, 9, 9]) == 203


def test_pages_of_other_images_are_other_pages(tmp_path: Path) -> None:
    """Placeholders of an image from 150 on: the two pages before it are found for any image, and the rows before it."""
    cat, dog = Salt(150, b"a cat"), Salt(150, b"a dog")
    save(tmp_path, PROMPT, [cat])
    assert num_cached(tmp_path, [*PROMPT, 7], [cat]) == 300
    assert num_cached(tmp_path, [*PROMPT, 7], [dog]) == num_cached(tmp_path, [*PROMPT, 7]) == 150
    save(tmp_path, PROMPT, [dog])
    assert num_cached(tmp_path, [*PROMPT, 7], [cat]) == num_cached(tmp_path, [*PROMPT, 7], [dog]) == 300
    late_cat, late_dog = Salt(290, b"a cat"), Salt(290, b"a dog")  # in the tail
    save(tmp_path, PROMPT, [late_cat])
    assert num_cached(tmp_path, [*PROMPT, 7], [late_cat]) == 300
    assert num_cached(tmp_path, [*PROMPT, 7], [late_dog]) == 290


@pytest.mark.parametrize("damage", ["a byte", "the end", "more", "another page", "empty"])
def test_a_damaged_page_is_computed_again_with_one_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, PROMPT)
    first = chain_hash(b"", PROMPT[:64])
    path = tmp_path / "a" / f"{first.hex()}-{chain_hash(first, PROMPT[64:128]).hex()}.page"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    other = next(page for page in pages_in(tmp_path) if page != path).read_bytes()
    whole = path.read_bytes()
    changed = {"a byte": data, "the end": whole[:-1], "more": whole + b"x", "another page": other, "empty": b""}
    path.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        assert num_cached(tmp_path, PROMPT) == PAGE_TOKENS
    assert [record.getMessage() for record in caplog.records] == [
        f"The saved prefix {path} is damaged; it is deleted and computed again."
    ]
    save(tmp_path, PROMPT)
    assert num_cached(tmp_path, PROMPT) == 299


def test_a_damaged_tail_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, PROMPT)
    (path,) = (page for page in pages_in(tmp_path) if "tail" in page.name)
    for at in (25, 40, 700, 1000, 2000):  # the count, an id, salts, a value
        whole = path.read_bytes()
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        assert num_cached(tmp_path, [*PROMPT, 0]) in (256, 257)
        path.write_bytes(whole)
    assert num_cached(tmp_path, [*PROMPT, 0]) == 300


def test_the_folder_stays_within_its_size(tmp_path: Path) -> None:
    """What was used last stays; of a prefix the end goes first."""
    first, second, third = [1] * 256, [2] * 256, [3] * 256
    for prompt in (first, second):
        save(tmp_path, prompt)
    assert num_cached(tmp_path, [*first, 0]) == 256
    save(tmp_path, third, max_bytes=10 * PAGE_BYTES)
    assert len(pages_in(tmp_path)) == 10
    found = [num_cached(tmp_path, [*prompt, 0]) for prompt in (first, second, third)]
    assert found == [256, 2 * PAGE_TOKENS, 256]


def test_of_a_prefix_larger_than_the_folder_the_beginning_is_kept(tmp_path: Path) -> None:
    save(tmp_path, PROMPT, max_bytes=3 * PAGE_BYTES + 1)
    assert num_cached(tmp_path, PROMPT) == 3 * PAGE_TOKENS
    assert len(pages_in(tmp_path)) == 3


def test_the_size_is_of_all_models_together_and_remains_are_swept(tmp_path: Path) -> None:
    save(tmp_path, PROMPT, key="b")
    old, new = tmp_path / "b" / "x.page.1.partial", tmp_path / "b" / "y.page.2.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    save(tmp_path, PROMPT, max_bytes=5 * PAGE_BYTES)
    assert sorted(path.parent.name for path in pages_in(tmp_path)) == ["a"] * 5 + ["b"]
    assert new.exists(), "another process may be writing it"


def test_many_may_write_the_same_at_once(tmp_path: Path) -> None:
    threads = [threading.Thread(target=save, args=(tmp_path, PROMPT)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pages_in(tmp_path)) == 5
    assert num_cached(tmp_path, PROMPT) == 299


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "file", PROMPT)
    (record,) = caplog.records
    assert "Prefixes are no longer saved" in record.getMessage()


def test_nothing_is_read_for_a_prompt_that_has_no_room(tmp_path: Path) -> None:
    save(tmp_path, PROMPT)
    kv = open_cache(tmp_path, num_pages=4)
    assert kv.open(PROMPT).num_cached == 0
    assert kv.num_available == 4


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """They hold what was said, if not in words."""
    save(tmp_path, PROMPT)
    assert {path.stat().st_mode & 0o777 for path in pages_in(tmp_path)} == {0o600}
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_closing_twice_is_allowed(tmp_path: Path) -> None:
    kv = open_cache(tmp_path)
    kv.prefixes.close()
    kv.prefixes.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_of_a_tensor(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    storage = torch.randn(3, 4, 64, 6).to(getattr(torch, dtype))
    content = read_page(storage, 2)
    assert content.shape == (3, 64, 6 * storage.element_size())
    target = torch.zeros_like(storage)
    write_page(target, 1, content)
    assert torch.equal(target[:, 1], storage[:, 2])
    array = np.arange(3 * 4 * 64 * 6, dtype=np.float32).reshape(3, 4, 64, 6)
    write_page(array, 0, read_page(array, 3))
    assert np.array_equal(array[:, 0], array[:, 3])


def test_the_key_is_of_the_files_and_the_numbers(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", np.random.default_rng(0))
    store = GGUFStore.open(path)
    key = model_key(store, "f16")
    assert key == model_key(GGUFStore.open(path), "f16") != model_key(store, "q8")
    os.utime(path, (1, 1))
    assert model_key(store, "f16") != key
