"""The stream parser: every cut of the same text gives the same pieces, no marker is ever shown, nothing raises."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import pytest
from conftest import encode_markers, make_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from test_typescript import GET_WEATHER, tool

from kimi_lite.errors import KimiLiteError
from kimi_lite.text.stream import DEEPSEEK, KIMI, Piece, StreamParser, TextParser
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.text.tool_calls import ToolCall

BYTES = [bytes([byte]) for byte in range(256)]
MARKERS = ["<think>", "</think>", *(m for m in KIMI.markers if "tool_call_section" not in m)]
SPECIAL = [*MARKERS, "<|im_end|>", "<reserved>"]
SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
TOOLS = [GET_WEATHER, tool("noargs")]


def call(call_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(make_metadata(BYTES, SPECIAL, "gpt-2"))


@pytest.fixture(scope="module")
def plain_tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(make_metadata(BYTES, ["<|im_start|>", "<|im_end|>"], "gpt-2"))


class Answer:
    """All pieces of one answer, joined."""

    def __init__(self, parser: StreamParser, ids: Sequence[int]) -> None:
        self.pieces: list[Piece] = [piece for token_id in ids for piece in parser.feed(token_id)]
        self.pieces += parser.finish()
        self.calls, self.is_stopped = parser.tool_calls, parser.is_stopped
        self.reasoning, self.content = self._text("reasoning"), self._text("content")
        for piece in self.pieces:
            if piece.unsaid:
                assert piece.kind == "reasoning" and self.content.startswith(piece.unsaid)
                self.content = self.content.removeprefix(piece.unsaid)
        self.errors = [piece.error for piece in self.pieces if piece.error]

    def _text(self, kind: str) -> str:
        return "".join(piece.text for piece in self.pieces if piece.kind == kind)

    def streamed_calls(self) -> list[ToolCall]:
        """The calls as a client puts them together from the pieces alone."""
        opened = {piece.call_index: piece.call for piece in self.pieces if piece.call}
        texts = {i: "".join(p.text for p in self.pieces if p.call_index == i) for i in opened}
        return [ToolCall(opened[i].id, opened[i].name, texts[i]) for i in sorted(opened)]


def spelled(tokenizer: Tokenizer, text: str, starts_in_reasoning: bool = False, **more: object) -> Answer:
    """Parse `text` written in ordinary tokens only, byte by byte."""
    return Answer(StreamParser(tokenizer, starts_in_reasoning, **more), tokenizer.encode(text))


def marked(tokenizer: Tokenizer, text: str, starts_in_reasoning: bool = False, **more: object) -> Answer:
    """Parse `text` with its markers as control tokens."""
    return Answer(StreamParser(tokenizer, starts_in_reasoning, **more), encode_markers(tokenizer, text, SPECIAL))


BOTH = pytest.mark.parametrize("parse", [spelled, marked])


@BOTH
def test_reasoning_then_content(tokenizer: Tokenizer, parse) -> None:
    answer = parse(tokenizer, "hmm é😀</think>It is 4.", True)
    assert (answer.reasoning, answer.content) == ("hmm é😀", "It is 4.")
    assert parse(tokenizer, "<think>hmm</think>4", True).reasoning == "hmm"
    assert parse(tokenizer, "never closed", True).reasoning == "never closed"


@BOTH
def test_think_markers_at_the_start_of_content(tokenizer: Tokenizer, parse) -> None:
    opened = parse(tokenizer, "<think>hmm</think>4")
    assert (opened.reasoning, opened.content) == ("hmm", "4")
    assert parse(tokenizer, "</think>4").content == "4"
    assert parse(tokenizer, "<b>4</b> <").content == "<b>4</b> <"


def test_think_spelled_inside_content_is_a_word(tokenizer: Tokenizer) -> None:
    text = "Close it with </think> after <think>."
    assert spelled(tokenizer, text).content == text


def test_an_end_that_nothing_opened_makes_reasoning_of_what_came(tokenizer: Tokenizer) -> None:
    answer = marked(tokenizer, "a</think>b</think>c")
    assert (answer.reasoning, answer.content) == ("a", "bc")
    after_reasoning = marked(tokenizer, "<think>r</think>a</think>b")
    assert (after_reasoning.reasoning, after_reasoning.content) == ("r", "ab")
    parser = TextParser(KIMI, True, False, knows_bare_end=True)
    pieces = [piece for char in "one</thin</think>\n4 </think>" for piece in parser.feed_text(char)] + parser.finish()
    assert "".join(p.text for p in pieces if p.kind == "reasoning") == "one</thin"
    assert "".join(p.text for p in pieces if p.kind == "content") == "one</thin\n4 </think>"
    assert [piece.unsaid for piece in pieces if piece.unsaid] == ["one</thin"]


@BOTH
def test_a_tool_call_streams_id_and_name_first(tokenizer: Tokenizer, parse) -> None:
    answer = parse(
        tokenizer,
        f'hm</think>Look.{SECTION}{call("functions.get_weather:0", """ {"city": "北京"} """)}{END_SECTION}',
        True,
    )
    assert (answer.reasoning, answer.content, answer.errors) == ("hm", "Look.", [])
    assert answer.calls == (ToolCall("functions.get_weather:0", "get_weather", '{"city": "北京"}'),)
    assert answer.streamed_calls() == list(answer.calls)
    tool_pieces = [piece for piece in answer.pieces if piece.kind == "tool_call"]
    assert tool_pieces[0] == Piece("tool_call", call=ToolCall("functions.get_weather:0", "get_weather"), call_index=0)
    assert len(tool_pieces) > 10


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        SECTION + call("functions.a:0", "{}") + call("functions.b-c.d:12", '{"x": 1}') + END_SECTION,
        SECTION + " \n" + call(" functions.a:0\n", "\n{}\n") + "\n" + call("b-c.d:12", '{"x": 1}') + " " + END_SECTION,
        call("functions.a:0", "{}") + call("functions.b-c.d:12", '{"x": 1}'),
        "<|tool_call_section_begin|>"
        + call("a:0", "")
        + call("functions.b-c.d:12", '{"x": 1}')
        + "<|tool_call_section_end|>",
        SECTION
        + "<|tool_call_begin|>"
        + call("a:0", "{}")
        + call("b-c.d:12", '{"x": 1}').removesuffix("<|tool_call_end|>"),
        SECTION + call("a:0", "{}").removesuffix("<|tool_call_end|>") + call("b-c.d:12", '{"x": 1}') + END_SECTION,
        "<|tool_call_end|><|tool_call_argument_begin|>"
        + END_SECTION
        + call("a:0", "{}")
        + call("b-c.d:12", '{"x": 1}'),
    ],
)
def test_variants_of_tool_sections(tokenizer: Tokenizer, parse, text: str) -> None:
    for starts_in_reasoning in (False, True):
        answer = parse(tokenizer, text, starts_in_reasoning)
        assert [(c.name, c.arguments) for c in answer.calls] == [("a", "{}"), ("b-c.d", '{"x": 1}')]
        assert (answer.errors, answer.content + answer.reasoning) == ([], "")
        assert answer.streamed_calls() == list(answer.calls)


def test_ids_are_verbatim(tokenizer: Tokenizer) -> None:
    answer = marked(tokenizer, call("search:3", "{}") + call("functions.search:41", "{}"))
    assert [c.id for c in answer.calls] == ["search:3", "functions.search:41"]


def test_words_between_and_after_calls_are_content(tokenizer: Tokenizer) -> None:
    answer = marked(tokenizer, f"a {SECTION} {call('f:0', '{}')} and then \n {call('g:1', '{}')}{END_SECTION} b")
    assert (answer.content, len(answer.calls), answer.errors) == ("a  and then b", 2, [])


@BOTH
def test_a_bare_number_is_named_by_its_arguments(tokenizer: Tokenizer, parse) -> None:
    answer = parse(tokenizer, SECTION + call("3", '{"city": "Rome", "days": 2}') + END_SECTION, tools=TOOLS)
    assert answer.calls == (ToolCall("functions.get_weather:3", "get_weather", '{"city": "Rome", "days": 2}'),)
    assert answer.streamed_calls() == list(answer.calls)
    assert "names no tool" in parse(tokenizer, call("3", '{"town": "Rome"}'), tools=TOOLS).errors[0]
    assert "names no tool" in parse(tokenizer, call("3", "[1]"), tools=TOOLS).errors[0]
    assert "names no tool" in parse(tokenizer, call("3", "{}")).errors[0]
    odd_tools = ["f", {}, {"function": "f"}, {"function": {"parameters": []}}]
    assert "names no tool" in parse(tokenizer, call("3", '{"x": 1}'), tools=odd_tools).errors[0]


WEATHER, NOARGS = '{"city": "Rome"}', "{}"
CALL_IDS = [
    ("functions.get_weather:0", WEATHER, "functions.get_weather:0"),
    ("get_weather:7", WEATHER, "get_weather:7"),
    ("functionsget_weather0", WEATHER, "functions.get_weather:0"),
    ("functions.get_weather5", WEATHER, "functions.get_weather:5"),
    ("functions.get_weather", WEATHER, "functions.get_weather:9"),
    ("Functions.Get-Weather:2", WEATHER, "Functions.Get-Weather:2"),
    ("call_get_weather", WEATHER, "functions.get_weather:9"),
    ("call00003", WEATHER, "functions.get_weather:3"),
    ("call_a1b2c3", WEATHER, "functions.get_weather:9"),
    ("42", WEATHER, "functions.get_weather:42"),
    ("", WEATHER, "functions.get_weather:9"),
    ("noargs", NOARGS, "functions.noargs:9"),
    ("call_x", NOARGS, "functions.noargs:9"),  # get_weather needs a city
]


@BOTH
@pytest.mark.parametrize(("written", "arguments", "call_id"), CALL_IDS)
def test_ids_of_every_shape_name_a_declared_tool(
    tokenizer: Tokenizer, parse, written: str, arguments: str, call_id: str
) -> None:
    """As vLLM's, SGLang's and llama-server's issue trackers report them; the number that was written is kept."""
    answer = parse(tokenizer, SECTION + call(written, arguments) + END_SECTION, tools=TOOLS, num_calls=9)
    name = "noargs" if arguments == NOARGS else "get_weather"
    assert [(c.name, c.arguments) for c in answer.calls] == [(name, arguments)]
    assert answer.calls[0].id == call_id
    assert (answer.errors, answer.streamed_calls()) == ([], list(answer.calls))


