"""Downloads from a hub that does what hubs, networks and disks do."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.hub import fetch as fetching
from kimi_lite.hub.cache import CachedRepository, hub_cache
from kimi_lite.hub.client import Hub
from kimi_lite.hub.fetch import fetch, missing
from kimi_lite.hub.names import HubName
from tests.hub.hub_server import Fault, HubServer

NAME = HubName("owner/repo")
DATA = np.random.default_rng(0).bytes(300_000)
FILES = {"a/m-00001-of-00002.gguf": DATA, "a/m-00002-of-00002.gguf": DATA[::-1], "README.md": b"short"}


def pull(say=lambda what, done, total: None, name=NAME) -> list:
    with Hub() as hub:
        repository = hub.repository(name)
        return fetch(hub, repository, repository.files, say)


def require_right(paths) -> None:
    found = {"/".join(path.parts[-2:] if path.suffix == ".gguf" else path.parts[-1:]): path for path in paths}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES


def test_files_lie_where_the_hubs_own_library_finds_them(hub):
    from huggingface_hub import hf_hub_download, scan_cache_dir

    commit = hub.add("owner/repo", FILES).commit
    paths = pull()
    require_right(paths)
    for name, data in FILES.items():
        found = hf_hub_download("owner/repo", name, cache_dir=hub_cache(), local_files_only=True)
        assert Path(found).read_bytes() == data and f"/snapshots/{commit}/" in found
    (scanned,) = scan_cache_dir(hub_cache()).repos
    assert scanned.repo_id == "owner/repo" and scanned.nb_files == 3
    sent = hub.file_bytes_sent()
    assert pull() == paths and hub.file_bytes_sent() == sent  # nothing is fetched twice


def test_what_the_hubs_own_library_fetched_is_not_fetched_again(hub):
    from huggingface_hub import snapshot_download

    hub.add("owner/repo", FILES)
    snapshot_download("owner/repo", cache_dir=hub_cache(), endpoint=hub.address)
    sent = hub.file_bytes_sent()
    require_right(pull())
    assert hub.file_bytes_sent() == sent
    assert not CachedRepository.of("owner/repo").fetched_by_us


def test_the_token_goes_to_the_hub_and_not_to_where_the_bytes_are(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("owner/repo", FILES, token="hf_secret")
    require_right(pull())
    assert {each.token for each in hub.seen if each.host.startswith("localhost")} == {"hf_secret"}
    assert {each.token for each in hub.seen if each.host.startswith("127.0.0.1")} == {""}


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    cuts=st.lists(st.integers(0, 120_000), max_size=4),
    ignores_range=st.booleans(),
    status=st.sampled_from([None, 429, 500, 503]),
)
def test_a_broken_connection_goes_on_where_it_was(hub, tmp_path_factory, cuts, ignores_range, status):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        hub.add("owner/repo", FILES)
        hub.faults[:] = [Fault("00001-of-00002.gguf", after=cut) for cut in cuts]
        hub.faults += [Fault("00001-of-00002.gguf", status=status)] if status else []
        hub.faults += [Fault("00001-of-00002.gguf", ignores_range=True)] if ignores_range else []
        before = hub.file_bytes_sent()
        require_right(pull())
        total = sum(map(len, FILES.values()))
        if not ignores_range:
            assert hub.file_bytes_sent() - before == total  # no byte twice
        assert not any(fault.times for fault in hub.faults[: len(cuts)])


def test_a_hub_that_does_not_come_back_ends_in_a_sentence_and_what_was_fetched_stays(hub):
    hub.add("owner/repo", FILES)
    hub.faults[:] = [Fault("00001-of-00002.gguf", after=100_000), Fault("00001-of-00002.gguf", status=503, times=99)]
    with pytest.raises(KimiLiteError, match=r"00001-of-00002.gguf cannot be fetched: HTTP 503, 6 times") as caught:
        pull()
    assert "goes on where it was" in caught.value.hint
    hub.faults.clear()
    sent = hub.file_bytes_sent()
    require_right(pull())
    assert hub.file_bytes_sent() - sent <= sum(map(len, FILES.values())) - 100_000


def test_too_many_requests_are_waited_out_as_long_as_the_hub_says(hub, monkeypatch):
    waits = []
    monkeypatch.setattr(fetching._Transfer, "_pause", lambda self, seconds: waits.append(seconds))
    hub.add("owner/repo", FILES)
    hub.faults[:] = [Fault("00002-of-00002.gguf", status=429, headers={"Retry-After": "77"})]
    require_right(pull())
    assert waits == [77.0]


def test_a_wrong_checksum_is_fetched_once_more_and_then_named(hub):
    repo = hub.add("owner/repo", FILES)
    path = "a/m-00002-of-00002.gguf"
    repo.sent[path] = b"x" + FILES[path][1:]
    with pytest.raises(KimiLiteError, match=r"m-00002-of-00002.gguf was fetched twice and is not what") as caught:
        pull()
    for digest in (hashlib.sha256(FILES[path]).hexdigest(), hashlib.sha256(repo.sent[path]).hexdigest()):
        assert digest in caught.value.message
    assert len([each for each in hub.seen if each.path.endswith(path) and each.host.startswith("127")]) == 2
    kept = [each.stem for each in CachedRepository.of("owner/repo").folder.rglob("*.incomplete")]
    assert hashlib.sha256(FILES[path]).hexdigest() not in kept  # another file may have been on its way
    repo.sent.clear()
    require_right(pull())


@pytest.mark.parametrize("left", [b"", DATA[:1], DATA[:200_000], DATA[:-1], b"y" * 1000, DATA + b"more"])
def test_what_an_earlier_run_left_is_read_before_it_is_believed(hub, left):
    hub.add("owner/repo", FILES)
    cached = CachedRepository.of("owner/repo")
    part = cached.folder / "blobs" / f"{hashlib.sha256(DATA).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    require_right(pull())
    wasted = len(FILES["README.md"]) + 2 * len(DATA)
    if DATA.startswith(left):
        assert hub.file_bytes_sent() == wasted - len(left)


def test_ctrl_c_keeps_what_was_fetched(hub):
    hub.add("owner/repo", FILES)

    def interrupt(what, done, total):
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(interrupt)
    kept = sum(path.stat().st_size for path in (CachedRepository.of("owner/repo").folder / "blobs").iterdir())
    assert kept > 0
    sent = hub.file_bytes_sent()
    require_right(pull())
    assert hub.file_bytes_sent() - sent == sum(map(len, FILES.values())) - kept


def test_a_disk_that_is_too_small_is_seen_before(hub, monkeypatch):
    hub.add("owner/repo", FILES)
    monkeypatch.setattr(fetching, "_free_bytes", lambda: 500_000)
    with pytest.raises(KimiLiteError, match=r"too small for the download: need .* MiB, have 0.5 MiB") as caught:
        pull()
    assert "models --rm" in caught.value.hint and "HF_HOME" in caught.value.hint
    assert hub.file_bytes_sent() == 0


def test_a_disk_that_becomes_full_is_said_and_the_rest_comes_later(hub, monkeypatch):
    hub.add("owner/repo", FILES)
    real = fetching._Transfer._receive

    def full(self, out, digest):
        if self._file.path.endswith("1-of-00002.gguf"):
            out.write(DATA[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, out, digest)

    monkeypatch.setattr(fetching._Transfer, "_receive", full)
    with pytest.raises(KimiLiteError, match=r"The disk became full while a/m-00001-of-00002.gguf was fetched: need"):
        pull()
    monkeypatch.setattr(fetching._Transfer, "_receive", real)
    require_right(pull())


def test_two_programs_do_not_write_the_same_file(hub):
    hub.add("owner/repo", FILES)
    reached, go_on = threading.Event(), threading.Event()
    hub.faults[:] = [Fault("00001-of-00002.gguf", action=lambda: (reached.set(), go_on.wait(20)))]
    first = threading.Thread(target=pull)
    first.start()
    try:
        assert reached.wait(20)
        with pytest.raises(KimiLiteError, match=r"00001-of-00002.gguf is being fetched by another program"):
            pull()
    finally:
        go_on.set()
        first.join(20)
    require_right(pull())


def test_progress_counts_every_byte_once(hub):
    hub.add("owner/repo", FILES)
    hub.faults[:] = [Fault("00001-of-00002.gguf", after=1000), Fault("00001-of-00002.gguf", ignores_range=True)]
    said = []
    pull(lambda what, done, total: said.append((what, done, total)))
    total = sum(map(len, FILES.values()))
    assert said[-1] == ("fetching 3 files", total, total)
    assert all(0 <= done <= total for _, done, _ in said)


def test_what_is_missing_is_known_before(hub):
    hub.add("owner/repo", FILES)
    with Hub() as client:
        repository = client.repository(NAME)
        assert missing(repository, repository.files).num_bytes == sum(map(len, FILES.values()))
        fetch(client, repository, repository.files[:1], lambda *_: None)
        assert len(missing(repository, repository.files).files) == 2


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        ({"name": "owner/other"}, "owner/other is not on http://localhost.*or it is private", "HF_TOKEN"),
        ({"revision": "v9"}, "has no revision 'v9'", "Its branches"),
        ({"gated": True}, "is gated", "accept its conditions, then: Set HF_TOKEN"),
        ({"gated": True, "token": "wrong"}, "is gated", "accept its conditions, then repeat"),
        ({"private": True, "token": "wrong"}, "or it is private", "your token gives access"),
        ({"fault": 403}, "is gated", "accept its conditions"),
        ({"fault": 500}, "answers owner/repo with HTTP 500", "HF_ENDPOINT is"),
        ({"fault": 429}, "too many requests", "logged in more is allowed"),
    ],
)
def test_what_a_hub_refuses_is_said_with_what_to_do(hub, monkeypatch, change, said, hint):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's own waits
    repo = hub.add("owner/repo", FILES)
    repo.is_gated, repo.token = change.get("gated", False), "right" if {"gated", "private"} & set(change) else ""
    if token := change.get("token"):
        monkeypatch.setenv("HF_TOKEN", token)
    if status := change.get("fault"):
        hub.faults[:] = [Fault("owner/repo/revision/main", status=status, times=99)]
    name = HubName(change.get("name", "owner/repo"), revision=change.get("revision", "main"))
    with pytest.raises(KimiLiteError, match=said) as caught:
        pull(name=name)
    assert hint in caught.value.hint


def test_no_hub_at_all(home, monkeypatch):
    with HubServer() as gone:
        address = gone.address
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(KimiLiteError, match="cannot be reached") as caught, Hub() as client:
        client.repository(NAME)
    assert "HF_ENDPOINT" in caught.value.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(KimiLiteError, match="HF_HUB_OFFLINE forbids"), Hub() as client:
        client.repository(NAME)


@pytest.mark.parametrize(
    "body", [b"<html>Sign in</html>", b"{}", b"[]", b"null", b'{"id": 3}', b'{"id": "a/b", "sha": "../x"}', b"\xff\xfe"]
)
@pytest.mark.parametrize("place", ["/revision/main", "/tree/main"])
def test_what_is_no_hub_is_said(hub, body, place):
    repo = hub.add("owner/repo", FILES)
    hub.faults[:] = [Fault(place.replace("/tree/main", f"/tree/{repo.commit}"), status=200, body=body)]
    if place == "/tree/main" and body in (b"{}", b"[]"):  # a hub without files
        with Hub() as client:
            assert not client.repository(NAME).files
        return
    with pytest.raises(KimiLiteError, match="hub") as caught, Hub() as client:
        client.repository(NAME)
    assert "HF_ENDPOINT" in caught.value.hint


@pytest.mark.parametrize("path", ["../../outside.gguf", "/etc/x.gguf", "a//b.gguf", "a/./b.gguf", "a\\b.gguf", "a\nb"])
def test_paths_of_a_hub_stay_inside(hub, path):
    hub.add("owner/repo", {path: DATA})
    with pytest.raises(KimiLiteError, match="which is no path"), Hub() as client:
        client.repository(NAME)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_said(hub, home):
    hub.add("owner/repo", FILES)
    (home / "hf").mkdir(mode=0o500)
    with pytest.raises(KimiLiteError, match=r"cannot be written to .*: Permission denied"):
        pull()


def test_a_file_in_the_place_of_the_cache_is_said(hub, home):
    hub.add("owner/repo", FILES)
    (home / "hf").mkdir()
    (home / "hf" / "hub").write_text("a file")
    with pytest.raises(KimiLiteError, match=r"cannot be written to .*: (Not a directory|File exists)") as caught:
        pull()
    assert "HF_HOME" in caught.value.hint
