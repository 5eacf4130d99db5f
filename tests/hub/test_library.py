"""Models that other programs keep, found where they lie; and deleting one."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.hub.cache import CachedRepository
from kimi_lite.hub.client import Hub
from kimi_lite.hub.fetch import fetch
from kimi_lite.hub.library import HUB, LLAMA_CPP, LM_STUDIO, OLLAMA, find_local, find_named, local_models
from kimi_lite.hub.names import HubName, parse_hub_name
from kimi_lite.hub.removal import plan_removal
from kimi_lite.hub.resolve import find_here, find_or_fetch, same_here
from kimi_lite.options import Options

SHARDS = [f"UD-TQ1_0/K-UD-TQ1_0-{number:05}-of-00002.gguf" for number in (1, 2)]
DATA = {path: hashlib.sha256(path.encode()).digest() * 100 for path in (*SHARDS, "K-IQ1_M.gguf", "mmproj-F16.gguf")}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def hub_cache_model(home: Path, repository: str = "a/K-GGUF", commit: str = "c" * 40, data=DATA) -> Path:
    """As the hub's own library, or llama.cpp, leaves it."""
    folder = home / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    for path, content in data.items():
        blob = write(folder / "blobs" / hashlib.sha256(content).hexdigest(), content)
        link = folder / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    write(folder / "refs" / "main", commit.encode())
    return folder


def ollama_model(root: Path, place: str, data: bytes, **layers: bytes) -> Path:
    blobs = {"model": data, **layers}
    entries = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{hashlib.sha256(b).hexdigest()}"}
        for kind, b in blobs.items()
    ]
    for content in blobs.values():
        write(root / "blobs" / f"sha256-{hashlib.sha256(content).hexdigest()}", content)
    return write(root / "manifests" / place, json.dumps({"schemaVersion": 2, "layers": entries}).encode())


@pytest.fixture
def stores(home, monkeypatch) -> Path:
    """One model and more in each store."""
    monkeypatch.setattr("kimi_lite.hub.library.SERVICE_FOLDER", home / "no-service")
    hub_cache_model(home)
    write(home / ".lmstudio" / "models" / "b" / "M-GGUF" / "M-Q4_K_M.gguf", DATA["K-IQ1_M.gguf"])
    write(home / ".lmstudio" / "models" / "b" / "M-GGUF" / "mmproj-M-F16.gguf", b"tower")
    ollama_model(home / ".ollama/models", "registry.ollama.ai/library/kimi/latest", b"ollama's", projector=b"tower 2")
    ollama_model(home / ".ollama/models", "hf.co/c/N-GGUF/Q8_0", b"of the hub")
    write(home / ".cache" / "llama.cpp" / "d_O_x-GGUF_O-Q2_K.gguf", b"old")
    write(home / ".cache" / "llama.cpp" / "manifest=d=O_x-GGUF=Q2_K.json", b"{}")
    return home


def test_every_store_is_looked_at(stores):
    found = {(model.store, model.name): model for model in local_models()}
    assert set(found) == {
        (HUB, "a/K-GGUF:UD-TQ1_0"), (HUB, "a/K-GGUF:IQ1_M"), (LM_STUDIO, "b/M-GGUF:Q4_K_M"), (OLLAMA, "kimi:latest"),
        (OLLAMA, "c/N-GGUF:Q8_0"), (LLAMA_CPP, "d/O_x-GGUF:Q2_K"),
    }  # fmt: skip
    assert [path.name for path in found[HUB, "a/K-GGUF:UD-TQ1_0"].files] == [Path(path).name for path in SHARDS]
    assert found[HUB, "a/K-GGUF:UD-TQ1_0"].tower.name == "mmproj-F16.gguf"
    assert found[OLLAMA, "kimi:latest"].files[0].read_bytes() == b"ollama's"
    assert found[OLLAMA, "kimi:latest"].tower.read_bytes() == b"tower 2"
    assert not any(model.is_ours for model in found.values())


