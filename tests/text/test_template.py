"""Prompts id by id against the vendor's, and the one promise of the template: nobody but it writes control tokens."""

import json
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import make_metadata, rendered
from hypothesis import given, settings
from hypothesis import strategies as st
from test_typescript import GET_WEATHER, HEAD, tool

from kimi_lite.errors import KimiLiteError
from kimi_lite.text import isolation
from kimi_lite.text.sandbox import MAX_CPU_S, MAX_MEMORY_BYTES, MAX_TEMPLATES
from kimi_lite.text.stream import StreamParser
from kimi_lite.text.template import ChatTemplate, TemplateFacts
from kimi_lite.text.tokenizer import Tokenizer
from tests.layouts import DEEPSEEK_R1, DEEPSEEK_SPECIAL, DEEPSEEK_V31, HERMES, KIMI_K2, KIMI_SPECIAL

BYTES = [bytes([byte]) for byte in range(256)]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER_CALL = {
    "id": "functions.get_weather:0",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city":"Beijing"}'},
}


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def answer(content: object, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(scope="module")
def template(kimi: Tokenizer) -> ChatTemplate:
    return ChatTemplate.from_metadata({}, kimi)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<s>"]
    return Tokenizer.from_metadata(make_metadata(BYTES, special, "gpt-2", bos_token_id=260, eos_token_id=257))


@pytest.fixture(scope="module")
def make(small: Tokenizer) -> Callable[[str], ChatTemplate]:
    return lambda source: ChatTemplate.from_metadata({"tokenizer.chat_template": source}, small)


A = [163587, 2482, 163601, 18699, 163586, 163588, 69702, 163601, 163606]
C = [163594, 14062, 163601, 3900, 554, 24980, 72, 11, 519, 22572, 26626, 5232, 673, 30218, 10065, 22572, 13, 163586]
D_HEAD = [163587, 2482, 163601, 16, 10, 16, 30, 163586, 163588, 69702, 163601, 163606]
D_TAIL = [163607, 17, 163586, 163587, 2482, 163601, 17, 10, 17, 30, 163586, 163588, 69702, 163601, 163606]
SYSTEM = {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."}
DIALOGUE = [user("1+1?"), answer("2", reasoning_content="easy"), user("2+2?")]


def test_vectors_a_to_d(template: ChatTemplate, kimi: Tokenizer) -> None:
    assert template.encode([user("Hi")]).ids == A
    assert template.encode([user("Hi")], thinking=False).ids == [*A, 163607]
    assert template.encode([SYSTEM, user("Hi")]).ids == C + A
    assert template.encode(DIALOGUE).ids == D_HEAD + D_TAIL
    assert template.encode(DIALOGUE, preserve_thinking=True).ids == D_HEAD + kimi.encode("easy") + D_TAIL
    assert template.encode([user("Hi")], add_generation_prompt=False).ids == A[:5]


def test_vector_e_tool_loop(template: ChatTemplate) -> None:
    messages = [
        user("Weather in Beijing?"),
        answer("", reasoning_content="need tool", tool_calls=[WEATHER_CALL]),
        {"role": "tool", "name": "get_weather", "tool_call_id": "functions.get_weather:0", "content": '{"t": 20}'},
    ]
    text = rendered(template, messages, tools=[GET_WEATHER])
    declaration, _, rest = text.partition("<|im_end|>")
    assert declaration.startswith(f"<|im_system|>tool_declare<|im_middle|>{HEAD}// Get weather information.\n")
    assert declaration.endswith("}) => any;\n}\n")
    assert rest == (
        "<|im_user|>user<|im_middle|>Weather in Beijing?<|im_end|><|im_assistant|>assistant<|im_middle|><think>need tool</think>"  # noqa: E501
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city":"Beijing"}<|tool_call_end|><|tool_calls_section_end|><|im_end|><|im_system|>get_weather<|im_middle|>'
        '## Return of functions.get_weather:0\n{"t": 20}<|im_end|><|im_assistant|>assistant<|im_middle|><think>'
    )
    assert rendered(template, messages, thinking=False).count("<think></think>") == 2


def e2_messages(first_id: str, second_id: str) -> list[dict]:
    calls = [
        {"id": first_id, "type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}},
        {"id": second_id, "type": "function", "function": {"name": "noargs", "arguments": {}}},
    ]
    results = [{"role": "tool", "tool_call_id": i, "content": c} for i, c in ((first_id, "A"), (second_id, "B"))]
    return [user("W?"), answer(None, tool_calls=calls), *results]


E2 = [
    *(
        163587,
        2482,
        163601,
        54,
        30,
        163586,
        163588,
        69702,
        163601,
        163606,
        163607,
        163595,
        163597,
        41937,
        1150,
        21055,
        2800,
        25,
    ),
    *(
        15,
        163598,
        8264,
        37666,
        1289,
        414,
        3372,
        16934,
        163599,
        163597,
        41937,
        30525,
        3992,
        25,
        16,
        163598,
        13071,
        163599,
        163596,
    ),
    *(
        163586,
        163594,
        20960,
        163601,
        798,
        6014,
        318,
        8271,
        1150,
        21055,
        2800,
        25,
        15,
        198,
        32,
        163586,
        163594,
        20960,
        163601,
    ),
    *(798, 6014, 318, 8271, 30525, 3992, 25, 16, 198, 33, 163586, 163588, 69702, 163601, 163606, 163607),
]


def test_vector_e2_two_calls(template: ChatTemplate) -> None:
    assert len(E2) == 72
    assert template.encode(e2_messages("functions.get_weather:0", "functions.noargs:1"), thinking=False).ids == E2


def test_foreign_call_ids_become_the_models(template: ChatTemplate) -> None:
    assert template.encode(e2_messages("call_x9", "chatcmpl-tool-7"), thinking=False).ids == E2
    verbatim = rendered(template, e2_messages("get_weather:7", "functions.noargs:8"))
    assert "<|tool_call_begin|>get_weather:7<|tool_call_argument_begin|>" in verbatim
    assert "## Return of functions.noargs:8\n" in verbatim


def test_vector_f_image(template: ChatTemplate) -> None:
    parts = [
        {"type": "text", "text": "Describe"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]
    f = [163587, 2482, 163601, 48848, 163602, 4017, 163603, 163605, 163604, 198, 163586, 163588, 69702, 163601, 163606]
    assert template.encode([user(parts)]).ids == f


def test_names_null_reasoning_and_unfinished_loops(template: ChatTemplate) -> None:
    assert rendered(template, [{**user("x"), "name": "Ann"}]).startswith("<|im_user|>Ann<|im_middle|>x<|im_end|>")
    loop = [user("q"), answer("", reasoning_content=None, tool_calls=[WEATHER_CALL])]
    assert "<think></think><|tool_calls_section_begin|>" in rendered(template, loop)
    assert "<think>late</think>" in rendered(
        template, [*DIALOGUE, answer("", reasoning_content="late", tool_calls=[WEATHER_CALL])]
    )


def test_tools_without_typescript_form_are_compact_sorted_json(template: ChatTemplate) -> None:
    odd = tool("f", {"type": "object", "properties": {"x": {"type": "date"}}})
    head = rendered(template, [user("x")], tools=[odd]).partition("<|im_end|>")[0]
    assert json.loads(head.removeprefix("<|im_system|>tool_declare<|im_middle|>")) == [odd]
    assert '{"function":{"name":"f","parameters":' in head


def test_starts_in_reasoning_only_after_an_open_think(
    template: ChatTemplate, make: Callable[[str], ChatTemplate]
) -> None:
    assert template.encode([user("Hi")]).starts_in_reasoning
    assert not template.encode([user("Hi")], thinking=False).starts_in_reasoning
    assert not template.encode([user("<think>")], add_generation_prompt=False).starts_in_reasoning
    assert not make(CHATML).encode([user("<think>")]).starts_in_reasoning
    assert make("{{ messages[0].content }}<think>\n").encode([user("Hi")]).starts_in_reasoning


LITERALS = [
    "<|im_end|>",
    "<|im_user|>",
    "[EOS]",
    "<think>",
    "</think>",
    "<|media_pad|>",
    "<|tool_call_begin|>",
    "<|im_",
    "end|>",
    "<",
    "|>",
]
NASTY = st.lists(
    st.sampled_from(LITERALS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=4), max_size=5
).map("".join)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(NASTY, min_size=9, max_size=9))
def test_no_user_text_becomes_a_control_token(template: ChatTemplate, kimi: Tokenizer, texts: list[str]) -> None:
    """Every string a client can set, all at once: the same control tokens as with harmless text, and the text
    unchanged."""

    def conversation(t: list[str]) -> tuple[list[dict], list[dict]]:
        call = {"id": t[3], "type": "function", "function": {"name": t[4], "arguments": t[5]}}
        messages = [
            {"role": "system", "name": "n" + t[0], "content": t[1]},
            user([{"type": "text", "text": t[2][:3]}, {"type": "text", "text": t[2][3:]}, {"type": "image_url"}]),
            answer(t[6], reasoning_content=t[7], tool_calls=[call]),
            {"role": "tool", "tool_call_id": t[3], "content": t[8]},
        ]
        properties = {t[1]: {"type": "string", "description": t[2], "default": t[3], "enum": [t[5]]}}
        return messages, [tool(t[6], {"type": "object", "properties": properties}, description=t[0])]

    ids = template.encode(*conversation(texts)).ids
    harmless = template.encode(*conversation(["x"] * 9)).ids
    assert [i for i in ids if i >= 163584] == [i for i in harmless if i >= 163584]
    assert kimi.decode(ids) == rendered(template, *conversation(texts))


@settings(max_examples=60, deadline=None)
@given(role=NASTY, content=NASTY)
def test_a_files_own_template_is_as_safe(
    make: Callable[[str], ChatTemplate], small: Tokenizer, role: str, content: str
) -> None:
    prompt = make(CHATML).encode([{"role": role, "content": content}])
    assert [i for i in prompt.ids if i >= 256] == [256, 257, 256, 257, 256]
    expected = f"<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>{role}\n{content}<|im_end|>\n<|im_start|>assistant\n"  # noqa: E501
    assert small.decode(prompt.ids) == expected


def test_templates_that_search_message_text_find_it(make: Callable[[str], ChatTemplate], small: Tokenizer) -> None:
    """As DeepSeek-R1's and Qwen3's templates cut the reasoning off; what remains is still text."""
    source = (
        "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}{% set c = "
        "c.split('</think>')[-1] | trim %}"
        "{% endif %}{{ c | replace('<s>', '') }}<|im_end|>{{ c | length }}{% endfor %}"
    )
    prompt = make(source).encode([answer("hm</think> 4<|im_end|><s>")])
    assert small.decode(prompt.ids) == "4<|im_end|><|im_end|>14"
    assert [i for i in prompt.ids if i >= 256] == [257]


def test_template_text_becomes_control_wherever_it_is_written(make: Callable[[str], ChatTemplate]) -> None:
    source = (
        "{% macro turn(end) %}x{{ end }}{% endmacro %}{% set tags = {'e': '<|im_end|>'} %}{{ bos_token }}{{ "
        "turn('<|im_end|>') }}"
        "{{ tags['e'] }}{{ ['a', 'b'] | join('<think>') }}{{ none | default('</think>', true) }}{{ '<s>' if 1 "
        "}}{{ eos_token }}"
    )
    ids = make(source).encode([user("")]).ids
    assert ids == [260, ord("x"), 257, 257, ord("a"), 258, ord("b"), 259, 260, 257]


def test_jinja_as_chat_templates_expect_it(make: Callable[[str], ChatTemplate]) -> None:
    source = (
        "{%- for m in messages %}\n    {% if m.content == 'stop' %}{% break %}{% endif %}\n{{ m | tojson }}{% endfor %}"
        "{{ tools | tojson(separators=(',', ':')) }}{{ {'é': '<&>'} | tojson(indent=1) }}{{ strftime_now('%Y') "
        "| length }}"
        "{{ thinking }}{{ enable_thinking }}{{ preserve_thinking }}"
    )
    text = rendered(make(source), [user("é<"), user("stop")], tools=[{"b": 1, "a": 2}], thinking=False)
    assert text == '{"role": "user", "content": "é<"}[{"b":1,"a":2}]{\n "é": "<&>"\n}4FalseFalseFalse'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('bad <|im_end|>') }}", "bad <|im_end|>$"),
        ("{% for %}", "does not compile"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "does not accept"),
        ("{{ messages.nothing.at.all }}", "does not accept"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "does not accept|does not compile"),
        ("{{ 9 ** 9 ** 9 }}", "operands that large"),
        ("{{ 2 ** 99999999 }}", "operands that large"),
        ("{{ (10 ** 300) ** 9 }}", "operands that large"),
        ("{{ 'x' * 10000000000 }}", "operands that large"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "loop steps|of work"),
        ("{% for i in range(99) %}{{ 'x' * 9999999 }}{% endfor %}", "characters"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "does not accept"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ '<|im_end|>'[:9] }}", "alters the text"),
        ("{{ '<|im_end|>'[-12:] }}", "alters the text"),
        ("x" * (1 << 21), "2097152 characters"),
    ],
)
def test_hostile_and_failing_templates_are_sentences(
    make: Callable[[str], ChatTemplate], source: str, message: str
) -> None:
    with pytest.raises(KimiLiteError, match=message):
        make(source).encode([user("Hi")])


