"""What a server leaves behind, with a real model: SIGTERM saves prefixes and heat, and kill -9 damages neither."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np

from kimi_lite.experts.heat import load_heat
from kimi_lite.native.cache import kernel_cache
from tests.apps.server.test_command import Served, serving, until
from tests.tiny import write_tiny_gguf

HEAT_SHAPE = (3, 3, 8)  # averages, layers, experts
FOXES, WOLVES = "All that is known about foxes. " * 40, "Nothing is known about wolves. " * 80


class Place(NamedTuple):
    model: Path
    cache: Path

    @property
    def heat(self) -> Path:
        return self.model.with_name("tiny.heat.npz")

    @property
    def pages(self) -> set[Path]:
        return set(self.cache.glob("prefixes/*/*.page"))


@contextmanager
def served(place: Place) -> Iterator[Served]:
    folders = {
        "KIMI_LITE_CACHE": str(place.cache),
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(kernel_cache())),  # compiled code is not the point
    }
    arguments = ("-m", str(place.model), "-c", "4096", "-t", "1", "--temp", "0")
    with serving(*arguments, main="tests.apps.server.small_serve", **folders) as server:
        server.wait(timeout_s=240.0)
        yield server


def answer(server: Served, text: str) -> tuple[str, int]:
    """What is said, and how many tokens of the prompt were cached."""
    document = server.ask(text, max_tokens=12).json()
    cached = document["usage"]["prompt_tokens_details"]["cached_tokens"]
    return document["choices"][0]["message"]["content"], cached


def ends_with(server: Served, number: int) -> int:
    server.process.send_signal(number)
    return server.process.wait(120)


def test_what_outlives_a_server(tmp_path: Path) -> None:
    """Ended in order, killed while it writes pages, and asked again: the same answers, from what was whole."""
    place = Place(write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0)), tmp_path / "cache")
    with served(place) as server:
        foxes, cached = answer(server, FOXES)
        assert cached == 0 and not place.heat.exists()
        assert ends_with(server, signal.SIGTERM) == 0
    heat = load_heat(place.heat, HEAT_SHAPE)
    assert heat is not None and heat.sum() > 0
    saved, kept = place.pages, place.heat.read_bytes()
    assert len(saved) > 10

    with served(place) as server:
        again, cached = answer(server, FOXES)
        assert again == foxes and cached >= 64 * (len(saved) - 1)  # the last page is not a whole one
        asking = threading.Thread(target=_swallow, args=(server, WOLVES))
        asking.start()
        until(lambda: len(place.pages) > len(saved) + 3)  # of more than thirty
        assert ends_with(server, signal.SIGKILL) == -signal.SIGKILL
        asking.join(120)
    assert place.heat.read_bytes() == kept  # of the last orderly end
    assert saved <= place.pages

    with served(place) as server:
        again, cached = answer(server, FOXES)
        assert again == foxes and cached >= 64 * (len(saved) - 1)
        from_pages, cached = answer(server, WOLVES)
        assert cached >= 64 * 3
        assert ends_with(server, signal.SIGTERM) == 0
    assert place.heat.read_bytes() != kept
    anew = place._replace(cache=tmp_path / "another")
    with served(anew) as server:
        assert answer(server, WOLVES) == (from_pages, 0)


def _swallow(server: Served, text: str) -> None:
    with suppress(httpx.HTTPError):
        answer(server, text)
