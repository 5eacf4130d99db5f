"""The vision tower's file: names, shapes and values, and llama.cpp's own vision code run on it beside numpy."""

from contextlib import closing

import gguf
import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.mmproj import mmproj_path, split_axes, write_mmproj
from tests.quantize.source.moonvit import (
    FEED_FORWARD,
    GRID,
    HEADS,
    HIDDEN,
    LAYERS,
    TEXT_HIDDEN,
    encode_image,
    make_weights,
    write_folder,
)
from tests.tiny import write_tiny_gguf

KINDS = ("kimi_k25", "kimi_vl")


@pytest.fixture
def folder(tmp_path, request):
    kind = getattr(request, "param", "kimi_k25")
    weights = make_weights(kind, np.random.default_rng(0))
    write_folder(tmp_path / kind, kind, weights)
    return tmp_path / kind, kind, weights


def read_values(store: GGUFStore, name: str) -> np.ndarray:
    view = store.tensor(name)
    return dequantize(view.data.reshape(-1, view.data.shape[-1]), view.layout.name).reshape(view.shape)


def test_k25_names_shapes_and_values(folder):
    path, _, weights = folder
    report = write_mmproj(path, path / "mmproj.gguf", "f32")
    store = GGUFStore.open(report.path)
    d = HIDDEN
    want = {
        "v.patch_embd.weight": (d, 3, 14, 14),
        "v.position_embd.weight": (GRID, GRID, d),
        "v.blk.1.attn_qkv.weight": (3 * d, d),
        "v.blk.0.ffn_up.weight": (FEED_FORWARD, d),
        "v.blk.0.ln1.bias": (d,),
        "v.post_ln.weight": (d,),
        "mm.input_norm.bias": (d,),
        "mm.1.weight": (4 * d, 4 * d),
        "mm.2.weight": (TEXT_HIDDEN, 4 * d),
    }
    for name, shape in want.items():
        assert store.tensor(name).shape == shape, name
    assert len(store.tensors) == 3 + 12 * LAYERS + 2 + 6
    assert (
        read_values(store, "v.blk.1.ffn_down.weight") == weights["vision_tower.encoder.blocks.1.mlp.fc1.weight"]
    ).all()
    assert (read_values(store, "mm.2.bias") == weights["mm_projector.proj.2.bias"]).all()
    assert report.num_weights == sum(tensor.size for tensor in weights.values())
    metadata = {key: store.metadata[key] for key in store.metadata if not key.startswith("general.")}
    assert metadata["clip.projector_type"] == "kimik25" and metadata["clip.vision.image_max_pixels"] == 3211264
    assert metadata["clip.vision.attention.head_count"] == HEADS and metadata["vision.pos_emb_time"] == 4


def test_axes_are_split_within_heads():
    """Rows 4 j + (0, 1) of a head turn by x and go to its first half, rows 4 j + (2, 3) to its second; values stay."""
    rows = np.arange(3 * 32, dtype=np.float32)[:, None]
    assert list(split_axes(rows, 2)[:16, 0]) == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert list(split_axes(rows, 2)[64:, 0]) == list(range(64, 96))


@pytest.mark.parametrize("type_name", ["bf16", "f16", "q8_0"])
def test_types(folder, type_name):
    path, _, weights = folder
    report = write_mmproj(path, mmproj_path(path / "model.gguf"), type_name)
    assert report.path.name == "mmproj-model.gguf"
    reader = gguf.GGUFReader(report.path)  # a reader that is not ours
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["mm.1.weight"] == types["v.blk.0.attn_qkv.weight"] == type_name.upper()
    assert {
        types[name] for name in ("mm.1.bias", "v.post_ln.weight", "v.position_embd.weight", "v.patch_embd.weight")
    } == {"F32"}
    have = read_values(GGUFStore.open(report.path), "mm.1.weight")
    assert np.abs(have - weights["mm_projector.proj.0.weight"]).max() < 0.02 * np.abs(have).max()


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_llama_cpp_sees_what_the_checkpoint_means(folder, tmp_path):
    path, kind, weights = folder
    pytest.importorskip("llama_cpp.mtmd_cpp")
    from kimi_lite.tools.bench.clip import Clip

    report = write_mmproj(path, path / "mmproj.gguf", "f32")
    text_model = write_tiny_gguf(tmp_path / "text.gguf", np.random.default_rng(1), hidden_size=TEXT_HIDDEN)
    image = np.random.default_rng(2).integers(0, 256, (14 * GRID, 14 * GRID, 3), dtype=np.uint8)
    with closing(Clip(report.path, text_model, 1)) as clip:
        clip.show(image)
        have, want = clip.encode(), encode_image(kind, weights, image)
    assert have.shape == want.shape == (16, TEXT_HIDDEN)
    assert np.linalg.norm(have - want) < 3e-3 * np.linalg.norm(want)


def test_what_does_not_fit_is_refused(folder):
    path, kind, weights = folder
    with pytest.raises(KimiLiteError, match="--mmproj is 'q4_k'"):
        write_mmproj(path, path / "a.gguf", "q4_k")
    write_folder(path, kind, {name: tensor for name, tensor in weights.items() if not name.endswith("pos_emb.weight")})
    with pytest.raises(KimiLiteError, match=r"has no vision_tower.patch_embed.pos_emb.weight"):
        write_mmproj(path, path / "a.gguf", "f16")
    write_folder(path, kind, weights | {"vision_tower.encoder.final_layernorm.bias": np.ones(3, np.float32)})
    with pytest.raises(KimiLiteError, match=r"need 64 values by config.json, have \[3\]"):
        write_mmproj(path, path / "a.gguf", "f16")
    write_folder(path, kind, weights | {"vision_tower.extra": np.ones(3, np.float32)})
    with pytest.raises(KimiLiteError, match="1 vision tensors that kimik25 lacks"):
        write_mmproj(path, path / "a.gguf", "f16")
    write_folder(path, kind, {"language_model.model.norm.weight": np.ones(8, np.float32)})
    with pytest.raises(KimiLiteError, match="has no vision tower"):
        write_mmproj(path, path / "a.gguf", "f16")
    assert not (path / "a.gguf").exists()
