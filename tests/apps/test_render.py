"""What is shown of an answer, a model and its statistics."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from kimi_lite.apps.render import AnswerView, describe_model, stats_line
from kimi_lite.engine.types import ModelInfo, Stats, Token
from kimi_lite.text.tool_calls import ToolCall

STATS = Stats(
    prompt_tokens=1842, cached_tokens=1200, prompt_s=10, generated_tokens=412, generation_s=50, time_to_first_token_s=10.6
)


def token(kind: str, text: str, **more: object) -> Token:
    return Token("a", 1, text, kind, None, STATS, **more)


def show(*tokens: Token, shows_reasoning: bool = True) -> tuple[str, str]:
    """(stdout, aside)"""
    out, aside = io.StringIO(), io.StringIO()
    view = AnswerView(out, Console(file=aside), shows_reasoning)
    for one in tokens:
        view.show(one)
    view.close()
    return out.getvalue(), aside.getvalue()


def test_reasoning_and_answer_go_their_ways_without_the_empty_lines_between() -> None:
    tokens = [token("reasoning", "\nhm"), token("reasoning", "m\n"), token("content", "\n\n"), token("content", "yes\n\nno")]
    out, aside = show(*tokens)
    assert out == "yes\n\nno\n"
    assert aside == "hmm\n▸ thought for 0 s · 2 tokens\n"
    assert show(*tokens, shows_reasoning=False) == ("yes\n\nno\n", "")


def test_reasoning_without_an_answer_is_closed_too() -> None:
    assert show(token("reasoning", "hm")) == ("", "hm\n▸ thought for 0 s · 1 tokens\n")


def test_tool_calls_show_their_name() -> None:
    call = token("tool_call", "", call=ToolCall("functions.add:0", "add"))
    out, _ = show(token("content", "I add."), call, token("tool_call", '{"a": 1}'))
    assert out == 'I add.\nadd {"a": 1}\n'


def test_the_statistics_line() -> None:
    done = replace(token("content", ""), finish_reason="stop")
    assert stats_line(done) == "prompt 1,842 tok 64.2 t/s (1,200 cached) · gen 412 tok 8.2 t/s · TTFT 10.6 s"
    assert stats_line(replace(done, finish_reason="cancelled")).endswith("TTFT 10.6 s · stopped")
    unread = replace(STATS, cached_tokens=0, generated_tokens=0, generation_s=0.0)
    assert stats_line(replace(done, stats=unread, finish_reason="cancelled")) == "prompt 1,842 tok · gen 0 tok · stopped"


def test_the_model_line_names_the_types_that_matter() -> None:
    info = ModelInfo("Kimi K2.5", Path("x"), 274 * 10**9, (("IQ2_XXS", 261 * 10**9), ("Q8_0", 12 * 10**9), ("F32", 10**9)))
    assert describe_model(info) == "IQ2_XXS 95 %, Q8_0 4 % · 255.2 GiB"
