"""What is shown of an answer, a model and its statistics."""

import io
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.chat.render import (
    REASONING_ROWS,
    AnswerView,
    ReasoningView,
    stats_line,
)
from kimi_lite.apps.markdown.stream import MarkdownStream
from kimi_lite.apps.opening import describe_model
from kimi_lite.engine.types import ModelInfo, Stats, Token
from kimi_lite.terminal import Console
from kimi_lite.text.tool_calls import ToolCall
from tests.apps.screen import Screen

STATS = Stats(
    prompt_tokens=1842,
    cached_tokens=1200,
    prompt_s=10,
    generated_tokens=412,
    generation_s=50,
    time_to_first_token_s=10.6,
)


def token(kind: str, text: str, **more: object) -> Token:
    return Token("a", 1, text, kind, None, STATS, **more)


def show(*tokens: Token, shows_reasoning: bool = True) -> tuple[str, str]:
    """(stdout, status)"""
    out, status = io.StringIO(), io.StringIO()
    view = AnswerView(out, Console(file=status), shows_reasoning)
    for one in tokens:
        view.show(one)
    view.close()
    return out.getvalue(), status.getvalue()


def test_reasoning_and_answer_go_their_ways_without_the_empty_lines_between() -> None:
    tokens = [
        token("reasoning", "\nhm"),
        token("reasoning", "m\n"),
        token("content", "\n\n"),
        token("content", "yes\n\nno"),
    ]
    out, status = show(*tokens)
    assert out == "yes\n\nno\n"
    assert status == "hmm\n▸ thought for 0 s · 2 tokens\n"
    assert show(*tokens, shows_reasoning=False) == ("yes\n\nno\n", "")


def test_reasoning_without_an_answer_is_closed_too() -> None:
    assert show(token("reasoning", "hm")) == ("", "hm\n▸ thought for 0 s · 1 token\n")


def test_an_empty_answer_is_said_to_be_none() -> None:
    end = replace(token("content", ""), finish_reason="stop")
    assert show(end) == ("", "the model said nothing\n")
    assert show(token("reasoning", "hm"), end) == ("", "hm\n▸ thought for 0 s · 1 token\nthe model only thought\n")
    assert show(token("content", "x"), end) == ("x\n", "")
    assert show(replace(end, finish_reason="cancelled")) == ("", "")
    broken = token("tool_call", "", error="Tool call 'x' cannot be used.")
    assert show(broken, end) == ("", "Tool call 'x' cannot be used.\n")


def test_content_that_was_reasoning_after_all_is_taken_back() -> None:
    view = AnswerView(io.StringIO(), Console(file=io.StringIO()), True)
    first = [token("content", "hm"), token("reasoning", "hm", unsaid="hm"), token("content", "4")]
    for one in [*first, replace(token("content", ""), finish_reason="tool_calls"), token("content", "hm")]:
        view.show(one)
    assert (view.texts["reasoning"], view.texts["content"]) == ("hm", "4hm")


def test_tool_calls_are_no_part_of_the_answer() -> None:
    call = token("tool_call", "", call=ToolCall("functions.add:0", "add"))
    broken = token("tool_call", "", error="Tool call 'x' cannot be used.")
    out, status = show(
        token("content", "I add."), call, token("tool_call", '{"a": 1}'), broken, token("content", "Done")
    )
    assert out == "I add.\nDone\n"
    assert status == "→ add {\"a\": 1}\nTool call 'x' cannot be used.\n"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_screen(*tokens: Token, is_plain: bool = False, hint: str = "") -> Screen:
    """Answer and remarks on one terminal."""
    screen = Screen(60, 20)
    view = AnswerView(Tty(), screen.console, True, is_plain, think_hint=hint)
    view._markdown = None if is_plain else MarkdownStream(screen.console)
    view.out = Both(screen)
    for one in tokens:
        view.show(one)
    view.close()
    return screen


