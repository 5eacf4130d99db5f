"""Folders that are incomplete or damaged are refused at once, with the file's name."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.shards import find_raw_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.zeros((0, 2), np.int64),
}


def write_sharded(folder: Path) -> dict[str, str]:
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, folder / "model-00001-of-000002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-000002.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"model-0000{2 if name == 'b' else 1}-of-000002.safetensors" for name in TENSORS}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_sharded_and_single_files_are_read(tmp_path):
    write_sharded(tmp_path)
    single = tmp_path / "single"
    single.mkdir()
    save_file(TENSORS, single / "weights.safetensors")
    for folder in (tmp_path, single):
        found = find_raw_tensors(folder)
        assert found.keys() == TENSORS.keys()
        for name, values in TENSORS.items():
            rows = values.reshape(-1, values.shape[-1])
            assert np.array_equal(found[name].read_rows(0, len(rows)), rows)
        assert np.array_equal(found["a"].read_rows(1, 2), TENSORS["a"][1:])


def test_missing_shards_are_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-000002.safetensors").unlink()
    with pytest.raises(KimiLiteError, match=r"lacks 1 of its 2 shards: model-00002-of-000002\.safetensors"):
        find_raw_tensors(tmp_path)


@pytest.mark.parametrize("num_bytes", [-1, 3, 12, 0, 40])
def test_a_truncated_shard_is_named_with_both_sizes(tmp_path, num_bytes):
    write_sharded(tmp_path)
    file = tmp_path / "model-00001-of-000002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:num_bytes])
    with pytest.raises(KimiLiteError, match=r"model-00001-of-000002\.safetensors") as caught:
        find_raw_tensors(tmp_path)
    have = f"{len(content[:num_bytes]):,}"
    assert have in caught.value.message
    if num_bytes == -1:
        assert f"need {len(content):,} bytes, have {have}" in caught.value.message


def damage(folder: Path, how: str) -> str:
    weight_map = write_sharded(folder)
    file, index = folder / "model-00001-of-000002.safetensors", folder / "model.safetensors.index.json"
    content = file.read_bytes()
    if how == "too long":
        file.write_bytes(content + b"more")
    elif how == "a Git LFS pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    elif how == "cannot be read":
        file.write_bytes(content.replace(b'"shape":[2,3]', b'"shape":[2,9]'))
    elif how == "ends before its header":
        file.write_bytes(b"\xff" * 8 + content[8:])
    elif how == "it is not":
        index.write_text(json.dumps({"weight_map": weight_map | {"d": file.name}}))
    elif how == "not a safetensors index":
        index.write_text('{"weights": {}}')
    elif how == "no model.safetensors.index.json":
        index.unlink()
    return how


@pytest.mark.parametrize("how", ["too long", "a Git LFS pointer", "cannot be read", "ends before its "
                                                                                    "header", "it is not",
                                 "not a safetensors index", "no model.safetensors.index.json"])  # fmt: skip
def test_damage_is_named(tmp_path, how):
    with pytest.raises(KimiLiteError, match=damage(tmp_path, how)):
        find_raw_tensors(tmp_path)


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(KimiLiteError, match=r"no \.safetensors file; it has pytorch_model\.bin"):
        find_raw_tensors(tmp_path)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path):
    write_sharded(tmp_path)
    found = find_raw_tensors(tmp_path)
    file = tmp_path / "model-00001-of-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(KimiLiteError, match="shrank while it was read: a is cut off"):
        found["a"].read_rows(0, 2)