def test_small_powers_are_computed(make: Callable[[str], ChatTemplate]) -> None:
    assert rendered(make("{{ 2 ** 3 }} {{ 10 ** 9 }} {{ 4 ** 0.5 }}"), [user("x")]) == "8 1000000000 2.0"


DEEP: list = []
for _ in range(70):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "messages",
    [
        ["Hi"],
        [{"content": "Hi"}],
        [{"role": 3, "content": "Hi"}],
        [user(object())],
        [user(DEEP)],
        [user({1: 2})],
        [answer("", tool_calls=["f"])],
        [answer("", tool_calls=[{"id": "x"}])],
        [answer("", tool_calls="f")],
        [user([1, 2]), {"role": "tool", "tool_call_id": ["x"]}, answer("", tool_calls=[{"function": {}}]), 5],
    ],
)
def test_malformed_messages_are_sentences(template: ChatTemplate, messages: list) -> None:
    with pytest.raises(KimiLiteError):
        template.encode(messages)


def test_a_file_without_any_template_is_refused(small: Tokenizer) -> None:
    with pytest.raises(KimiLiteError, match="no chat template"):
        ChatTemplate.from_metadata({}, small)
    with pytest.raises(KimiLiteError, match="no chat template"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": ["x"]}, small)


def test_the_generation_tag_renders_as_its_body(make: Callable[[str], ChatTemplate], small: Tokenizer) -> None:
    source = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
    )
    ids = make(source).encode([user("a"), answer("b")]).ids
    assert (small.decode(ids), ids[-1]) == ("ab<|im_end|>", 257)


