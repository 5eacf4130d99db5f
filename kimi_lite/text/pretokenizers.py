"""How text is cut into pieces before byte-pair merging, by the file's `tokenizer.ggml.pre` name.

`SPLITS` is the one table: for each name the row of expressions as the model's tokenizer.json writes it, each applied to
the pieces of the one before (`tokenizers`' Split with behaviour "isolated"). `quantize` finds the name by the row
(`name_of`), the runtime cuts by it (`Splitter`). Names and rows: llama.cpp's llama-vocab.cpp and the models'
tokenizer.json; where the two differ, tokenizer.json is followed, since the model was trained with that.

tiktoken takes one expression, in the syntax of Rust's `regex`, and drops what it does not match; so every expression in
`_JOINED` matches every character. Where several splits of a row were joined (`smollm`, `deepseek-v3`), later splits
cannot look across the cuts of earlier ones: the single expression says so in its classes and look-aheads. Other rows of
several splits run one after the other in Python.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import tiktoken

from kimi_lite.errors import KimiLiteError

BLOCK_CHARS = 400_000  # text is encoded in blocks of this many characters, as the vendor's tokenizer does
RUN_CHARS = 25_000  # and cut so that no run of (non-)whitespace is longer; the regex engine's stack ends not far above

_RUNS = re.compile(r"\s+|\S+")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK_WIDE = "[一-龥\u0800-一가-\ud7ff]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(contraction: str) -> str:
    """Words cut where lower case turns to upper, with one character of another kind before them (o200k, Tekken)."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return rf"{lead}{_UPPER}*{_LOWER}+{contraction}|{lead}{_UPPER}+{_LOWER}*{contraction}"


def _words(digits: str) -> str:
    """cl100k's words, with numbers as `digits` says (Llama 3, GLM-4, Qwen)."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"


def _kimi_k2() -> str:
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return "|".join(
        (
            r"[\p{Han}]+",
            rf"{lead}{upper}*{lower}+{_CONTRACTIONS}?",
            rf"{lead}{upper}+{lower}*{_CONTRACTIONS}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            _LINES,
        )
    )


_DEEPSEEK_LETTERS = (  # with case, as DeepSeek's first tokenizers spell them out; escaped where NFC would change them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbe"
    "ῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲"
    "𑢠-𑣟𞤀-𞥃"
)

SPLITS: dict[str, tuple[str, ...]] = {
    "kimi-k2": (_kimi_k2(),),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES,
    ),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        _CJK_WIDE,
        r"\p{N}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_WIDE, r"\p{N}"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(r"\p{N}"),),
    "gpt-4o": (_cased_words(f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES,),
    "tekken": (_cased_words("") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES,),
    "youtu": (
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，\u3001-\u303f︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
        _cased_words(f"{_CONTRACTIONS}?") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES,
    ),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}

_SAME_AS = {  # other names of the same rows, as llama.cpp has them
    "joyai-llm": "deepseek-v3",
    "hunyuan-dense": "deepseek-v3",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "chatglm-bpe": "llama-bpe",
    "glm4": "llama-bpe",
    "glm5": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "kanana2": "gpt-4o",
    "llama4": "gpt-4o",
}


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


_JOINED = {"smollm": _smollm, "deepseek-v3": _deepseek_v3}


class Splitter:
    """The cutting rule of one name. `pattern` is for tiktoken; where it is "" `pieces` cuts instead."""

    def __init__(self, name: str) -> None:
        row = SPLITS[name]
        self.pattern = _JOINED[name]() if name in _JOINED else row[0] if len(row) == 1 else ""
        self._steps = [] if self.pattern else [re.compile(_python_syntax(pattern)) for pattern in row]

    def pieces(self, text: str) -> list[str]:
        """`text` cut by every step of the row in turn, each within the pieces of the one before."""
        pieces = [text]
        for step in self._steps:
            pieces = [part for piece in pieces for part in _isolated(step, piece)]
        return pieces


@cache
def splitter(pre: str) -> Splitter:
    """The rule for the pre-tokenizer named `pre`; a guess would give wrong ids, so an unknown name is an error."""
    name = _SAME_AS.get(pre, pre)
    if name not in SPLITS:
        raise KimiLiteError(
            f"The file asks for the pre-tokenizer {pre[:80]!r} (tokenizer.ggml.pre); known are {', '.join(SPLITS)}.",
            "Use a GGUF of the Kimi K2 family, DeepSeek, SmolLM or GPT-2.",
        )
    return Splitter(name)


def name_of(row: Sequence[str]) -> str | None:
    """The name of a row of expressions as a tokenizer.json has it (its Digits step as `\\p{N}`), None if unknown."""
    return next((name for name, known in SPLITS.items() if tuple(row) == known), None)


def _isolated(step: re.Pattern, text: str) -> Iterator[str]:
    """Matches and what lies between them, in order."""
    bounds = {0, len(text)}
    for match in step.finditer(text):
        if match.end() > match.start():
            bounds |= {match.start(), match.end()}
    return (text[start:end] for start, end in pairwise(sorted(bounds)))


_SPACES = "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
_ESCAPE = re.compile(r"\\p\{(\w+)\}|\\[sS]|\\.|\[|\]", re.DOTALL)


def _python_syntax(pattern: str) -> str:
    """`pattern` for Python's `re`, which knows no categories and has another idea of whitespace and of `$`."""
    is_in_class = False

    def translated(match: re.Match) -> str:
        nonlocal is_in_class
        found = match.group()
        if found in "[]":
            is_in_class = found == "["
            return found
        if match[1] or found == r"\s":
            members = _members(match[1]) if match[1] else _SPACES
            return members if is_in_class else f"[{members}]"
        return f"[^{_SPACES}]" if found == r"\S" else found

    return re.sub(r"\$$", r"\\Z", _ESCAPE.sub(translated, pattern))


@cache
def _members(category: str) -> str:
    """All characters of a Unicode category as ranges of a class, by the tables of tiktoken's regex engine.

    tiktoken drops what its pattern does not match: of all characters in a row those of the category are left.
    """
    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=rf"\p{{{category}}}", mergeable_ranks=ranks, special_tokens={})
    codes = [ord(char) for char in bytes(encoding.encode_ordinary(everything)).decode()]
    starts = [code for last, code in pairwise([-1, *codes]) if code != last + 1 or last < 0]
    ends = [code for code, following in pairwise([*codes, 0x110001]) if following != code + 1]
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))


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
