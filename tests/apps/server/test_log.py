"""What the server writes about requests: enough to see why one failed, nothing of what was said, no key."""

import json
import logging

import httpx
import pytest

from kimi_lite.apps.server.app import build_app
from kimi_lite.apps.server.log import AnswerLog
from kimi_lite.apps.server.state import ServerSettings
from tests.apps.server import running as serving
from tests.apps.server.running import running, speaking

SECRET, KEY = "xyzzy plugh", "key-of-the-house"
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": SECRET}]},
    "/v1/messages": {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 9},
    "/v1/responses": {"input": SECRET, "instructions": SECRET},
    "/v1/completions": {"prompt": SECRET},
    "/tokenize": {"content": SECRET},
}
WRONG = {
    "/v1/chat/completions": {"messages": [{"role": SECRET, "content": SECRET}]},
    "/v1/messages": {"messages": [{"role": "user", "content": [{"type": SECRET}]}], "max_tokens": 9},
    "/v1/responses": {"input": [{"type": SECRET}]},
    "/v1/completions": {"prompt": SECRET * 1000},
    "/tokenize": {"content": [SECRET]},
}


@pytest.fixture(params=[False, True])
def lines(request, monkeypatch, caplog) -> list[str]:
    """Of a server that was asked everything, plain and as JSON."""
    log = AnswerLog(is_json=request.param)
    monkeypatch.setattr(serving, "build_app", lambda service, settings: build_app(service, settings, log))

    def failing():
        engine = speaking(lambda prompt: ("Hm.", SECRET))

        def fail(batch, layer):
            if len(batch.token_ids) > 400:
                raise RuntimeError("broken")

        engine.model.before_layer = fail
        return engine

    with (
        caplog.at_level(logging.DEBUG, "kimi_lite.server"),
        running(failing, ServerSettings(api_keys=(KEY,), shuts_down_within_s=1.0)) as url,
        httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as client,
    ):
        for path, body in BODIES.items():
            assert client.post(url + path, json=body | {"stream": True}).status_code == 200
        for path, body in WRONG.items():
            assert client.post(url + path, json=body).status_code == 400
        assert client.post(url + "/v1/completions", json={"prompt": "!" * 2000}).status_code == 500
    found = [record.getMessage() for record in caplog.records if record.name == "kimi_lite.server"]
    if request.param:
        documents = [json.loads(line) for line in found]
        assert all(document["time"] > 0 and document["message"] for document in documents)
        assert any("RuntimeError: broken" in document.get("error", "") for document in documents)
    return found


def test_it_says_what_happened_and_not_what_was_said(lines) -> None:
    text = "\n".join(lines)
    assert text.count("answered") >= 4 and text.count("refused") == 5
    for path in BODIES:
        assert f"POST {path}" in text
    assert "messages.0.role" in text and "context_length_exceeded" in text
    assert SECRET not in text and "xyzzy" not in text and KEY not in text