def made(source: str, special: list[str]) -> ChatTemplate:
    metadata = make_metadata(BYTES, special, "gpt-2", bos_token_id=256, eos_token_id=257)
    metadata["tokenizer.chat_template"] = source
    return ChatTemplate.from_metadata(metadata, Tokenizer.from_metadata(metadata))


@pytest.mark.parametrize(
    ("source", "special", "facts"),
    [
        (KIMI_K2, KIMI_SPECIAL, TemplateFacts(False, True, False, "", False)),
        (DEEPSEEK_R1, DEEPSEEK_SPECIAL, TemplateFacts(True, True, False, None, False, fences_arguments=True)),
        (DEEPSEEK_V31, DEEPSEEK_SPECIAL, TemplateFacts(True, True, False, "", True)),
        (HERMES, KIMI_SPECIAL, TemplateFacts(False, False, False, "", True)),
        (HERMES, ["<|im_start|>", "<|im_end|>"], TemplateFacts(False, False, False, "", True)),
        (CHATML, KIMI_SPECIAL, TemplateFacts(False, False, False, "", False)),
        ("{{ raise_exception('no') }}", KIMI_SPECIAL, TemplateFacts(False, False, False, "", False)),
    ],
)
def test_what_templates_can_do(source: str, special: list[str], facts: TemplateFacts) -> None:
    assert made(source, special).facts == facts


