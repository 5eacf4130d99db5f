"""Names of pages: equal only for equal keys, ids and salts alike."""

from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.kv.chain import PACKED_BYTES, Salt, chain, digests_of, keys_of, num_common, pack, unpack
from kimi_lite.native.latent_rows import PAGE_TOKENS
from tests.kv.cache_case import check_rows, run_prompt, small_cache

IDS = st.lists(st.integers(0, 163_839), max_size=5 * PAGE_TOKENS)
SALTS = st.dictionaries(st.integers(0, 5 * PAGE_TOKENS), st.binary(max_size=40), max_size=4).map(
    lambda found: [Salt(*item) for item in found.items()]
)


@given(ids=IDS, first=SALTS, second=SALTS)
def test_pages_are_shared_up_to_the_first_salt_that_differs(ids, first, second):
    links = [list(chain(ids, len(ids) // PAGE_TOKENS, salts)) for salts in (first, second)]
    a, b = dict(first), dict(second)
    parting = min((p for p in a.keys() | b.keys() if a.get(p) != b.get(p) and p < len(ids)), default=len(ids))
    same = [x.hash == y.hash for x, y in zip(*links, strict=True)]
    assert same == [(index + 1) * PAGE_TOKENS <= parting for index in range(len(same))]
    keys = [keys_of(ids, digests_of(salts)) for salts in (first, second)]
    assert num_common(*keys) == parting


@given(ids=st.lists(st.integers(0, 2**31 - 1), max_size=PAGE_TOKENS), salts=SALTS)
def test_keys_outlive_a_file(ids, salts):
    keys = tuple(keys_of(ids, digests_of(salts)))
    assert len(pack(keys)) == PACKED_BYTES and unpack(pack(keys)) == keys


@given(st.binary(max_size=2 * PACKED_BYTES))
def test_other_bytes_are_some_keys(data):
    assert len(unpack(data)) <= PAGE_TOKENS


def test_the_cache_shares_what_is_before_an_image():
    """The same placeholder ids for two images: pages before the first placeholder are shared, none behind it, and in
    the page with the placeholder only the rows before it."""
    kv, ids = small_cache(num_pages=12), [*range(100), *[7] * 100, *range(40)]
    cat, dog = [Salt(100, b"cat")], [Salt(100, b"dog")]
    first = run_prompt(kv, ids, cat)
    second = kv.open(ids, dog)
    assert second.num_cached == 100 and second.pages[0] == first.pages[0] and second.pages[1] != first.pages[1]
    kv.release(second)
    second = run_prompt(kv, ids, dog)
    assert not set(first.pages[1:].tolist()) & set(second.pages.tolist())
    check_rows(kv, first)
    check_rows(kv, second)
    kv.release(first)
    kv.release(second)
    assert (kv.open(ids, cat).num_cached, kv.open(ids, dog).num_cached, kv.open(ids).num_cached) == (239, 239, 100)
