"""Programs under test keep their conversations and settings away from the user's own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("KIMI_LITE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.delenv("KIMI_LITE_MODEL", raising=False)