@BOTH
def test_ids_are_unique_in_an_answer(tokenizer: Tokenizer, parse) -> None:
    answer = parse(tokenizer, call("functions.f:0", "{}") + call("functions.f:0", '{"a": 1}') + call("f", "{}"))
    assert [c.id for c in answer.calls] == ["functions.f:0", "functions.f:1"]
    assert "names no tool" in answer.errors[0]  # `f` is not declared


@BOTH
def test_arguments_without_their_marker(tokenizer: Tokenizer, parse) -> None:
    answer = parse(tokenizer, SECTION + '<|tool_call_begin|>functions.f:0{"a": {}}<|tool_call_end|>' + END_SECTION)
    assert answer.calls == (ToolCall("functions.f:0", "f", '{"a": {}}'),)
    assert answer.streamed_calls() == list(answer.calls)


def deepseek_call(name: str, arguments: str, is_v3: bool) -> str:
    head = f"function{DEEPSEEK.arguments_begin}{name}\n```json\n" if is_v3 else f"{name}{DEEPSEEK.arguments_begin}"
    return DEEPSEEK.call_begin + head + arguments + ("\n```" if is_v3 else "") + DEEPSEEK.call_end


@pytest.mark.parametrize("is_v3", [True, False])
@pytest.mark.parametrize("is_spelled", [True, False])
def test_deepseeks_calls(is_v3: bool, is_spelled: bool) -> None:
    special = [*DEEPSEEK.markers, "<think>", "</think>"]
    tokenizer = Tokenizer.from_metadata(make_metadata(BYTES, special, "deepseek-v3"))
    calls = deepseek_call("get_weather", '{"city": "```Rome"}', is_v3) + "\n" + deepseek_call("noargs", "{}", is_v3)
    text = f"hm</think>Look.{DEEPSEEK.section_begin[0]}{calls}{DEEPSEEK.section_end[0]}"
    ids = tokenizer.encode(text) if is_spelled else encode_markers(tokenizer, text, special)
    answer = Answer(StreamParser(tokenizer, True), ids)
    assert (answer.reasoning, answer.content, answer.errors) == ("hm", "Look.", [])
    assert answer.calls == (
        ToolCall("functions.get_weather:0", "get_weather", '{"city": "```Rome"}'),
        ToolCall("functions.noargs:1", "noargs", "{}"),
    )
    assert answer.streamed_calls() == list(answer.calls)


