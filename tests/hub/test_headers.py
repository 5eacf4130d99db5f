"""A model on a hub is planned by its headers as the same files are when they are here."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.header import UnknownTypeError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hub.client import Hub
from kimi_lite.hub.headers import describe, describe_all
from kimi_lite.hub.names import HubName
from kimi_lite.plan.subject import find_subject
from tests.gguf.gguf_bytes import GGUFBytes, tensor
from tests.hub.hub_server import Fault
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """A model in three files, the first of which has a vocabulary alone, as publishers split them."""
    folder = tmp_path_factory.mktemp("split")
    write_tiny_gguf(
        folder / "whole.gguf", np.random.default_rng(0), types={"_exps": "Q4_K"}, expert_feed_forward_size=256
    )
    return _split(folder / "whole.gguf", folder / "UD-Q4_K_M")


def _split(whole: Path, folder: Path) -> list[Path]:
    """By a writer that is not ours, with shard keys by hand."""
    store = GGUFStore.open(whole)
    folder.mkdir()
    names = list(store.tensors)
    parts = [[], names[: len(names) // 2], names[len(names) // 2 :]]
    paths = [folder / f"K-UD-Q4_K_M-{number + 1:05}-of-00003.gguf" for number in range(3)]
    for number, (path, members) in enumerate(zip(paths, parts, strict=True)):
        writer = gguf.GGUFWriter(path, "deepseek2")
        if number == 0:
            _copy_metadata(writer, store)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(names))
        for name in members:
            view = store.tensors[name]
            kind = gguf.GGMLQuantizationType(view.layout.ggml_id)
            writer.add_tensor(name, np.array(view.data), raw_shape=view.data.shape, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def _copy_metadata(writer, store) -> None:
    for key, value in store.values.items():
        if key != "general.architecture":
            plain = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
            sub = value.element_type and int(value.element_type)
            writer.add_key_value(key, plain, _kind(value.value_type), sub and _kind(sub))
    writer.add_array("tokenizer.filler", [f"word {number:06}" for number in range(40_000)])  # beyond the first bytes


def _kind(number: int):
    return gguf.GGUFValueType(int(number))


def served(hub, shards: list[Path], **more: bytes) -> HubName:
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in shards}
    hub.add("a/K-GGUF", files | more)
    return HubName("a/K-GGUF")


def test_the_plan_of_the_headers_is_the_plan_of_the_files(hub, shards):
    name = served(hub, shards, **{"mmproj-F16.gguf": b"x" * 5000})
    with Hub() as client:
        repository = client.repository(name)
        subject = describe(client, repository, repository.find("UD-Q4_K_M"))
        plain = describe(client, repository, repository.find("UD-Q4_K_M"), has_vision=False)
    here = find_subject(str(shards[0]), has_vision=False)
    assert plain.sizes == here.sizes and subject.config == here.config
    assert subject.sizes.vision_bytes == 5000 and subject.origin == "hf:a/K-GGUF:UD-Q4_K_M"
    weights = sum(path.stat().st_size for path in shards)
    assert hub.file_bytes_sent() < weights  # of the headers alone
    sent = hub.file_bytes_sent()
    with Hub() as client:
        repository = client.repository(name)
        describe(client, repository, repository.find("UD-Q4_K_M"))
    assert hub.file_bytes_sent() == sent  # they are kept


def test_breaks_and_busy_hubs_are_waited_out(hub, shards):
    name = served(hub, shards)
    first, second = "-00001-of-00003.gguf", "-00002-of-00003.gguf"
    hub.faults[:] = [Fault(first, after=1000), Fault(first, status=503), Fault(first, ignores_range=True)]
    hub.faults.append(Fault(second, status=429))
    with Hub() as client:
        repository = client.repository(name)
        assert describe(client, repository, repository.quants[0]).sizes == find_subject(str(shards[0])).sizes
    assert not any(fault.times for fault in hub.faults)


def test_what_is_wrong_with_one_does_not_stop_the_others(hub, shards):
    ik = GGUFBytes(tensors=[tensor("blk.0.ffn_up.weight", [256], 134)], data=bytes(2000)).build()
    bad = {"K-smol-IQ1_BN.gguf": ik, "K-Q8_0.gguf": b"no GGUF" * 500, "K-Q2_K-00001-of-00002.gguf": ik}
    name = served(hub, shards, **bad)
    with Hub() as client:
        repository = client.repository(name)
        every = list(describe_all(client, repository, repository.quants, lambda *_: None))
    found = {each.quant.label: each for each in every}
    assert found["UD-Q4_K_M"].subject and not found["UD-Q4_K_M"].problem
    assert isinstance(found["smol-IQ1_BN"].problem, UnknownTypeError)
    assert found["smol-IQ1_BN"].problem.what == "IQ1_BN, a type of ik_llama.cpp"
    assert "not a GGUF file" in found["Q8_0"].problem.message and "has 2 shards" in found["Q2_K"].problem.message


def test_a_foreign_shard_is_found_before_it_is_fetched(hub, shards, tmp_path):
    files = {path.name: path.read_bytes() for path in shards}
    names = sorted(files)
    files[names[1]], files[names[2]] = files[names[2]], files[names[1]]
    hub.add("a/K-GGUF", files)
    with Hub() as client:
        repository = client.repository(HubName("a/K-GGUF"))
        with pytest.raises(KimiLiteError, match=r"split\.no 2"):
            describe(client, repository, repository.quants[0])