def test_names_of_the_hub_find_files_in_any_store(stores):
    for name, data in (
        ("a/K-GGUF:tq1_0", DATA[SHARDS[0]]),
        ("a/k-gguf:IQ1_M", DATA["K-IQ1_M.gguf"]),
        ("b/M-GGUF", DATA["K-IQ1_M.gguf"]),  # the only one of its repository
        ("c/N-GGUF:Q8_0", b"of the hub"),
        ("d/O_x-GGUF:Q2_K", b"old"),
    ):
        assert find_local(parse_hub_name(name)).path.read_bytes() == data, name
        assert find_here(f"hf:{name}").read_bytes() == data
        assert find_or_fetch(f"hf:{name}", Options(), lambda *_: None).read_bytes() == data  # and asks no hub
    for name in ("a/K-GGUF", "a/K-GGUF:Q5_K", "x/y", "a/K-GGUF@v2:IQ1_M"):
        assert find_local(parse_hub_name(name)) is None
        with pytest.raises(KimiLiteError, match="is not on this machine"):
            find_here(f"hf:{name}")


def test_a_model_with_a_missing_shard_is_not_used(stores):
    link = next((stores / "hf").rglob("*-00002-of-00002.gguf"))
    link.unlink()
    assert find_local(parse_hub_name("a/K-GGUF:UD-TQ1_0")) is None
    (model,) = [model for model in local_models() if model.label == "UD-TQ1_0"]
    assert not model.is_whole


