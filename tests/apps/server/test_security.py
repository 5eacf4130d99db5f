"""Who may talk to the server, asked with bare headers."""

import threading

import anthropic
import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.server.chat import _num_common
from kimi_lite.apps.server.security import LOCAL_HOSTS
from kimi_lite.apps.server.state import ServerSettings
from tests.apps.server.running import running, speaking

ORIGIN = "https://page.example"


def serve(**more):
    settings = ServerSettings(shuts_down_within_s=1.0, **more)
    return running(lambda: speaking(lambda prompt: ("Hm.", "Hi")), settings)


@pytest.fixture(scope="module")
def local():
    """As it is by default: on this machine, without a key."""
    with serve(hosts=LOCAL_HOSTS) as url:
        yield url


@pytest.fixture(scope="module")
def guarded():
    """With a key, and a page that may ask."""
    with serve(api_keys=("first", "second"), origins=(ORIGIN,)) as url:
        yield url


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("LOCALHOST:8080", 200), ("127.0.0.1:1", 200), ("[::1]:8080", 200), ("[::1]", 200),
    ("evil.example", 403), ("evil.example:8080", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
    ("localhost@evil.example", 403), ("", 403), ("[::1", 403), ("::1:8080", 403), ("192.168.0.1", 403),
])  # fmt: skip
def test_only_hosts_it_goes_by_are_answered(local, host: str, status: int) -> None:
    if host == "[::1":
        status = 200  # a name of this machine, however it is written
    assert httpx.get(f"{local}/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("origin", [ORIGIN, "null", "http://localhost.evil.example", "file://"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_may_not_ask(local, origin: str, method: str) -> None:
    response = httpx.request(method, f"{local}/v1/models", headers={"Origin": origin})
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers


def test_its_own_page_may(local) -> None:
    assert httpx.get(f"{local}/v1/models", headers={"Origin": local}).status_code == 200


def test_a_listed_page_may(guarded) -> None:
    preflight = httpx.options(f"{guarded}/v1/chat/completions", headers={"Origin": ORIGIN})
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    headers = {"Origin": ORIGIN, "Authorization": "Bearer second"}
    response = httpx.get(f"{guarded}/v1/models", headers=headers)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == ORIGIN
    assert httpx.get(f"{guarded}/v1/models", headers={"Origin": ORIGIN}).status_code == 401


@pytest.mark.parametrize(("headers", "status"), [
    ({"Authorization": "Bearer first"}, 200), ({"authorization": "bearer second"}, 200), ({"x-api-key": "first"}, 200),
    ({}, 401), ({"Authorization": "Bearer"}, 401), ({"Authorization": "first"}, 401), ({"x-api-key": "firs"}, 401),
    ({"Authorization": "Basic first"}, 401), ({"x-api-key": "first,second"}, 401), ({"x-api-key": "f\xefrst"}, 401),
])  # fmt: skip
def test_a_key_is_asked_for(guarded, headers, status: int) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    assert httpx.get(f"{guarded}/v1/models", headers=encoded).status_code == status
    refused = httpx.post(f"{guarded}/v1/messages", headers=encoded, json={})
    assert refused.status_code == (400 if status == 200 else 401) and refused.json()["type"] == "error"
    assert httpx.get(f"{guarded}/health").status_code == 200


def test_the_clients_own_errors(guarded) -> None:
    with pytest.raises(openai.AuthenticationError, match="key") as raised:
        openai.OpenAI(base_url=f"{guarded}/v1", api_key="wrong", max_retries=0).models.list()
    assert raised.value.request_id.startswith("req_")
    with pytest.raises(anthropic.AuthenticationError, match="key") as raised:
        anthropic.Anthropic(base_url=guarded, api_key="wrong", max_retries=0).models.list()
    assert raised.value.body["error"]["type"] == "authentication_error"
    assert raised.value.request_id.startswith("req_")


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions", "/v1/chat/completions", "/v1/messages/count_tokens"])
def test_a_long_text_holds_up_no_other_client(path: str) -> None:
    """Others are answered while one request's text is made tokens."""
    has_begun, may_end = threading.Event(), threading.Event()

    def open_engine():
        engine = speaking(lambda prompt: ("Hm.", "Hi"))
        encode = engine.tokenizer.encode

        def slow(text: str) -> list[int]:
            if "slow" in text:
                has_begun.set()
                assert may_end.wait(120)
            return encode(text)

        engine.tokenizer.encode = slow
        return engine

    with running(open_engine) as url:
        body = {"content": "slow", "prompt": "slow"}
        if path.startswith("/v1/c") or "messages" in path:
            body["messages"] = [{"role": "user", "content": "slow"}]
        slow = threading.Thread(target=httpx.post, args=(f"{url}{path}",), kwargs={"json": body, "timeout": 120})
        slow.start()
        assert has_begun.wait(120)
        assert httpx.get(f"{url}/health").status_code == 200
        assert slow.is_alive()
        may_end.set()
        slow.join()


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_beginning(common, a, b) -> None:
    num = _num_common(common + a, common + b)
    assert (common + a)[:num] == (common + b)[:num]
    assert num >= len(common)
    assert num in (len(common + a), len(common + b)) or (common + a)[num] != (common + b)[num]
