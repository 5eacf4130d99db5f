"""Markdown while it is written: the same screen however the text comes, nothing twice, nothing lost."""

import re
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.markdown.blocks import Blocks
from kimi_lite.apps.markdown.code import MOST_LINES, CodeColours
from kimi_lite.apps.markdown.stream import MarkdownStream
from tests.apps.screen import Screen

PIECES = (
    *(
        "word",
        "two words ",
        "**bold** ",
        "*em",
        "`co de` ",
        "$a_1*b*c$ ",
        "\\(x\\) ",
        "[l](http://u) ",
        "\n$$\n",
        "\n\\[ a_1\n",
        " b\\]\n",
        "$$",
        "<b>",
        "&amp;",
        "~~s~~",
    ),
    *(
        "\n",
        "\n",
        "\n\n",
        "\n  ",
        "\n   ",
        "\n    ",
        "\n- ",
        "\n* ",
        "\n1. ",
        "\n7) ",
        "\n> ",
        "\n## ",
        "\n---\n",
        "\n===\n",
        "\r\n",
    ),
    *(
        "\n```python\n",
        "\n```\n",
        "~~~\n",
        "\n| a | b |\n|---|--:|\n| 1 | 2 |\n",
        "def f(x): return 'y' # c\n",
        '"""\n',
        "\t",
    ),
    *("你好世界", "，", "日本語テキスト", "😀", "❤️", "👨‍👩‍👧", "é", "\x1b[2J", "\x07"),
    *("a long line of words that does not fit into one row of a screen that is sixty columns wide ", "x" * 70),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
EXAMPLE = """# Title
Some **bold** and *it* `code` with [link](http://x.y) and a line that wraps around at the sixty columns for sure.

1. one
   ```python
   def f(x):
       return "a"
   ```
2. two

   para in two
   - nested *a*
     > quoted
> quote
>
> second

| a | 你好 |
|---|--:|
| 1 | **2** |
"""
SHOWN = """Title

Some bold and it code with link (http://x.y) and a line that
wraps around at the sixty columns for sure.

1. one
   ```python
   def f(x):
       return "a"
   ```
2. two

   para in two
   • nested a
     ▌ quoted

▌ quote
▌
▌ second

a   你好
────────
1      2"""


def feed(screen: Screen, pieces: list[str]) -> Screen:
    stream = MarkdownStream(screen.console)
    for piece in pieces:
        stream._live.next_draw_s = 0.0  # draw every time
        stream.feed(piece)
    stream.finish()
    return screen


def cut(text: str, points: list[int]) -> list[str]:
    ends = [0, *sorted(point % (len(text) + 1) for point in points), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


def joined(text: str) -> str:
    """As pyte and rich count joined emoji differently, rows may end elsewhere: compare what they say."""
    return re.sub(r"\s+", "", text)


def test_what_blocks_look_like() -> None:
    for pieces in ([EXAMPLE], list(EXAMPLE)):
        assert re.sub(" +\n", "\n", feed(Screen(), pieces).text).replace("   ─", "───") == SHOWN


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_gives_the_same_screen(text: str, points: list[int]) -> None:
    assert feed(Screen(), cut(text, points)).text == feed(Screen(), [text]).text


@settings(deadline=None, max_examples=20)
@given(TEXTS)
def test_character_by_character_on_a_tiny_screen(text: str) -> None:
    """More rows than the screen has are in motion, and still nothing is shown twice."""
    assert feed(Screen(30, 4), list(text)).text == feed(Screen(30, 4), [text]).text


@settings(deadline=None, max_examples=12)
@given(TEXTS)
def test_nothing_that_scrolled_off_ever_changes(text: str) -> None:
    screen, scrolled = Screen(40, 5), []
    stream = MarkdownStream(screen.console)
    for char in text:
        stream._live.next_draw_s = 0.0
        stream.feed(char)
        assert screen.scrolled[: len(scrolled)] == scrolled
        scrolled = screen.scrolled


@settings(deadline=None, max_examples=40)
@given(TEXTS)
def test_leaves_found_line_by_line_are_those_of_the_whole_text(text: str) -> None:
    """Dropping lines that are done with does not change how the later ones are understood."""
    stream, blocks = MarkdownStream(Screen().console), Blocks()
    seen = []
    finish = stream._finish_leaf
    stream._finish_leaf = lambda leaf: seen.append(leaf) or finish(leaf)
    for line in text.split("\n"):
        stream._take(line)
    for leaf in stream._unprinted(stream._lines):
        stream._finish_leaf(leaf)
    lines = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "�", text.replace("\r\n", "\n")).split("\n")
    whole = blocks.leaves(lines)
    assert [(a.kind, a.start, [c.marker for c in a.containers]) for a in seen] == [
        (b.kind, b.start, [c.marker for c in b.containers]) for b in whole
    ]


def test_every_word_arrives_once() -> None:
    text = "\n\n".join(f"- item {i} 你好 😀\n\n  more of {i}" for i in range(60)) + "\n\nend"
    shown = feed(Screen(60, 10), list(text)).text
    assert [int(i) for i in re.findall(r"item (\d+)", shown)] == list(range(60))
    assert [int(i) for i in re.findall(r"more of (\d+)", shown)] == list(range(60))
    assert shown.endswith("end")


def test_wide_characters_end_at_the_sixtieth_column() -> None:
    rows = feed(Screen(60, 10), list("这是一个很长的句子" * 20 + "😀" * 40)).text.split("\n")
    assert "".join(rows) == "这是一个很长的句子" * 20 + "😀" * 40
    assert max(map(len, rows)) == 30


def test_code_is_printed_line_by_line() -> None:
    screen = Screen(60, 10)
    stream = MarkdownStream(screen.console)
    stream.feed("```python\n")
    for i in range(500):
        stream.feed(f"value_{i} = '{i}'\n")
        assert f"value_{i}" in screen.raw.getvalue()[-60:]
    stream.feed("```\nthen")
    stream.finish()
    assert screen.text.split("\n") == ["```python", *[f"value_{i} = '{i}'" for i in range(500)], "```", "", "then"]
    assert "\x1b[3" in screen.raw.getvalue()


def test_colours_do_not_depend_on_where_the_highlighter_starts() -> None:
    code = [
        line
        for i in range(40)
        for line in (f"def f{i}(x):", '    """Doc', "    'of' it.", '    """', f"    return x + {i}", "")
    ]
    whole, lines = CodeColours("python"), CodeColours("python")
    whole._forget = lambda lines: None
    for line in code:
        a, b = lines.add(line), whole.add(line)
        assert (a.plain, a.spans) == (b.plain, b.spans)
    assert len(lines._lines) <= 2 * MOST_LINES


def test_a_language_nobody_knows_is_plain() -> None:
    assert CodeColours("no-such").add("if x").spans == []


def test_numbers_go_on_after_items_were_printed() -> None:
    text = "3. a\n1. b\n\n   c\n1. d\n\ntext\n\n1. e\n"
    assert feed(Screen(), list(text)).text == "3. a\n4. b\n\n   c\n5. d\n\ntext\n\n1. e"


def test_controls_cannot_change_the_terminal() -> None:
    screen = feed(Screen(), ["a\x1b[2Jb `\x07` \x9b31m\n\n```sh\n\x1b]0;t\x07\n```\n"])
    assert "�[2J" in screen.text
    assert not re.search("\x1b(?!\\[[0-9;]*[mKA])|[\x07\x9b]", screen.raw.getvalue())


def test_formulas_stay_as_written() -> None:
    text = "So:\n\\[\na_1 * b_1\n- c * d\n\\]\nand $$x_1 * y * z_1$$ is\n$$ \\frac{a}{b} $$\n\n"
    text += "1. $$\n   e * f * g\n   $$\n2. \\[unclosed *a*\n\n*b*\n"
    shown = feed(Screen(), list(text)).text
    assert shown == (
        "So:\n\n\\[\na_1 * b_1\n- c * d\n\\]\n\nand $$x_1 * y * z_1$$ is\n\n$$ \\frac{a}{b} $$\n\n"
        "1. $$\n   e * f * g\n   $$\n2. \\[unclosed *a*\n\nb"
    )


def test_html_links_and_definitions_are_shown_not_swallowed() -> None:
    text = "<details>\n\n[a]: http://b\n\n![pic](http://c) <http://d>\n"
    assert feed(Screen(), [text]).text == "<details>\n\n[a]: http://b\n\npic (http://c) http://d"


def test_a_window_that_changes_its_width_loses_nothing() -> None:
    words = [f"word{i}" for i in range(80)]
    for width in (30, 90):
        screen = Screen(60, 12)
        stream = MarkdownStream(screen.console)
        stream.feed("first\n\n")
        for i, word in enumerate(words):
            if i == 40:
                screen.resize(width)
            stream._live.next_draw_s = 0.0
            stream.feed(word + " ")
        stream.finish()
        shown = screen.text
        assert shown.startswith("first")
        at = shown.rindex("word0 ")
        assert shown[at:].split() == words


def test_without_colour_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    screen.console.no_color = True
    feed(screen, ["**b** `c`\n\n```python\nx = 'y'\n```\n"])
    assert screen.text.startswith("b c")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", screen.raw.getvalue())


def test_drawing_leaves_most_of_the_time_to_the_model() -> None:
    """What is not complete is drawn again only when the last drawing is a small share of the time since."""
    screen = Screen()
    stream = MarkdownStream(screen.console)
    stream.feed("some")
    assert screen.text == "some"
    stream._live.next_draw_s = time.perf_counter() + 3600.0
    stream.feed(" more")
    assert screen.text == "some"
    stream._live.next_draw_s = 0.0
    stream.feed(" words")
    assert screen.text == "some more words"
    assert stream._live.next_draw_s > time.perf_counter() - 1.0
