"""The page in a real Chromium, and the figures that it asks for."""

import base64
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kimi_lite.apps.server.page import heat_picture, tiers
from kimi_lite.apps.server.state import ServerSettings
from tests.apps.server.browser import Browser, browser, needs_browser
from tests.apps.server.running import running
from tests.engine.fakes import fake_engine, scripted_logits

HOSTILE = """<img src=x onerror="document.title='broken'"> <script>document.title='broken'</script>

[press](javascript:document.title='broken') [data](data:text/html,<script>1</script>) <javascript:alert(1)>
[fine](https://example.org/a?b=1&c=2) ![picture](https://example.org/track.png) [x]( JaVaScRiPt:alert(1))

| <b>a</b> | b |
|---|---|
| <svg onload=document.title='broken'> | **bold** |

```<i>html</i>
<script>document.title='broken'</script>
```
- <iframe srcdoc="<script>parent.document.title='broken'</script>"></iframe>"""
MARKDOWN_TAGS = {
    *(
        "P",
        "A",
        "BR",
        "TABLE",
        "THEAD",
        "TBODY",
        "TR",
        "TH",
        "TD",
        "DIV",
        "SPAN",
        "BUTTON",
        "PRE",
        "CODE",
        "UL",
        "OL",
        "LI",
    ),
    *("STRONG", "EM", "DEL", "H2", "H3", "H4", "HR", "BLOCKQUOTE"),
}
READY = "document.querySelector('#dot').className === 'ready'"
ENDED = "!document.querySelector('#send').hidden"


@contextmanager
def page(
    answer: str, step_s: float = 0.0, key: str | None = None, heat: np.ndarray | None = None, **window
) -> Iterator[Browser]:
    """A window with the page of a server whose model says `answer`."""

    def open_engine():
        engine = fake_engine(context_length=8192, num_pages=512, max_running=4)
        engine.model.next_logits = scripted_logits(engine.tokenizer, lambda prompt: ("Let me see.", answer))
        engine.model.before_layer = lambda batch, layer: time.sleep(step_s / 3)
        engine.model.heat = lambda: heat
        return engine

    settings = ServerSettings(shuts_down_within_s=0.5, api_keys=(key,) if key else ())
    with running(open_engine, settings) as url, browser(**window) as opened:
        opened.open(url)
        yield opened


def say(window: Browser, text: str) -> None:
    window.wait(READY)
    window.type("#prompt", text)
    window.click("#send")


@needs_browser
def test_an_answer_streams_with_its_thinking_collapsed_and_is_there_after_a_reload() -> None:
    with page("One **two** three. " * 12, step_s=0.01) as window:
        say(window, "Hello <b>there</b>")
        window.wait("document.querySelector('.assistant > .text').innerText.includes('two')")
        part = window.text(".assistant > .text")
        window.wait(ENDED)
        assert 0 < len(part) < len(window.text(".assistant > .text"))
        assert window.text(".user .text") == "Hello <b>there</b>"
        assert window.run("return document.querySelectorAll('.assistant strong').length") == 12
        assert window.run("return document.querySelector('details.thinking').open") is False
        assert window.text("details.thinking summary").startswith("Thought for")
        assert "tokens" in window.text(".assistant .foot")
        window.run("location.reload()")
        window.wait("document.querySelectorAll('.assistant').length === 1")
        assert window.text(".assistant > .text").startswith("One two three.")
        say(window, "And again")  # what was said goes along
        window.wait("document.querySelectorAll('.assistant').length === 2")
        window.wait(ENDED)
        assert "cached" in window.text(".assistant .foot")
        assert window.problems() == []


@needs_browser
def test_stop_ends_the_answer_on_the_server_too() -> None:
    with page("word " * 1000, step_s=0.03) as window:
        say(window, "Go on for long")
        window.wait("document.querySelector('.assistant > .text').innerText.includes('word')")
        window.click("#stop")
        window.wait(ENDED)
        assert window.text(".assistant .remark") == "Stopped."
        window.wait("server.running === 0")
        assert len(window.text(".assistant > .text")) < 2000