def test_kimis_own_template_can_do_all(template: ChatTemplate) -> None:
    assert template.facts == TemplateFacts(True, True, True)


@pytest.mark.parametrize("source", [KIMI_K2, DEEPSEEK_R1, DEEPSEEK_V31])
def test_several_turns_of_calls_are_rendered_and_read_again(source: str) -> None:
    """What a template writes for past calls is what the parser reads from a model that goes on so."""
    template = made(source, KIMI_SPECIAL if source is KIMI_K2 else DEEPSEEK_SPECIAL)
    messages = [user("q")]
    for i, text in enumerate(['{"city": "Rome"}', '{"city": "Bern", "days": 2}']):
        call_id = f"functions.get_weather:{i}"
        call = {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": text}}
        messages += [answer("", reasoning_content="hm", tool_calls=[call])]
        messages += [{"role": "tool", "tool_call_id": call_id, "name": "get_weather", "content": f"result {i}"}]
    ids = template.encode([*messages, answer("done"), user("more?")], tools=[GET_WEATHER]).ids
    text = template._tokenizer.decode(ids)
    assert all(f"result {i}" in text for i in range(2))
    parser = StreamParser(template._tokenizer, False, tools=[GET_WEATHER])
    for token_id in ids:
        parser.feed(token_id)
    calls = [(call.name, json.loads(call.arguments)) for call in parser.tool_calls]
    assert calls == [("get_weather", {"city": "Rome"}), ("get_weather", {"city": "Bern", "days": 2})]


GREEDY = {  # what no count of loop steps holds: time, memory, both, at compiling too
    "doubling": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x|length }}"
    ),
    "center": "{{ 'a'|center(3000000000) }}",
    "macro": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "shared": (
        "{% set ns=namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x|string }}"
    ),
    "replace": "{{ ('a'*1000000).replace('', messages[0].content * 1000) }}",
    "macros": "".join(f"{{% macro m{i}() %}}{{% endmacro %}}" for i in range(20000)),
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "format": "{{ '%01000000000d' | format(messages | length) }}",
}


