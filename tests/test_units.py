"""Sizes on the command line: GiB and GB are told apart."""

import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import GIB, gib, gib_apart, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24G", 24 * GIB),
        ("24g", 24 * GIB),
        ("24 GiB", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("1.5T", 1.5 * 1024 * GIB),
        ("512M", GIB / 2),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "24X", "0", "0G", "1e3G", "inf", "24G 1"])
def test_what_is_no_size(text):
    with pytest.raises(KimiLiteError, match="--vram is") as caught:
        parse_size(text, "--vram")
    assert "24 GiB" in caught.value.hint


def test_shown_sizes():
    assert gib(199.33 * GIB) == "199.3 GiB" and gib(0.05 * GIB) == "51.2 MiB"
    assert gib_apart(5.31 * GIB, 5.34 * GIB) == ("5.31 GiB", "5.34 GiB")
