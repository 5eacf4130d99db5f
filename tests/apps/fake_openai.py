"""An OpenAI-compatible server with scripted answers, on a port of its own. It remembers what it was asked."""

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One response. `pieces` are written one after the other, each with a pause before it; `is_cut`: then the line
    drops."""

    pieces: list[bytes]
    status: int = 200
    content_type: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    is_cut: bool = False
    wait_s: float = 0.0  # before the headers


def sse(*deltas: dict[str, Any], reason: str | None = "stop", usage: dict | None = None, is_done: bool = True) -> bytes:
    """A stream of these deltas."""
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if reason:
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        events.append({"choices": [], "usage": usage})
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return (": ping\n\n" + "".join(lines) + ("data: [DONE]\n\n" if is_done else "")).encode()


def call_delta(index: int, arguments: str, name: str | None = None, call_id: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {
        "tool_calls": [
            {"index": index, "function": function} | ({"id": call_id, "type": "function"} if call_id else {})
        ]
    }


class FakeOpenAI:
    """Answers `POST .../chat/completions` with the next of `answers`, `GET .../models` with `models`."""

    def __init__(
        self, *answers: Answer | bytes, models: Iterable[dict] | Answer = ({"id": "kimi-k2.5", "max_model_len": 4096},)
    ) -> None:
        self.answers = [Answer([answer]) if isinstance(answer, bytes) else answer for answer in answers]
        self.models = (
            models
            if isinstance(models, Answer)
            else Answer([json.dumps({"data": list(models)}).encode()], 200, "application/json")
        )
        self.unknown_field = ""  # a body with it is refused, and takes no answer
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.is_dropped = threading.Event()  # the client closed a connection before the answer's end
        self.is_written = threading.Event()  # a whole POST's answer went out
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> "FakeOpenAI":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.headers.append(dict(self.headers))
                self._send(fake.models if self.path == "/v1/models" else Answer([b"no"], 404, "text/plain"))

            def do_POST(self) -> None:
                fake.headers.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    self._send(Answer([b'{"error": {"message": "no such path"}}'], 404, "application/json"))
                    return
                fake.bodies.append(body)
                if fake.unknown_field in body:
                    self._send(
                        Answer([f'{{"error": {{"message": "Unknown field {fake.unknown_field}"}}}}'.encode()], 400)
                    )
                    return
                self._send(fake.answers.pop(0))
                if not fake.is_dropped.is_set():
                    fake.is_written.set()

            def _send(self, answer: Answer) -> None:
                try:
                    time.sleep(answer.wait_s)
                    self.send_response(answer.status)
                    self.send_header("Content-Type", answer.content_type)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    if answer.is_cut:
                        self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    for piece in answer.pieces:
                        time.sleep(answer.pause_s)
                        self.wfile.write(piece)
                        self.wfile.flush()
                except OSError:
                    fake.is_dropped.set()

            def log_message(self, *_: object) -> None:
                pass

        return Handler
