"""Opening good models: what the store shows must be what the `gguf` package's reader sees, and what was written."""

import struct
import time

import gguf
import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import LAYOUTS
from tests.gguf.gguf_bytes import GGUFBytes, array_key, key, tensor, text
from tests.tiny import write_tiny_gguf

SMALL = {"num_layers": 2, "hidden_size": 64, "num_experts": 4, "expert_feed_forward_size": 32, "feed_forward_size": 64}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_same_tensors_as_the_gguf_package(tmp_path, rng):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", rng, types={"_exps": "Q8_0", "ffn_up": "Q4_K", "attn_output": "F16"})
    store, reader = GGUFStore.open(path), gguf.GGUFReader(path)
    assert list(store.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        ours = store.tensors[theirs.name]
        assert ours.layout.ggml_id == theirs.tensor_type
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.data.shape == (*ours.shape[:-1], ours.layout.row_bytes(ours.shape[-1]))
        assert ours.num_bytes == theirs.n_bytes
        np.testing.assert_array_equal(ours.data.ravel(), theirs.data.view(np.uint8).ravel())
    assert store.total_bytes == sum(tensor.n_bytes for tensor in reader.tensors)
    assert store.path == path
    assert store.shards == (path,)


@pytest.mark.parametrize("ggml_id", LAYOUTS)
def test_every_layout_comes_back_byte_for_byte(tmp_path, rng, ggml_id):
    layout = LAYOUTS[ggml_id]
    num_weights = 2 * layout.block_size
    raw = rng.integers(0, 256, (3, 5, layout.row_bytes(num_weights)), np.uint8)
    path = tmp_path / "one.gguf"
    path.write_bytes(GGUFBytes(tensors=[tensor("w", [num_weights, 5, 3], ggml_id)], data=raw.tobytes()).build())
    view = GGUFStore.open(path).tensor("w")
    assert (view.layout, view.shape) == (layout, (3, 5, num_weights))
    np.testing.assert_array_equal(view.data, raw)


def test_views_are_read_only_and_not_copies(tmp_path, rng):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", rng, **SMALL)
    view = GGUFStore.open(path).tensor("blk.1.ffn_down_exps.weight")
    assert type(view.data) is np.ndarray
    assert view.data.flags.c_contiguous
    assert not view.data.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view.data[0, 0, 0] = 1
    theirs = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == view.name)
    with open(path, "r+b") as file:  # a mapped view shows what happens to the file, a copy would not
        file.seek(theirs.data_offset)
        file.write(b"\xcd\xef")
    assert view.data[0, 0, :2].tolist() == [0xCD, 0xEF]


def test_a_view_outlives_its_store(tmp_path, rng):
    store = GGUFStore.open(write_tiny_gguf(tmp_path / "tiny.gguf", rng, **SMALL))
    view, want = store.tensor("output.weight"), store.tensor("output.weight").data.copy()
    store.close()
    assert not store.tensors
    np.testing.assert_array_equal(view.data, want)


def test_metadata_of_every_type(tmp_path):
    scalars = {0: ("B", 200), 1: ("b", -100), 2: ("H", 60_000), 3: ("h", -30_000), 4: ("I", 1 << 31), 5: ("i",
    -(1 << 30)),
               6: ("f", 0.5), 10: ("Q", 1 << 63), 11: ("q", -(1 << 62)), 12: ("d", 1e-300)}  # fmt: skip
    keys = [key(f"one.{t}", t, struct.pack(f"<{code}", value)) for t, (code, value) in scalars.items()]
    keys += [array_key(f"some.{t}", t, 2, struct.pack(f"<2{code}", value, 1)) for t, (code, value) in scalars.items()]
    keys += [array_key(f"none.{t}", t, 0, b"") for t in (*scalars, 7, 8)]
    keys += [key("flag", 7, b"\x01"), array_key("flags", 7, 3, b"\x01\x00\x01")]
    words = ["Ġthe", "", "日本", "a\nb", "\x00"]
    keys += [key("word", 8, text("naïve 😀")), array_key("words", 8, 5, b"".join(map(text, words)))]
    path = tmp_path / "types.gguf"
    path.write_bytes(GGUFBytes(keys=keys).build())
    metadata = GGUFStore.open(path).metadata
    for t, (code, value) in scalars.items():
        assert metadata[f"one.{t}"] == value
        assert type(metadata[f"one.{t}"]) is type(value)
        assert metadata[f"some.{t}"].tolist() == [value, 1]
        assert metadata[f"some.{t}"].dtype == np.dtype(code)
        assert len(metadata[f"none.{t}"]) == 0
    assert metadata["flag"] is True
    assert metadata["flags"].tolist() == [True, False, True]
    assert (metadata["word"], metadata["words"]) == ("naïve 😀", words)
    with pytest.raises(ValueError, match="read-only"):
        metadata["some.4"][0] = 1
    with pytest.raises(TypeError):
        metadata["new"] = 1


