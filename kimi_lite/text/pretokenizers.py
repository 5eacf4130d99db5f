"""The regular expressions that cut text into pieces before byte-pair merging, by the file's `tokenizer.ggml.pre` name.

tiktoken takes one expression, in the syntax of Rust's `regex`, and drops what it does not match; so every pattern here
matches every character. Where the reference applies several splits in a row (`smollm`, `deepseek-v3`), later splits
cannot look across the cuts of earlier ones: the single expression says so in its classes and look-aheads.
"""

import re
from collections.abc import Iterator

from kimi_lite.errors import KimiLiteError

BLOCK_CHARS = 400_000  # text is encoded in blocks of this many characters, as the vendor's tokenizer does
RUN_CHARS = 25_000  # and cut so that no run of (non-)whitespace is longer; the regex engine's stack ends not far above

_RUNS = re.compile(r"\s+|\S+")


def _kimi_k2() -> str:
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    return "|".join(
        (
            r"[\p{Han}]+",
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contraction}",
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contraction}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )


def _gpt2() -> str:
    return r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _smollm() -> str:
    """Every digit alone first, then GPT-2's pattern on what lies between: a space before a digit is a piece's end."""
    return r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def _deepseek_v3() -> str:
    """Numbers by threes, then runs of kana and common Han, then words; the last split also cuts inside those runs."""
    cjk = r"\u{4E00}-\u{9FA5}\u{3040}-\u{30FF}"
    letter, symbol = r"\p{L}\p{M}", r"\p{P}\p{S}"
    # controls, format characters, unassigned: pieces of their own unless a word follows
    other = rf"^\s\p{{N}}{letter}{symbol}"
    word, word_cjk = rf"[{letter}&&[^{cjk}]]", rf"[{letter}&&[{cjk}]]"
    return "|".join(
        (
            r"\p{N}{1,3}",
            r"[!-/:-@\[-`{-~][A-Za-z]+",
            rf"[^\r\n\p{{L}}{symbol}\p{{N}}{cjk}]?{word}+",
            rf"[{cjk}&&[^\p{{L}}{symbol}]]?{word_cjk}+",
            rf" ?[{symbol}&&[^{cjk}]]+[\r\n]*",
            rf"[{symbol}&&[{cjk}]]+",
            r"\s*[\r\n]+",
            rf"\s+(?![^\s\p{{N}}{cjk}])",
            r"\s+",
            rf"(?:[{other}{cjk}](?!{word}))+",
            rf"(?:[{cjk}&&[{other}]](?!{word_cjk}))+",
        )
    )


_PATTERNS = {"kimi-k2": _kimi_k2, "gpt-2": _gpt2, "smollm": _smollm, "deepseek-v3": _deepseek_v3}


def pattern_of(pre: str) -> str:
    """The expression for the pre-tokenizer named `pre`; a guess would give wrong ids, so an unknown name is an
    error."""
    if pre not in _PATTERNS:
        raise KimiLiteError(
            f"The file asks for the pre-tokenizer {pre[:80]!r} (tokenizer.ggml.pre); known are {', '.join(_PATTERNS)}.",
            "Use a GGUF of the Kimi K2 family, DeepSeek-V3, SmolLM or GPT-2.",
        )
    return _PATTERNS[pre]()


def chunks(text: str) -> Iterator[str]:
    """`text` in parts that may be encoded one by one: at most BLOCK_CHARS long, no run of spaces or words above
    RUN_CHARS."""
    for start in range(0, len(text), BLOCK_CHARS):
        block = text[start : start + BLOCK_CHARS]
        done = 0
        if len(block) > RUN_CHARS:
            for run in _RUNS.finditer(block):
                for cut in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS):
                    yield block[done:cut]
                    done = cut
        yield block[done:]