@BOTH
@pytest.mark.parametrize(
    ("text", "message", "num_calls"),
    [
        (call("functions.a:0", '{"x": '), "not a JSON object", 1),
        (call("functions.a:0", "[1]"), "not a JSON object", 1),
        (call("functions.a:0", "[" * 5000), "not a JSON object", 1),
        (call("functions.a:0", '{"x": "cut').removesuffix("<|tool_call_end|>"), "not a JSON object", 1),
        (call("what is this", "{}"), "'what is this' cannot be used", 0),
        ("<|tool_call_begin|>functions.a:0<|tool_call_end|>", "before its arguments", 0),
        ("<|tool_call_begin|>functions.a:0", "before its arguments", 0),
        ("<|tool_call_begin|>functions.a:0<|tool_call_begin|>", "before its arguments", 0),
    ],
)
def test_malformed_calls_say_so(tokenizer: Tokenizer, parse, text: str, message: str, num_calls: int) -> None:
    answer = parse(tokenizer, text, True)
    assert message in answer.errors[0]
    assert len(answer.calls) == num_calls


def test_markers_inside_json_strings_are_data(tokenizer: Tokenizer) -> None:
    arguments = json.dumps({"code": 'say "<|tool_call_end|>" or \\ <|tool_calls_section_end|>', "t": "</think><think>"})
    answer = spelled(tokenizer, SECTION + call("functions.write:0", arguments) + END_SECTION)
    assert answer.calls == (ToolCall("functions.write:0", "write", arguments),)
    ids = encode_markers(tokenizer, call("functions.write:0", '{"t": "<think>"}'), SPECIAL)
    assert Answer(StreamParser(tokenizer, False), ids).calls[0].arguments == '{"t": "<think>"}'