def test_shards_are_one_model(tmp_path):
    whole = GGUFStore.open(write_tiny_gguf(tmp_path / "whole.gguf", np.random.default_rng(7), **SMALL))
    first = write_tiny_gguf(tmp_path / "cut.gguf", np.random.default_rng(7), **SMALL, max_tensors_per_shard=9)
    for path in (first, str(first)):
        cut = GGUFStore.open(path)
        assert [shard.name for shard in cut.shards] == [f"cut-{i:05d}-of-00004.gguf" for i in range(1, 5)]
        assert list(cut.tensors) == list(whole.tensors)
        for name, view in cut.tensors.items():
            np.testing.assert_array_equal(view.data, whole.tensors[name].data)
        assert cut.metadata["tokenizer.ggml.tokens"] == whole.metadata["tokenizer.ggml.tokens"]


def test_first_shard_without_tensors(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deepseek2", split_max_tensors=1, small_first_shard=True)
    for name in ("a.weight", "b.weight"):
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert list(GGUFStore.open(tmp_path).tensors) == ["a.weight", "b.weight"]


def test_a_folder_with_one_model_and_its_companions(tmp_path, rng):
    first = write_tiny_gguf(tmp_path / "cut.gguf", rng, **SMALL, max_tensors_per_shard=9)
    for name in ("mmproj-F16.gguf", "imatrix.gguf", "README.md"):
        (tmp_path / name).write_bytes(b"no model")
    assert GGUFStore.open(tmp_path).path == first


def test_gaps_alignment_and_order_are_free(tmp_path):
    keys = [key("general.alignment", 4, struct.pack("<I", 64))]
    data = np.arange(128, dtype=np.float32)
    tensors = [tensor("late", [8], offset=448), tensor("early", [8], offset=64)]
    path = tmp_path / "gaps.gguf"
    path.write_bytes(GGUFBytes(keys=keys, tensors=tensors, data=data.tobytes(), alignment=64).build())
    store = GGUFStore.open(path)
    assert store.tensor("late").data.view(np.float32).tolist() == list(range(112, 120))
    assert store.tensor("early").data.view(np.float32).tolist() == list(range(16, 24))


def test_a_missing_tensor_names_its_neighbours(tmp_path, rng):
    store = GGUFStore.open(write_tiny_gguf(tmp_path / "tiny.gguf", rng, **SMALL, is_gate_up_fused=True))
    with pytest.raises(KimiLiteError, match=r"'blk\.1\.ffn_gate_exps\.weight' is missing") as error:
        store.tensor("blk.1.ffn_gate_exps.weight")
    assert "blk.1.ffn_gate_up_exps.weight" in error.value.hint


def test_a_header_of_kimis_size_is_quick(tmp_path):
    words = [text(f"Ġtoken{i}") for i in range(163_840)]
    keys = [array_key("tokenizer.ggml.tokens", 8, len(words), b"".join(words)),
            array_key("tokenizer.ggml.merges", 8, len(words), b"".join(words)),
            array_key("tokenizer.ggml.token_type", 5, len(words), bytes(4 * len(words)))]  # fmt: skip
    path = tmp_path / "kimi.gguf"
    path.write_bytes(GGUFBytes(keys=keys).build())
    start_s = time.process_time()
    metadata = GGUFStore.open(path).metadata
    took_s = time.process_time() - start_s
    assert metadata["tokenizer.ggml.merges"][-1] == "Ġtoken163839"
    assert took_s < 2, f"{took_s:.2f} s; 0.2 s on one 2.6 GHz core, the gguf package takes 9 s"
