"""A hub for each test, and places of its own for everything that is looked at or written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_lite.files import cache_folder
from tests.hub.hub_server import HubServer


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home, with none of the variables that name other places; compiled kernels stay where they are."""
    kernels = cache_folder()
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE", "KIMI_LITE_", "TRANSFORMERS_OFFLINE", "OLLAMA", "LLAMA_", "XDG_")):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("KIMI_LITE_CACHE", str(kernels))
    monkeypatch.setattr("kimi_lite.hub.headers.cache_folder", lambda: folder / "cache")
    monkeypatch.setenv("KIMI_LITE_CONFIG", str(folder / "config.toml"))
    monkeypatch.setenv("KIMI_LITE_STATE", str(folder / "state"))
    return folder


@pytest.fixture
def hub(home, monkeypatch) -> Iterator[HubServer]:
    pytest.importorskip("huggingface_hub", reason="needs the pull extra")
    monkeypatch.setattr("kimi_lite.hub.client.WAITS_S", (0.0,) * 5)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