@BOTH
def test_stop_strings_cut_content_only(tokenizer: Tokenizer, parse) -> None:
    answer = parse(tokenizer, "STOP</think>one STOP two", True, stop=("STOP", "never"))
    assert (answer.reasoning, answer.content, answer.is_stopped) == ("STOP", "one ", True)
    assert parse(tokenizer, "one STO", stop=("STOP",)).content == "one STO"
    assert not parse(tokenizer, "one STO", stop=("STOP",)).is_stopped
    with pytest.raises(KimiLiteError, match="empty"):
        StreamParser(tokenizer, False, stop=("",))


def test_stop_string_at_a_control_token(tokenizer: Tokenizer) -> None:
    answer = marked(tokenizer, f"ab{SECTION}{call('f:0', '{}')}", stop=("ab",))
    assert (answer.content, answer.calls, answer.is_stopped) == ("", (), True)


def test_other_control_tokens_are_silent(tokenizer: Tokenizer) -> None:
    assert marked(tokenizer, "a<reserved>b<|im_end|>").content == "ab"
    assert marked(tokenizer, "<think<reserved>>x").content == "<think>x"


def test_bytes_are_decoded_across_tokens(tokenizer: Tokenizer) -> None:
    parser = StreamParser(tokenizer, False)
    first, rest = [parser.feed(i) for i in "😀".encode()[:3]], parser.feed("😀".encode()[3])
    assert (first, rest) == ([[], [], []], [Piece("content", "😀")])
    assert Answer(StreamParser(tokenizer, False), [0xF0, 0x9F, ord("a"), 0xC3]).content == "\ufffda\ufffd"
    assert (
        Answer(StreamParser(tokenizer, False), [0xF0, 0x9F, *encode_markers(tokenizer, "<reserved>", SPECIAL)]).content
        == "\ufffd"
    )


def test_kind_of_the_next_token(tokenizer: Tokenizer) -> None:
    parser = StreamParser(tokenizer, True)
    kinds = [parser.kind]
    for marker in ("</think>", SECTION, "<|tool_call_begin|>", END_SECTION):
        parser.feed(tokenizer.special[marker])
        kinds.append(parser.kind)
    assert kinds == ["reasoning", "content", "tool_call", "tool_call", "content"]


def test_a_model_without_markers_only_has_content(plain_tokenizer: Tokenizer) -> None:
    text = f"<think>x</think>{SECTION}{call('f:0', '{}')}<"
    answer = Answer(StreamParser(plain_tokenizer, False), plain_tokenizer.encode(text))
    assert (answer.content, answer.calls) == (text, ())
    reasoning = Answer(StreamParser(plain_tokenizer, True), plain_tokenizer.encode("hm</think>4"))
    assert (reasoning.reasoning, reasoning.content) == ("hm", "4")


