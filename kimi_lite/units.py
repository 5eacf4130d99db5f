"""Numbers as people write and read them: sizes and counts of tokens.

Memory is binary, as it is sold: 24G, 24GB and 24GiB are 24 * 1024^3 bytes. Only the sizes of files that others split
(`--split-max-size`) are decimal. Speeds are GB/s (10^9 bytes).
"""

import re

from kimi_lite.errors import KimiLiteError

MIB, GIB = 1 << 20, 1 << 30
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B?)", re.IGNORECASE)
_SEVERAL = re.compile(r"\d[\w.]*\s*[x*+]\s*\d[\w.]*.*", re.IGNORECASE)  # 2x24G, 24G+24G
_TOKENS = re.compile(r"(\d+(?:\.\d+)?)\s*([KM]?)", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
SIZE_HELP = "24G is 24 GiB (1024^3 bytes), as memory is sold"
DECIMAL_HELP = "45G is 45 * 10^9 bytes, 45GiB is 45 * 1024^3"


def parse_size(text: str, source: str = "The size", *, is_decimal: bool = False, allows_zero: bool = False) -> int:
    """Bytes. `source` is what the text came from, for the error: a flag, a variable, a line of a file.

    A number without a unit is bytes; below 1 MiB the unit was forgotten. is_decimal: G and GB are 10^9 and only GiB is
    1024^3; else all three are 1024^3. Raises KimiLiteError.
    """
    match = _SIZE.fullmatch(text.strip())
    is_zero = match is not None and not float(match[1])
    if match is None or (is_zero and not allows_zero):
        example, help_text = ("45G", DECIMAL_HELP) if is_decimal else ("24G", SIZE_HELP)
        if _SEVERAL.fullmatch(text.strip()):
            help_text += ". It is one size, of RAM the sum; --vram has a size for each GPU as 24G+12G"
        raise KimiLiteError(f"{source} is {text!r}, which is not a size.", f"Write it like {example}: {help_text}.")
    number, unit, suffix = float(match[1]), match[2].upper(), match[3].upper()
    num_bytes = int(number * (1000 if is_decimal and not suffix.startswith("I") else 1024) ** _POWERS[unit])
    if not unit and not is_zero and num_bytes < MIB:
        raise KimiLiteError(f"{source} is {text!r}, which is {num_bytes:,} bytes.", f"Did you mean {match[1]}G?")
    return num_bytes


def parse_token_count(text: str, source: str = "The number of tokens") -> int:
    """`32K` is 32,768, `1M` is 1,048,576, `4096` is itself. Raises KimiLiteError."""
    match = _TOKENS.fullmatch(text.strip())
    count = float(match[1]) * 1024 ** _POWERS[match[2].upper()] if match else 0.5
    if count != int(count):
        raise KimiLiteError(f"{source} is {text!r}, which is not a number of tokens.", "Write it like 4096, 32K or 1M.")
    return int(count)


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


def tokens_flag(num_tokens: int) -> str:
    """A number of tokens as `-c` takes it: 13K where it is whole, else in full."""
    return f"{num_tokens // 1024}K" if num_tokens % 1024 == 0 else str(num_tokens)


def counted(number: int, noun: str) -> str:
    """`1 line`, `2 lines`"""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shortened(text: str, num_chars: int) -> str:
    """At most so many characters; the last is `…` where some are missing."""
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"


def one_line(text: str, num_chars: int) -> str:
    """Foreign text for a sentence of ours: blanks are single spaces, what cannot be printed is escaped, the end cut."""
    text = " ".join(text[: 4 * num_chars].split())
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return shortened(text, num_chars)


def number(value: float | None) -> str:
    """Three or more significant digits: 0.123, 1.23, 12.3, 123, 1,234."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
