"""Bits that flip in a source: in headers always found, in weights where the repository's checksums are there."""

import hashlib

import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.source.shards import find_raw_tensors
from kimi_lite.quantize.write.checksums import check_source
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "model"
    make_checkpoint(folder, "kimi_int4", num_layers=2)
    return folder


@pytest.fixture
def shard(checkpoint):
    """The first shard; put back as it was when the test is over."""
    file = min(checkpoint.glob("*.safetensors"))
    content = file.read_bytes()
    yield file
    file.write_bytes(content)


def header_bytes(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flip(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_flipped_bit_in_a_header_changes_nothing_silently(checkpoint, shard):
    """It is an error when the folder is opened, or the same tensors are found (a bit of the unused "format")."""
    content, before = shard.read_bytes(), find_raw_tensors(checkpoint)
    bits = np.random.default_rng(0).integers(0, 8 * header_bytes(content), 250)
    num_found = 0
    for bit in (*range(0, 64, 5), *map(int, bits)):
        shard.write_bytes(flip(content, bit))
        try:
            open_model(checkpoint)
            assert find_raw_tensors(checkpoint) == before, bit
        except KimiLiteError:
            num_found += 1
    assert num_found > 250


def test_a_scale_that_became_infinite_is_named(checkpoint, shard, tmp_path):
    scales = [t for t in find_raw_tensors(checkpoint).values() if t.name.endswith(".weight_scale") and t.file == shard]
    content = bytearray(shard.read_bytes())
    content[scales[0].offset : scales[0].offset + 2] = b"\x80\x7f"  # infinity in bfloat16
    shard.write_bytes(content)
    with pytest.raises(KimiLiteError, match=r"blk\.1\.ffn_\w+_exps\.weight: A weight is not finite"):
        convert(checkpoint, tmp_path / "out.gguf", "tq1_0")
    assert not list(tmp_path.glob("*.gguf*"))


def state_checksums(checkpoint, how: str) -> None:
    for file in checkpoint.glob("*.safetensors"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if how == "metadata":
            folder = checkpoint / ".cache" / "huggingface" / "download"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{file.name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
        else:
            with (checkpoint / "SHA256SUMS").open("a") as sums:
                sums.write(f"{digest} *{file.name}\n")


@pytest.mark.parametrize("how", ["metadata", "SHA256SUMS"])
def test_a_flipped_bit_in_a_weight_is_found_by_the_repositorys_checksum(checkpoint, shard, tmp_path, how):
    state_checksums(checkpoint, how)
    assert "2 source files" in check_source(checkpoint) and "all checksums equal" in check_source(checkpoint)
    content = shard.read_bytes()
    shard.write_bytes(flip(content, 8 * header_bytes(content) + 12345))
    settings = Settings(checkpoint, tmp_path / "out.gguf", "tq1_0", None, (), None, "45G", False, checks_source=True)
    with pytest.raises(KimiLiteError, match=f"{shard.name} is damaged: need SHA-256"):
        run(settings, lambda name, done, total: None, False, False)
    assert not list(tmp_path.iterdir())


def test_the_shared_cache_names_files_after_their_checksums(checkpoint, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in checkpoint.glob("*.safetensors"):
        blob = tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    assert "all checksums equal" in check_source(snapshot)


def test_without_checksums_it_says_so(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(KimiLiteError, match="No checksum is known for 1 of 1 files"):
        check_source(tmp_path)
    with pytest.raises(KimiLiteError, match=r"has no \.safetensors files"):
        check_source(tmp_path / "missing")
