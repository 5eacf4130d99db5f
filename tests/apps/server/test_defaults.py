"""`serve --temp 0.2` and its like hold for requests that do not say otherwise, on every path that answers."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from kimi_lite.apps.server.command import settings_of
from kimi_lite.engine.service import EngineService
from kimi_lite.engine.types import SamplingParams
from kimi_lite.options import Options
from tests.apps.server.running import running, speaking

OPTIONS = Options(temperature=0.25, top_k=7, top_p=0.5, min_p=0.125, repetition_penalty=1.5, seed=3, max_tokens=5)
GIVEN = {"temperature": 0.25, "top_k": 7, "top_p": 0.5, "min_p": 0.125, "repetition_penalty": 1.5, "seed": 3,
         "max_tokens": 5}  # fmt: skip
MESSAGES = [{"role": "user", "content": "Hello"}]
PATHS = {
    "chat/completions": {"messages": MESSAGES},
    "completions": {"prompt": "Hello"},
    "responses": {"input": "Hello"},
    "messages": {"messages": MESSAGES, "max_tokens": 5},
}
ASKED = {  # what each path lets a request say, and every other field stays the server's
    "chat/completions": {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "repeat_penalty": 1, "seed": 0,
                         "max_tokens": 9},
    "completions": {"temperature": 1.5, "top_k": 3, "top_p": 0.75, "min_p": 1, "repetition_penalty": 2, "seed": 1,
                    "max_tokens": 2},
    "responses": {"temperature": 0, "top_p": 1, "max_output_tokens": 9},
    "messages": {"temperature": 0, "top_p": 1, "top_k": 0, "max_tokens": 9},
}  # fmt: skip
NAMES = {"max_output_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """Of every request that reaches the engine."""
    found, submit = [], EngineService.submit
    monkeypatch.setattr(
        EngineService, "submit", lambda self, request: found.append(request.sampling) or submit(self, request)
    )
    return found


@pytest.fixture(scope="module", params=[OPTIONS, Options()], ids=["said", "nothing said"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, Options]]:
    settings = replace(settings_of(request.param), hosts=None, shuts_down_within_s=1.0)
    with running(lambda: speaking(lambda prompt: (None, "Good day")), settings) as url:
        yield url, request.param


@pytest.mark.parametrize("path", PATHS)
def test_the_servers_own_hold_where_a_request_says_nothing(path: str, server, seen: list[SamplingParams]) -> None:
    url, options = server
    assert httpx.post(f"{url}/v1/{path}", json=PATHS[path], timeout=120).status_code == 200
    (sampling,) = seen
    if options is OPTIONS:
        assert {name: getattr(sampling, name) for name in GIVEN} == GIVEN
    else:
        assert replace(sampling, temperature=1.0, max_tokens=None) == SamplingParams()
        own = {"completions": (1.0, 16), "messages": (0.6, 5)}  # OpenAI's limit; no thinking unless asked for
        assert (sampling.temperature, sampling.max_tokens) == own.get(path, (1.0, None))


@pytest.mark.parametrize("path", PATHS)
def test_a_request_has_precedence(path: str, server, seen: list[SamplingParams]) -> None:
    url, options = server
    assert httpx.post(f"{url}/v1/{path}", json=PATHS[path] | ASKED[path], timeout=120).status_code == 200
    wanted = {NAMES.get(name, name): max(value, 0) for name, value in ASKED[path].items()}
    (sampling,) = seen
    base = {name: getattr(SamplingParams(), name) for name in GIVEN} if options is not OPTIONS else GIVEN
    assert {name: getattr(sampling, name) for name in GIVEN} == base | wanted