class Both(Tty):
    """Writes to a screen's console as it is."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def write(self, text: str) -> int:
        return self._screen.raw.write(text)


def test_on_a_terminal_reasoning_collapses_and_the_answer_is_markdown() -> None:
    thoughts = [token("reasoning", f"thought {i}\n") for i in range(50)]
    screen = on_screen(*thoughts, token("content", "\n\n**yes**, "), token("content", "- no"), hint="/think show")
    assert screen.text == "▸ thought for 0 s · 50 tokens (/think show)\nyes, - no"
    assert "thought 0" in screen.raw.getvalue()
    assert "\x1b[2m" in screen.raw.getvalue()


def test_reasoning_in_progress_shows_its_last_rows() -> None:
    screen = Screen(60, 20)
    view = ReasoningView(screen.console)
    for i in range(50):
        view._live.next_draw_s = 0.0
        view.add(token("reasoning", f"thought {i}\n"))
    assert screen.text.split("\n")[0] == f"thought {50 - REASONING_ROWS + 1}"
    assert screen.text.split("\n")[-1] == "thought 49"


def test_hidden_reasoning_is_counted() -> None:
    screen = Screen(60, 20)
    view = AnswerView(io.StringIO(), screen.console, shows_reasoning=False)
    for text in ("secret", " thoughts"):
        view._thinking._live.next_draw_s = 0.0
        view.show(token("reasoning", text))
    assert screen.text == "thinking… 0 s · 2 tokens"
    view.show(token("content", "yes"))
    view.close()
    assert screen.text == "▸ thought for 0 s · 2 tokens"
    assert "secret" not in screen.raw.getvalue()
    quiet = AnswerView(io.StringIO(), screen.console, shows_reasoning=False, shows_calls=False)
    quiet.show(token("reasoning", "secret"))
    quiet.close()
    assert screen.text == "▸ thought for 0 s · 2 tokens"


def test_plain_is_as_it_comes_but_for_controls() -> None:
    screen = on_screen(token("reasoning", "hm"), token("content", "**y**\x1b[31m"), is_plain=True)
    assert screen.text == "hm\n▸ thought for 0 s · 1 token\n**y**�[31m"


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(["reasoning", "content"]), st.text("ab \n*你", max_size=5)), max_size=30))
def test_any_stream_of_tokens_can_be_shown(pieces: list[tuple[str, str]]) -> None:
    tokens = [token(kind, text) for kind, text in pieces]
    said = "".join(text for kind, text in pieces if kind == "content").lstrip("\n")
    thought = "".join(text for kind, text in pieces if kind == "reasoning")
    out, status = show(*tokens)
    assert "".join(out.split()) == "".join(said.split())
    assert status.count("▸") <= len(pieces)
    assert bool(status) == bool(thought.strip("\n"))
    assert "▸" in on_screen(*tokens).text or not thought.strip("\n")


def test_the_statistics_line() -> None:
    done = replace(token("content", ""), finish_reason="stop")
    assert stats_line(done) == "prompt 1,842 tok 64.2 t/s (1,200 cached) · gen 412 tok 8.2 t/s · TTFT 10.6 s"
    assert stats_line(replace(done, finish_reason="cancelled")).endswith("TTFT 10.6 s · stopped")
    unread = replace(STATS, cached_tokens=0, generated_tokens=0, generation_s=0.0)
    assert (
        stats_line(replace(done, stats=unread, finish_reason="cancelled")) == "prompt 1,842 tok · gen 0 tok · stopped"
    )


def test_the_model_line_names_the_types_that_matter() -> None:
    info = ModelInfo(
        "Kimi K2.5", Path("x"), 274 * 10**9, (("IQ2_XXS", 261 * 10**9), ("Q8_0", 12 * 10**9), ("F32", 10**9))
    )
    assert describe_model(info) == "IQ2_XXS 95 %, Q8_0 4 % · 255.2 GiB"
