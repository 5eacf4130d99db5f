"""Sizes as people write and read them. Memory is sold and printed in GiB (1024^3 bytes); speeds are GB/s (10^9
bytes)."""

import re

from kimi_lite.errors import KimiLiteError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B?)", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
SIZE_HELP = "24G is 24 GiB, as memory is sold; 24GB is 24 * 10^9 bytes"


def parse_size(text: str, flag: str = "The size") -> int:
    """Bytes: `24G` and `24GiB` are 24 * 1024^3, `24GB` is 24 * 10^9, `512M` is 512 * 1024^2. Raises KimiLiteError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or not float(match[1]):
        raise KimiLiteError(f"{flag} is {text!r}, which is no amount of memory.", f"Write it like 24G: {SIZE_HELP}.")
    number, unit, suffix = float(match[1]), match[2].upper(), match[3].upper()
    return int(number * (1000 if suffix == "B" and unit else 1024) ** _POWERS[unit])


def gib(num_bytes: float) -> str:
    """`6.8 GiB`, or MiB below a tenth of one: the numbers of a table."""
    return f"{num_bytes / GIB:,.1f} GiB" if abs(num_bytes) >= 0.1 * GIB else f"{num_bytes / MIB:,.1f} MiB"


def gib_apart(need_bytes: float, have_bytes: float) -> tuple[str, str]:
    """Two sizes with as many decimals as it takes to see which is larger."""
    for decimals in range(1, 7):
        need, have = (f"{size / GIB:,.{decimals}f}" for size in (need_bytes, have_bytes))
        if need != have:
            break
    return f"{need} GiB", f"{have} GiB"