@needs_browser
def test_hostile_answers_stay_text() -> None:
    """Whatever the model says adds elements of Markdown only, and no link but to pages and letters."""
    with page(HOSTILE) as window:
        say(window, "Be hostile")
        window.wait(ENDED)
        window.wait("document.querySelector('.assistant > .text').innerText.includes('iframe')")
        assert window.run("return document.title") == "kimi-lite"
        tags = window.run("return [...document.querySelectorAll('.assistant > .text *')].map((e) => e.tagName)")
        assert set(tags) <= MARKDOWN_TAGS, set(tags) - MARKDOWN_TAGS
        links = window.run("return [...document.querySelectorAll('.assistant > .text a')].map((e) => e.href)")
        assert {link.partition(":")[0] for link in links} == {"https"}
        assert "<script>document.title='broken'</script>" in window.text(".assistant > .text")
        assert window.problems() == []


@needs_browser
def test_generated_texts_keep_every_word_and_make_no_foreign_element() -> None:
    """The renderer against texts of its own syntax, cut and mixed: nothing is lost, nothing hangs, nothing is HTML."""
    rng = np.random.default_rng(7)
    pieces = [
        *(
            "**",
            "*",
            "_",
            "`",
            "```",
            "\n",
            "\n\n",
            "- ",
            "  - ",
            "1. ",
            "> ",
            "# ",
            "|",
            "|-|-|",
            "[",
            "](",
            ")",
            "~~",
        ),
        *("---", " ", "  ", "\t", "<img src=x onerror=document.title=1>", "<b>", "http://a.b", "javascript:x", "\\|"),
        *("\r\n", "&lt;"),
    ]
    texts = []
    for i in range(400):
        parts = [
            pieces[k] if rng.random() < 0.7 else f"w{j}x" for j, k in enumerate(rng.integers(len(pieces), size=60))
        ]
        texts.append("".join(parts) if i % 2 else " ".join(parts))
    script = """
        return arguments[0].map((text) => {
          const box = document.createElement("div");
          box.append(...markdown(text));
          return [box.textContent, [...box.querySelectorAll("*")].map((e) => e.tagName), document.title];
        });"""
    with page("") as window:
        window.wait(READY)
        for text, (shown, tags, title) in zip(texts, window.run(script, texts), strict=True):
            assert title == "kimi-lite"
            assert set(tags) <= MARKDOWN_TAGS
            lost = [word for word in re.findall(r"w\d+x", text) if word not in shown]
            in_addresses = re.findall(r"\]\([^)]*\)", text)
            assert all(any(word in address for address in in_addresses) for word in lost), (lost, text, shown)


@needs_browser
def test_a_long_answer_without_ends_renders_in_time() -> None:
    """Patterns that look back and forth must not need the square of a text."""
    with page("") as window:
        window.wait(READY)
        script = "const t = performance.now(); markdown(arguments[0]); return performance.now() - t"
        for piece in (
            "**a ",
            "_a ",
            "`",
            "[a](",
            "| a ",
            "> ",
            "- a\n",
            "~~a ",
            "[",
            "![",
            "http://a",
            "*a*b_c_",
            "``a ",
        ):
            took_ms = window.run(script, piece * 20_000)
            assert took_ms < 6000, (piece, took_ms)  # quadratic took 8 s and more for less


@needs_browser
def test_a_phone_scrolls_down_only_and_has_everything() -> None:
    wide = "a" * 300 + "\n\n```\n" + "x" * 500 + "\n```\n\n| " + "long cell | " * 20 + "\n|" + "-|" * 20 + "\n| 1 |"
    heat = np.random.default_rng(0).random((6, 16), np.float32)
    with page(wide, heat=heat, width=360, height=740, is_phone=True) as window:
        say(window, "wide " + "b" * 200)
        window.wait(ENDED)
        overflow = "return document.documentElement.scrollWidth - innerWidth"
        assert window.run(overflow) <= 0
        assert window.run("const l = document.querySelector('#log'); return l.scrollWidth - l.clientWidth") <= 0
        window.click("#toggle-live")
        window.wait("!document.querySelector('#heat').hidden")
        assert window.run(overflow) <= 0
        assert window.run("const l = document.querySelector('#live'); return l.scrollWidth - l.clientWidth") <= 0
        assert "6 layers" in window.text("#heat-text")
        window.click("#toggle-live")
        window.click("#open-settings")
        assert window.run(overflow) <= 0
        outside = """return [...document.querySelectorAll('button, input, textarea')].filter((e) => e.checkVisibility()
            && (e.getBoundingClientRect().right > innerWidth || e.getBoundingClientRect().left < 0)).map((e) => e.id)"""
        assert window.run(outside) == []