@pytest.mark.parametrize(
    "spoil",
    [b"", b"not json", b"[]", b'{"layers": 3}', b'{"layers": [{"mediaType": 1}]}', b'{"layers": [{"digest": "x"}]}',
     b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../etc/passwd"}]}'],
)  # fmt: skip
def test_damaged_manifests_are_left_out(stores, spoil):
    (stores / ".ollama/models/manifests/registry.ollama.ai/library/kimi/latest").write_bytes(spoil)
    write(stores / ".lmstudio-home-pointer", b"/nonexistent\x00")
    assert "kimi:latest" not in [model.name for model in local_models()]


def test_a_newer_snapshot_counts_and_an_older_one_is_asked_for_the_rest(home):
    hub_cache_model(home, commit="d" * 40)
    folder = hub_cache_model(home, commit="e" * 40, data={"K-IQ1_M.gguf": b"newer" * 300})
    found = {model.label: model for model in local_models()}
    assert "e" * 40 in str(found["IQ1_M"].path) and "d" * 40 in str(found["UD-TQ1_0"].path)
    assert find_local(HubName("a/K-GGUF", "IQ1_M", "d" * 40)).path.read_bytes() == DATA["K-IQ1_M.gguf"]
    assert CachedRepository(folder).commit_of("main") == "e" * 40


def test_the_same_bytes_elsewhere_are_used(hub, home):
    hub.add("a/K-GGUF", DATA)
    hub.add("b/M-GGUF", {"M-Q4_K_M.gguf": DATA["K-IQ1_M.gguf"]})
    ollama_model(home / ".ollama/models", "registry.ollama.ai/library/other/name", DATA["K-IQ1_M.gguf"])
    write(home / ".lmstudio/models/a/K-GGUF/K-UD-TQ1_0-00001-of-00002.gguf", DATA[SHARDS[0]])
    write(home / ".lmstudio/models/a/K-GGUF/K-UD-TQ1_0-00002-of-00002.gguf", DATA[SHARDS[1]])
    with Hub() as client:
        repository = client.repository(HubName("a/K-GGUF"))
        assert same_here(repository, repository.find("IQ1_M"), local_models()).store == OLLAMA
        assert same_here(repository, repository.find("UD-TQ1_0"), local_models()).store == LM_STUDIO
        write(home / ".lmstudio/models/a/K-GGUF/K-UD-TQ1_0-00002-of-00002.gguf", b"of another revision")
        assert same_here(repository, repository.find("UD-TQ1_0"), local_models()) is None


def pulled(*labels: str) -> None:
    with Hub() as client:
        repository = client.repository(HubName("a/K-GGUF"))
        for label in labels:
            quant = repository.find(label)
            fetch(client, repository, [*quant.files, repository.tower_of(quant)], lambda *_: None)


def test_what_was_pulled_is_deleted_with_all_that_belongs_to_it(hub, home):
    hub.add("a/K-GGUF", DATA)
    pulled("IQ1_M", "UD-TQ1_0")
    folder = CachedRepository.of("a/K-GGUF").folder
    removal = plan_removal(find_named("a/K-GGUF:IQ1_M"), is_forced=False)
    assert removal.num_bytes == len(DATA["K-IQ1_M.gguf"])  # the tower is still wanted
    removal.run()
    assert {path.name for path in folder.rglob("*.gguf")} == {"mmproj-F16.gguf", *(Path(path).name for path in SHARDS)}
    assert len(list((folder / "blobs").iterdir())) == 3 == len(CachedRepository(folder).fetched_by_us)
    plan_removal(find_named("hf:a/K-GGUF:TQ1_0"), is_forced=False).run()
    assert not folder.exists() and not list(local_models())
    pulled("IQ1_M")  # and all of it can come again
    assert find_local(parse_hub_name("a/K-GGUF:IQ1_M"))


def test_what_other_programs_fetched_is_refused_unless_forced(stores):
    for name, store in (
        ("a/K-GGUF:IQ1_M", HUB), ("b/M-GGUF", LM_STUDIO), ("kimi:latest", OLLAMA), ("c/N-GGUF:Q8_0", OLLAMA),
        ("d/O_x-GGUF:Q2_K", LLAMA_CPP),
    ):  # fmt: skip
        model = find_named(name)
        with pytest.raises(KimiLiteError, match=f"not fetched by kimi-lite: it lies in .*{store}") as caught:
            plan_removal(model, is_forced=False)
        assert "--force" in caught.value.hint
        plan_removal(model, is_forced=True).run()
        assert not model.path.exists()
    assert [model.name for model in local_models()] == ["a/K-GGUF:UD-TQ1_0"]
    assert not (stores / ".lmstudio/models/b/M-GGUF").exists() and (stores / ".lmstudio/models").is_dir()


def test_blobs_that_ollamas_other_models_need_stay(home, monkeypatch):
    monkeypatch.setattr("kimi_lite.hub.library.SERVICE_FOLDER", home / "no-service")
    root = home / ".ollama/models"
    ollama_model(root, "registry.ollama.ai/library/kimi/a", b"shared", projector=b"own")
    ollama_model(root, "registry.ollama.ai/library/kimi/b", b"shared")
    plan_removal(find_named("kimi:a"), is_forced=True).run()
    (left,) = local_models()
    assert left.name == "kimi:b" and left.path.read_bytes() == b"shared" and len(list((root / "blobs").iterdir())) == 1


def test_an_unfinished_download_is_listed_and_deleted(hub, home):
    hub.add("a/K-GGUF", DATA)
    write(CachedRepository.of("a/K-GGUF").folder / "blobs" / f"{'1' * 64}.incomplete", b"begun")
    (model,) = local_models()
    assert model.name == "a/K-GGUF:unfinished" and not model.is_whole and model.num_bytes == 5
    plan_removal(find_named("a/K-GGUF:unfinished"), is_forced=False).run()
    assert not list(local_models())


def test_names_that_are_not_one_model_are_refused(stores):
    for name, said in (("a/K-GGUF", "2 models here"), ("nothing", "No model here"), ("x/y:Q4", "No model here")):
        with pytest.raises(KimiLiteError, match=said):
            find_named(name)
    path = stores / ".lmstudio/models/b/M-GGUF/M-Q4_K_M.gguf"
    assert find_named(str(path)).path == path


def test_a_store_that_caches_share_is_left_alone(home):
    """The hub's library may keep a blob in a store of its own, with a link in the cache."""
    folder = hub_cache_model(home, data={"K-IQ1_M.gguf": DATA["K-IQ1_M.gguf"]})
    (blob,) = (folder / "blobs").iterdir()
    shared = write(home / "hf" / "shared" / "xet-hash", blob.read_bytes())
    blob.unlink()
    blob.symlink_to(shared)
    plan_removal(find_named("a/K-GGUF"), is_forced=True).run()
    assert shared.is_file() and not folder.exists()
