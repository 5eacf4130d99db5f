"""`kimi-lite serve` as a process: how it starts, whom it answers, what it logs, how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[3]
SECRET = "my-dear-secret"


class Served:
    """A running server: its URL, and what it wrote to stderr so far."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process, self.url, self.lines = process, url, []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def get(self, path: str, **more) -> httpx.Response:
        return httpx.get(self.url + path, trust_env=False, timeout=120, **more)

    def ask(self, text: str, **more) -> httpx.Response:
        headers = more.pop("headers", None)
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}
        body["thinking"] = {"type": "disabled"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, trust_env=False, timeout=120)

    def wait(self, path: str = "/health", status: int = 200, timeout_s: float = 120.0) -> httpx.Response:
        return until(lambda: (answer := self._get_or_none(path)) and answer.status_code == status and answer, timeout_s)

    def _get_or_none(self, path: str) -> httpx.Response | None:
        try:
            return self.get(path)
        except httpx.ConnectError:
            return None

    def wait_for_line(self, pattern: str) -> str:
        return until(lambda: next((line for line in self.lines if re.search(pattern, line)), None))


def until(condition, timeout_s: float = 120.0):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextmanager
def serving(
    *arguments: str, host: str = "127.0.0.1", main: str = "tests.apps.server.fake_serve", **environment: str
) -> Iterator[Served]:
    port = free_port()
    model = () if "-m" in arguments else ("-m", "x.gguf")
    command = [sys.executable, "-m", main, "serve", *model, "--host", host]
    process = subprocess.Popen([*command, "--port", str(port), *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env=os.environ | environment)  # fmt: skip
    try:
        yield Served(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait(120)


def refused(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.apps.server.fake_serve", "serve", "-m", "x.gguf", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_while_it_loads_it_listens_and_says_so() -> None:
    with serving(FAKE_LOADS_S="2") as server:
        health = server.wait(status=503).json()
        assert health["status"] == "loading model"
        loading = until(lambda: server.get("/health").json().get("loading"))
        assert loading == {"stage": "reading weights", "done": 1, "total": 4}
        asked = server.ask("hello")
        assert (asked.status_code, asked.headers["retry-after"]) == (503, "5")
        assert server.get("/").status_code == 200
        assert server.get("/status").json()["state"] == "loading"
        assert server.wait().json()["status"] == "ok"
        assert server.ask("hello").status_code == 200
        assert server.wait_for_line("listens on").endswith(server.url)


def test_a_signal_while_it_loads_ends_it_at_once() -> None:
    with serving(FAKE_LOADS_S="600") as server:
        server.wait(status=503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_answer_that_runs_ends_whole_and_the_engine_is_closed(number: int, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    with serving(FAKE_CLOSED=str(closed)) as server:
        server.wait()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(server.ask("slow", max_tokens=100)))
        asking.start()
        until(lambda: server.get("/health").json()["running"])
        server.process.send_signal(number)
        asking.join(120)
        assert server.process.wait(120) == 0
        (answer,) = answers
        assert answer.json()["usage"]["completion_tokens"] == 100
        assert closed.exists()


def test_an_answer_that_takes_too_long_is_cut_and_ends_as_a_stream_should(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    with serving("--no-loop-guard", FAKE_CLOSED=str(closed)) as server:
        server.wait()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(server.ask("slow", stream=True)))
        asking.start()
        until(lambda: server.get("/health").json()["running"])
        begun_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        refused_with = server.wait_for_line("a second signal ends at once")
        assert "10 s" in refused_with
        asking.join(120)
        assert server.process.wait(120) == 0
        assert time.monotonic() - begun_s > 9
        assert answers[0].text.rstrip().endswith("data: [DONE]")
        assert closed.exists()


def test_a_second_signal_ends_at_once() -> None:
    with serving() as server:
        server.wait()
        threading.Thread(target=lambda: _swallow(server, "stuck"), daemon=True).start()
        until(lambda: server.get("/health").json()["running"])
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("a second signal")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 128 + signal.SIGTERM


def _swallow(server: Served, text: str) -> None:
    try:
        server.ask(text)
    except httpx.HTTPError:
        return


@pytest.mark.parametrize("loaded_s", ["0.05", "1"])  # after the crash too: it is none of loading
def test_a_crashed_engine_is_told_and_never_hangs(loaded_s: str) -> None:
    with serving(FAKE_LOADED_S=loaded_s) as server:
        server.wait()
        answer = server.ask("crash")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_stopped")
        assert server.get("/health").status_code == 503
        assert server.get("/health").json()["status"] == "failed"
        later = server.ask("hello")
        assert later.status_code == 500
        for text in (answer.text, later.text, server.get("/health").text, server.get("/status").text):
            assert "/home/user" not in text
        server.wait_for_line("/home/user/secret")  # the log has the traceback
        assert server.get("/metrics").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0


def test_log_lines_are_json_where_asked_and_nothing_of_what_is_said() -> None:
    with serving("--log-json", "--log-level", "debug", "--api-key", "k1") as server:
        server.wait()
        assert server.ask(SECRET, headers={"Authorization": "Bearer k1"}).status_code == 200
        line = json.loads(server.wait_for_line('"answered"'))
        assert line["generated_tokens"] > 0 and line["prompt_tokens"] > 0
        assert not any(SECRET in each or "k1" in each for each in server.lines)


def test_levels_leave_out_what_is_less() -> None:
    with serving("--log-level", "error") as server:
        server.wait()
        server.ask("hello")
        assert not any("answered" in line for line in server.lines)


def test_a_key_is_asked_for_everywhere_but_on_the_page_and_health() -> None:
    with serving("--api-key", "first, second") as server:
        server.wait()
        paths = ("/status", "/metrics", "/v1/models", "/tokenize", "/v1/chat/completions", "/nothing")
        assert {server.get(path).status_code for path in paths} == {401}
        assert server.get("/").status_code == server.get("/health").status_code == 200
        for headers in ({"Authorization": "Bearer second"}, {"x-api-key": "first"}, {"authorization": "bearer first"}):
            assert server.get("/v1/models", headers=headers).status_code == 200
        for wrong in ("x", "firs", "first, second", "FIRST", "ſirst".encode().decode("latin-1")):
            headers = {"Authorization": f"Bearer {wrong}".encode("latin-1")}
            assert server.get("/v1/models", headers=headers).status_code == 401


def test_a_page_of_another_host_or_origin_is_not_answered() -> None:
    """DNS rebinding: the name that an attacker lets point to this machine comes as Host."""
    with serving("--allow-host", "box.lan", "--allow-origin", "https://app.example") as server:
        server.wait()
        port = server.url.rpartition(":")[2]

        def status(**headers: str) -> int:
            return server.get("/v1/models", headers=headers).status_code

        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", f"box.lan:{port}", "BOX.LAN"):
            assert status(host=host) == 200, host
        for host in ("evil.example", "evil.example:80", f"localhost.evil.example:{port}", "127.0.0.1.evil.example", ""):
            assert status(host=host) == 403, host
        assert status(origin="https://evil.example") == status(origin="null") == 403
        assert status(origin=server.url) == 200  # its own page
        allowed = server.get("/v1/models", headers={"origin": "https://app.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-origin" not in server.get("/v1/models").headers
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        before = httpx.options(f"{server.url}/v1/chat/completions", headers=asked, trust_env=False)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (204, "https://app.example")


def test_a_public_address_wants_a_key_or_the_word_that_it_needs_none() -> None:
    said = refused("--host", "0.0.0.0", "--port", "0")
    assert "--api-key" in said and "--insecure" in said
    with serving("--insecure", host="0.0.0.0") as server:
        assert server.wait().status_code == 200


def test_a_port_in_use_is_a_sentence_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused("--port", str(taken.getsockname()[1]))
    assert "--port" in said and "Traceback" not in said
    assert "Traceback" not in refused("--host", "203.0.113.7", "--api-key", "k")
    assert "Traceback" not in refused("--host", "no such host", "--api-key", "k")