@needs_browser
def test_the_system_prompt_and_settings_are_sent_and_kept() -> None:
    with page("Yes.") as window:
        window.wait(READY)
        window.click("#open-settings")
        window.type("#system", "Be brief.")
        window.type("#max_tokens", "2")
        window.type("#temperature", "0")
        window.click("#settings button.main")
        window.click("#think")
        say(window, "Hello")
        window.wait(ENDED)
        assert window.text(".assistant .remark") == "The answer has as many tokens as it may."
        assert window.run("return document.querySelector('details.thinking').hidden")
        body = window.run("return requestBody()")
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (body["max_tokens"], body["temperature"], body["thinking"]) == (2, 0, {"type": "disabled"})
        window.run("location.reload()")
        window.wait("document.querySelectorAll('.assistant').length === 1")
        assert window.run("return [kept.system, kept.settings, kept.isThinking]") == [
            "Be brief.",
            {"max_tokens": 2, "temperature": 0},
            False,
        ]


@needs_browser
def test_a_server_with_a_key_asks_for_it() -> None:
    with page("Yes.", key="secret") as window:
        window.wait("document.querySelector('#settings').open")
        window.type("#key", "secret")
        window.click("#settings button.main")
        say(window, "Hello")
        window.wait(ENDED)
        window.wait("document.querySelector('.assistant > .text').innerText.includes('Yes.')")
        assert "secret" not in window.run("return JSON.stringify(localStorage)")


@needs_browser
def test_where_nothing_is_counted_the_panel_says_so() -> None:
    with page("Yes.") as window:
        window.wait(READY)
        window.wait("document.querySelector('#heat-text').innerText !== ''")
        assert "counted only with a GPU, or with --ram" in window.text("#heat-text")
        assert window.run("return document.querySelector('#heat').hidden")


def asked(open_engine: Callable, path: str, **settings) -> httpx.Response:
    with running(open_engine, ServerSettings(shuts_down_within_s=0.5, **settings)) as url:
        return httpx.get(url + path, trust_env=False)


def test_the_page_lets_only_itself_run() -> None:
    response = asked(fake_engine, "/")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"].startswith("'sha256-") and "unsafe" not in str(policy)
    assert not re.search(r"""(src|href)=["']|url\(|@import|innerHTML|insertAdjacentHTML|eval\(""", response.text)


def test_status_has_the_figures_and_wants_the_key() -> None:
    heat = np.array([[0.0, 1.0], [4.0, 0.25]], np.float32)

    def open_engine():
        engine = fake_engine(max_running=3)
        engine.model.heat = lambda: heat
        engine.model.counters = lambda: {"expert_hits": 3, "expert_misses": 1}
        return engine

    body = asked(open_engine, "/status?heat=1").json()
    assert (body["state"], body["parallel"], body["running"], body["model"]) == ("ready", 3, 0, "fake")
    assert body["tiers"] == [{"name": "RAM", "hits": 3, "misses": 1}]
    assert body["heat"] == {"layers": 2, "experts": 2, "values": base64.b64encode(bytes([0, 128, 255, 64])).decode()}
    assert asked(open_engine, "/status").json()["heat"] is None
    assert asked(open_engine, "/status", api_keys=("k",)).status_code == 401
    assert asked(open_engine, "/", api_keys=("k",)).status_code == 200


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2), elements=st.floats(0, 2.0**100, width=32)))
def test_the_picture_of_heat_keeps_the_order(heat: np.ndarray) -> None:
    picture = heat_picture(heat)
    values = np.frombuffer(base64.b64decode(picture["values"]), np.uint8).reshape(picture["layers"], picture["experts"])
    assert values.shape == heat.shape
    order = np.argsort(heat, axis=None)
    assert (np.diff(values.reshape(-1)[order].astype(int)) >= 0).all()
    assert (values.max() == 255) == (heat.max() > 0)


def test_tiers_are_those_that_count() -> None:
    assert tiers({}) == []
    counters = {"gpu_expert_hits": 1, "gpu_expert_misses": 2, "expert_hits": 3, "expert_misses": 4}
    assert [tier["name"] for tier in tiers(counters)] == ["VRAM", "RAM"]
