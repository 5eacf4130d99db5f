"""Shards, folders and files that are not what they should be: which one, and what to open or fetch instead."""

import os
import re
import shutil
import struct

import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf import store
from kimi_lite.gguf.store import GGUFStore
from tests.gguf.gguf_bytes import GGUFBytes, key, tensor, text
from tests.tiny import write_tiny_gguf

SMALL = {"num_layers": 2, "hidden_size": 64, "num_experts": 4, "expert_feed_forward_size": 32, "feed_forward_size": 64}


def refusal(path) -> KimiLiteError:
    with pytest.raises(KimiLiteError) as error:
        GGUFStore.open(path)
    assert error.value.hint
    assert error.value.message.endswith(".")
    return error.value


@pytest.fixture
def model(tmp_path):
    """Four shards, `kimi-00001-of-00004.gguf` to `-00004-`, in a folder of their own."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_gguf(folder / "kimi.gguf", np.random.default_rng(5), **SMALL, max_tensors_per_shard=9)
    return folder


def shard(folder, number: int):
    return folder / f"kimi-{number:05d}-of-00004.gguf"


def test_another_shard_than_the_first(model):
    error = refusal(shard(model, 3))
    assert "is shard 3 of 4" in error.message
    assert error.hint == f"Open {shard(model, 1)}"


@pytest.mark.parametrize("opened_by", ["folder", "first shard"])
def test_missing_shards_are_listed(model, opened_by):
    shard(model, 2).unlink()
    shard(model, 4).unlink()
    error = refusal(model if opened_by == "folder" else shard(model, 1))
    assert "2 of them are missing: kimi-00002-of-00004.gguf, kimi-00004-of-00004.gguf" in error.message
    assert error.hint == f"Fetch them into {model}."


def test_a_first_shard_that_is_missing(model):
    shard(model, 1).unlink()
    assert "1 of them are missing: kimi-00001-of-00004.gguf" in refusal(model).message
    assert "There is no file" in refusal(shard(model, 1)).message


def test_a_download_in_progress(model):
    shard(model, 3).rename(shard(model, 3).with_suffix(".gguf.part"))
    assert "kimi-00003-of-00004.gguf.part" in refusal(model).hint
    assert "download in progress" in refusal(shard(model, 3)).message
    assert "download in progress" in refusal(shard(model, 3).with_suffix(".gguf.part")).message


def test_a_shard_under_another_number(model):
    shutil.copy(shard(model, 2), shard(model, 3))
    message = refusal(model).message
    assert (
        "kimi-00003-of-00004.gguf: its header says split.no 1 and split.count 4, and its name asks for 2 and 4"
        in message
    )


def test_a_shard_of_a_longer_split(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_gguf(other / "kimi.gguf", np.random.default_rng(5), **SMALL, max_tensors_per_shard=5)
    shutil.copy(next(other.glob("*-00002-of-*")), shard(model, 2))
    assert re.search(r"split.no 1 and split.count \d, and its name asks for 1 and 4", refusal(model).message)


def test_a_whole_file_named_as_a_shard(model):
    shard(model, 2).unlink()
    write_tiny_gguf(shard(model, 2), np.random.default_rng(5), **SMALL)
    assert "says split.no 0 and split.count 1, and its name asks for 1 and 4" in refusal(model).message


def test_a_shard_of_another_model_with_as_many_shards(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_gguf(
        other / "kimi.gguf", np.random.default_rng(6), **SMALL | {"q_lora_rank": 0}, max_tensors_per_shard=8
    )
    assert len(list(other.iterdir())) == 4
    shutil.copy(shard(other, 2), shard(model, 2))
    message = refusal(model).message
    assert "'split.tensors.count' is 30, and in kimi-00001-of-00004.gguf it is 34: a foreign shard" in message


def split_keys(number: int, count: int, num_tensors: int) -> list[bytes]:
    keys = [
        ("split.no", 2, "<H", number),
        ("split.count", 2, "<H", count),
        ("split.tensors.count", 5, "<i", num_tensors),
    ]
    return [key(name, value_type, struct.pack(code, value)) for name, value_type, code, value in keys]


def write_pair(folder, first: list[bytes], second: list[bytes], num_tensors: int = 2, names: str = "ab") -> None:
    for number, extra in enumerate((first, second)):
        file = GGUFBytes(keys=split_keys(number, 2, num_tensors) + extra, tensors=[tensor(names[number], [8])])
        (folder / f"m-{number + 1:05d}-of-00002.gguf").write_bytes(file.build())


def test_shards_that_contradict_each_other(tmp_path):
    write_pair(tmp_path, [key("general.name", 8, text("K2.5"))], [key("general.name", 8, text("K2.5"))])
    assert len(GGUFStore.open(tmp_path).tensors) == 2
    write_pair(tmp_path, [key("general.name", 8, text("K2.5"))], [key("general.name", 8, text("K2.6"))])
    assert (
        "m-00002-of-00002.gguf: 'general.name' is 'K2.6', and in m-00001-of-00002.gguf it is 'K2.5'"
        in refusal(tmp_path).message
    )


def test_a_tensor_in_two_shards(tmp_path):
    write_pair(tmp_path, [], [], names="aa")
    assert (
        "tensor 'a' is in m-00001-of-00002.gguf and in m-00002-of-00002.gguf: one is foreign"
        in refusal(tmp_path).message
    )


def test_fewer_tensors_than_promised(tmp_path):
    write_pair(tmp_path, [], [], num_tensors=3)
    assert "split.tensors.count promises 3 tensors, and the 2 shards hold 2" in refusal(tmp_path).message


def test_split_keys_of_the_wrong_type(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUFBytes(keys=[key("split.count", 8, text("two"))]).build())
    assert "split.count is 'two', and must be a whole number" in refusal(path).message


def test_a_first_shard_that_lost_its_name(model):
    shard(model, 1).rename(model / "renamed.gguf")
    message = refusal(model / "renamed.gguf").message
    assert "by its header this is one of 4 shards" in message


def test_impossible_shard_numbers(tmp_path):
    path = tmp_path / "m-00005-of-00004.gguf"
    path.write_bytes(GGUFBytes().build())
    assert "is named shard 5 of 4" in refusal(path).message


def test_two_models_in_a_folder(model):
    write_tiny_gguf(model / "other.gguf", np.random.default_rng(5), **SMALL)
    error = refusal(model)
    assert "holds 2 models, and one is needed: kimi-00001-of-00004.gguf, other.gguf" in error.message
    assert str(shard(model, 1)) in error.hint


def test_folders_without_a_model(tmp_path):
    assert "it is empty" in refusal(tmp_path).message
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "mmproj-F16.gguf").write_bytes(GGUFBytes().build())
    assert "no .gguf file among 2 entries (mmproj-F16.gguf, notes.txt)" in refusal(tmp_path).message
    (tmp_path / "Q4").mkdir()
    (tmp_path / "Q4" / "m.gguf").write_bytes(GGUFBytes().build())
    assert f"its folders do: {tmp_path}/Q4/m.gguf" in refusal(tmp_path).message
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 8)
    assert refusal(tmp_path).hint == f"Make one with: kimi-lite quantize {tmp_path}"
    (tmp_path / "m.gguf.part").write_bytes(b"GGUF")
    assert "only downloads in progress: m.gguf.part" in refusal(tmp_path).message


def test_paths_that_are_not_there(tmp_path):
    (tmp_path / "kimi.gguf").write_bytes(GGUFBytes().build())
    error = refusal(tmp_path / "kimmi.gguf")
    assert f"There is no file or folder {tmp_path / 'kimmi.gguf'}" in error.message
    assert "kimi.gguf" in error.hint
    assert "There is no file" in refusal(tmp_path / "no" / "where.gguf").message
    assert "There is no file" in refusal("zero\0byte.gguf").message
    assert "There is no file" in refusal("~nobody-of-this-name/m.gguf").message
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 5000)).message


def test_files_that_are_not_models(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "the file is empty" in refusal(tmp_path / "empty.gguf").message
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 64) + b'{"a": 1}')
    assert "kimi-lite quantize" in refusal(tmp_path / "model.safetensors").hint
    os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait for ever
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe.gguf").message


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUFBytes().build())

    def forbid(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "map_file", forbid)  # as root, the test's own file could not be forbidden
    assert f"{path} cannot be read: Permission denied" in refusal(path).message
