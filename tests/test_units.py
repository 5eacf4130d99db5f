"""Sizes and counts of tokens as people write them: memory is binary, a forgotten unit is asked about."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import GIB, MIB, gib, gib_apart, parse_size, parse_token_count

POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


@settings(deadline=None)
@given(st.integers(1, 9999), st.sampled_from("KMGTkmgt"), st.sampled_from(["", "B", "iB", "b"]), st.booleans())
def test_memory_is_binary_and_files_are_decimal_unless_they_say_ib(number, unit, suffix, has_space):
    text = f"{number}{' ' * has_space}{unit}{suffix}"
    power = POWERS[unit.upper()]
    assert parse_size(text) == number * 1024**power
    assert parse_size(text, is_decimal=True) == number * (1024 if suffix == "iB" else 1000) ** power


@pytest.mark.parametrize(
    ("text", "expected"), [("1.5T", 1.5 * 1024 * GIB), ("512M", GIB / 2), ("1048576", MIB), ("8589934592B", 8 * GIB)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@settings(deadline=None)
@given(st.integers(1, MIB - 1), st.sampled_from(["", "B"]))
def test_a_forgotten_unit_is_asked_about(number, suffix):
    with pytest.raises(KimiLiteError, match="--vram is") as caught:
        parse_size(f"{number}{suffix}", "--vram")
    assert caught.value.hint == f"Did you mean {number}G?"


@pytest.mark.parametrize("text", ["", "G", "-1G", "24X", "0", "0G", "1e3G", "inf", "24G 1", "24G+24G", "1,5G"])
def test_what_is_not_a_size(text):
    with pytest.raises(KimiLiteError, match="--vram is") as caught:
        parse_size(text, "--vram")
    assert "24 GiB" in caught.value.hint


@pytest.mark.parametrize("text", ["24G+24G", "2x24G", "2 x 24 GB", "4*8G"])
def test_several_sizes_are_told_which_one_is_wanted(text):
    with pytest.raises(KimiLiteError, match="not a size") as caught:
        parse_size(text, "--vram")
    assert "a size for each GPU as 24G+12G" in caught.value.hint


def test_zero_only_where_it_means_something():
    assert parse_size("0", allows_zero=True) == parse_size("0G", allows_zero=True) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10", 10), ("4096", 4096), ("64K", 65536), ("32k", 32768), ("1M", 1 << 20), ("1.5K", 1536), ("0", 0)],
)
def test_token_counts(text, expected):
    assert parse_token_count(text) == expected


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5", "4G", "32KB", "tk", "0.0001K", "1e3"])
def test_what_is_not_a_token_count(text):
    with pytest.raises(KimiLiteError, match="-c is") as caught:
        parse_token_count(text, "-c")
    assert "32K" in caught.value.hint


def test_shown_sizes():
    assert gib(199.33 * GIB) == "199.3 GiB" and gib(0.05 * GIB) == "51.2 MiB"
    assert gib_apart(5.31 * GIB, 5.34 * GIB) == ("5.31 GiB", "5.34 GiB")