SNIPPETS = [
    *MARKERS,
    "<|tool_call_section_begin|>",
    "functions.f:0",
    "7",
    '{"a": "',
    '"}',
    "\\",
    "{}",
    "<",
    "<|",
    "</",
    "|>",
    " ",
    "\n",
]
SNIPPETS += ["'", "True", "\t", ",}", "```", "[", "null", "é", "😀", "<|tool_call_", "stop", "st", "op", "x"]
TEXTS = st.lists(
    st.sampled_from(SNIPPETS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=3), max_size=14
).map("".join)


def outcome(answer: Answer) -> tuple:
    return answer.reasoning, answer.content, answer.calls, answer.errors, answer.is_stopped, answer.streamed_calls()


class CutTokenizer:
    """A vocabulary whose tokens are the given parts of a text: what a StreamParser needs of a tokenizer."""

    special: ClassVar = dict.fromkeys(SPECIAL, -1)

    def __init__(self, parts: list[bytes]) -> None:
        self.decode_bytes = parts.__getitem__

    def is_control(self, token_id: int) -> bool:
        return False


@settings(max_examples=400, deadline=None)
@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200), max_size=12),
    starts_in_reasoning=st.booleans(),
    has_stop=st.booleans(),
)
def test_every_cut_gives_the_same_answer(text: str, cuts: list[int], starts_in_reasoning: bool, has_stop: bool) -> None:
    """The text cut at random bytes, each part one token, against one token a byte."""
    data = text.encode()
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [data[start:end] for start, end in pairwise(bounds)]
    answers = []
    for tokens in (parts, [data[i : i + 1] for i in range(len(data))]):
        parser = StreamParser(CutTokenizer(tokens), starts_in_reasoning, ("top", "stop<") if has_stop else (), TOOLS)
        answers.append(Answer(parser, range(len(tokens))))
    assert outcome(answers[0]) == outcome(answers[1])
    for marker in KIMI.markers:
        assert marker not in answers[0].content
        assert marker not in answers[0].reasoning
    assert "</think>" not in answers[0].reasoning


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, starts_in_reasoning=st.booleans())
def test_control_tokens_in_any_order_never_raise_nor_show(
    tokenizer: Tokenizer, text: str, starts_in_reasoning: bool
) -> None:
    answer = marked(tokenizer, text, starts_in_reasoning, tools=TOOLS)
    assert answer.streamed_calls() == list(answer.calls)
    for marker in MARKERS:
        assert marker not in answer.content + answer.reasoning


def test_text_without_markers_is_unchanged(tokenizer: Tokenizer) -> None:
    text = "if a < b: print('<|x|>') # <tool> </thin"
    assert spelled(tokenizer, text).content == text
    assert spelled(tokenizer, text, True).reasoning == text


DEEPSEEK_SNIPPETS = [*DEEPSEEK.markers, "<think>", "</think>", "function", "get_weather", "noargs", "\n", "```json\n"]
DEEPSEEK_SNIPPETS += ['{"city": "', '"}', "{}", "```", "<｜", "｜>", "x", " ", "7", "'", "\t"]


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.sampled_from(DEEPSEEK_SNIPPETS), max_size=16).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    starts_in_reasoning=st.booleans(),
)
def test_every_cut_of_a_text_gives_the_same_answer(text: str, cuts: list[int], starts_in_reasoning: bool) -> None:
    """DeepSeek's markers, and a bare </think>, as an endpoint's text comes."""
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    outcomes = []
    for parts in ([text[start:end] for start, end in pairwise(bounds)], list(text)):
        parser = TextParser(DEEPSEEK, True, starts_in_reasoning, tools=TOOLS, knows_bare_end=True)
        pieces = [piece for part in parts for piece in parser.feed_text(part)] + parser.finish()
        said = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")}
        unsaid = "".join(piece.unsaid for piece in pieces)
        assert said["content"].startswith(unsaid)
        assert unsaid in said["reasoning"]
        errors = [piece.error for piece in pieces if piece.error]
        outcomes.append((said["reasoning"], said["content"].removeprefix(unsaid), errors, parser.tool_calls))
    assert outcomes[0] == outcomes[1]
    assert all(marker not in outcomes[0][1] for marker in DEEPSEEK.markers)
