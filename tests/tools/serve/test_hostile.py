"""A short run of the hostile requests against a server around the fake engine."""

import asyncio
import gc
import threading
from random import Random

import httpx
import psutil

from kimi_lite.apps.server import bodies, connection
from tests.apps.server.running import running, speaking
from tools.serve.hostile import BODIES, ask_all, hostile_body, request_bytes


def test_no_request_makes_a_500_or_hangs(monkeypatch) -> None:
    monkeypatch.setattr(bodies, "PIECE_WITHIN_S", 1.0)
    monkeypatch.setattr(connection, "HEADERS_WITHIN_S", 1.0)
    engines = []

    def open_engine():
        engines.append(speaking(lambda prompt: ("Hm.", "Hi"), num_pages=2048))
        return engines[0]

    with running(open_engine) as url:
        asyncio.run(ask_all(url, 20, 4))
        num_threads, num_files = threading.active_count(), psutil.Process().num_fds()
        statuses, failures = asyncio.run(ask_all(url, 600, 8, 20))
        assert failures == []
        assert statuses["200"] > 50 and statuses["400"] > 100 and statuses["408"] > 0, statuses
        health = httpx.get(f"{url}/health").json()
        assert (health["status"], health["running"], health["waiting"]) == ("ok", 0, 0)
        assert engines[0].is_idle
        gc.collect()
        assert threading.active_count() <= num_threads + 8  # asyncio's pool may grow to its bound
        assert psutil.Process().num_fds() <= num_files + 16


def test_a_seed_asks_the_same() -> None:
    assert request_bytes(Random(5), "h") == request_bytes(Random(5), "h")
    assert len({request_bytes(Random(seed), "h")[0] for seed in range(50)}) > 45
    assert hostile_body(Random(1), BODIES["/tokenize"], 3) != BODIES["/tokenize"]