@pytest.fixture
def usages(monkeypatch: pytest.MonkeyPatch) -> list[resource.struct_rusage]:
    """What each template process took that a test waited for. Children of other tests, which Python waits for later,
    do not count."""
    isolation._worker().close()
    taken: list[resource.struct_rusage] = []

    def waitpid(pid: int, flags: int) -> tuple[int, int]:
        ended, status, usage = os.wait4(pid, flags)
        if ended:
            taken.append(usage)
        return ended, status

    monkeypatch.setattr(os, "waitpid", waitpid)
    return taken


@pytest.mark.parametrize("name", GREEDY)
def test_no_template_takes_much_time_or_memory(
    make: Callable[[str], ChatTemplate], usages: list[resource.struct_rusage], name: str
) -> None:
    began_s = os.times().user
    with pytest.raises(KimiLiteError, match="chat template does not") as caught:
        make(GREEDY[name]).encode([user("Hi " * 4)])
    assert caught.value.message.isprintable()
    assert os.times().user - began_s < 1.0, "it ran here"
    isolation._worker().close()
    assert usages and sum(usage.ru_utime for usage in usages) < 4 * MAX_CPU_S
    # Before it executes its own program a child counts the memory of the one that started it.
    most = max(MAX_MEMORY_BYTES // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert max(usage.ru_maxrss for usage in usages) <= most
    assert make("ok").encode([user("")]).ids == list(b"ok"), "the next one is not harmed"


def test_a_template_that_was_compiled_in_a_child_that_ended_is_compiled_again(
    make: Callable[[str], ChatTemplate],
) -> None:
    first = make("{{ messages[0].content }}")
    with pytest.raises(KimiLiteError):
        make(GREEDY["macro"]).encode([user("")])
    assert first.encode([user("still there")]).ids == list(b"still there")
    others = [make(f"{i}") for i in range(MAX_TEMPLATES + 1)]  # more than are kept
    assert [other.encode([user("")]).ids for other in others] == [list(str(i).encode()) for i in range(len(others))]


def test_threads_share_the_child(make: Callable[[str], ChatTemplate]) -> None:
    template = make("{{ messages[0].content }}")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: template.encode([user(f"text {i}" * 50)]).ids, range(40)))
    assert found == [list((f"text {i}" * 50).encode()) for i in range(40)]


def test_what_a_template_says_is_escaped(make: Callable[[str], ChatTemplate]) -> None:
    with pytest.raises(KimiLiteError) as caught:
        make("{{ raise_exception('\x1b]0;evil\x07\n' + 'x' * 5000) }}").encode([user("")])
    assert caught.value.message.isprintable()
    assert "\\x1b]0;evil\\x07 xxx" in caught.value.message
    assert len(caught.value.message) < 400


def test_ordinary_conversations_are_rendered_fast(template: ChatTemplate) -> None:
    messages = [user("question " * 50), answer("answer " * 100)] * 10
    template._segments(messages, [GET_WEATHER], True, True, False)
    times_s = []
    for _ in range(20):
        began_s = time.perf_counter()
        template._segments(messages, [GET_WEATHER], True, True, False)
        times_s.append(time.perf_counter() - began_s)
    assert min(times_s) < 0.005


def test_the_bytes_of_pictures_are_not_copied_around(template: ChatTemplate) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (80 << 20)}}]
    assert template.encode([user(parts)]).ids.count(163605) == 1
    assert "data:" + "x" * 2000 in rendered(template, [user("data:" + "x" * 2000)])


def test_the_folder_we_are_in_is_not_searched_for_modules(
    make: Callable[[str], ChatTemplate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a downloaded model may hold a jinja2.py."""
    (tmp_path / "jinja2.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    isolation._worker().close()
    assert make("{{ 1 + 1 }} fresh").encode([user("")]).ids == list(b"2 fresh")
