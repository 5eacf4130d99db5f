"""Codes that are kept: INT4 in Q4_0, the 2-bit GSQ layout in Q2_0; and GSQ read as floats."""

import json

import gguf
import numpy as np
import pytest
from compressed_tensors.compressors import pack_to_int32
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe
from kimi_lite.quantize.source.repack import kept_type, repack_rows
from kimi_lite.quantize.source.stored import CodedWeight, make_weight
from tests.checkpoints import make_checkpoint
from tests.quantize.source.raw import raw_tensor

CONFIG = {"quant_method": "humming", "b_dtype": "uint2", "weight_scale_group_size": 128, "has_zero_point": False}


def pack(codes: np.ndarray) -> np.ndarray:
    """Integers -2..1 (N, M) to int32 words, written from the release's own description: 16 a word, lowest bits
    first."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 16), np.uint32)
    for column in range(codes.shape[1]):
        words[:, column // 16] |= (codes[:, column] + 2).astype(np.uint32) << (2 * (column % 16))
    return words.view(np.int32)


def test_rows_and_blocks_are_exact(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(-2, 2, (6, 256))
    scales = (rng.standard_normal((6, 2)).astype(np.float32).view(np.uint32) >> 16).astype(
        "<u2"
    )  # bfloat16 bits, both signs
    packed = raw_tensor(tmp_path, "packed", "I32", pack(codes))
    weight = CodedWeight(packed, raw_tensor(tmp_path, "scales", "BF16", scales), 2)
    expected = codes * np.repeat((scales.astype("<u4") << 16).view("<f4"), 128, axis=1)
    assert kept_type([weight]) == "Q2_0"
    assert np.array_equal(weight.read_rows(0, 6), expected.astype(np.float32))
    assert np.array_equal(dequantize(repack_rows(weight, "Q2_0", 1, 5), "Q2_0"), expected[1:5].astype(np.float32))


def test_int4_becomes_q4_0_without_loss(tmp_path):
    import torch

    rng = np.random.default_rng(4)
    codes = rng.integers(-8, 8, (6, 128)).astype(np.int8)
    scales = torch.from_numpy(rng.uniform(2**-16, 4, (6, 4)).astype(np.float32)).to(torch.bfloat16)
    scales[0, 0], scales[1, 1] = 2.0**-17, -0.5
    packed = raw_tensor(tmp_path, "packed", "I32", pack_to_int32(torch.from_numpy(codes), 4).numpy())
    weight = CodedWeight(
        packed, raw_tensor(tmp_path, "scales", "BF16", scales.view(torch.int16).numpy().view("<u2")), 4
    )
    blocks = repack_rows(weight, "Q4_0", 1, 6)
    expected = codes.reshape(6, 4, 32) * scales.float().numpy()[..., None]
    assert kept_type([weight]) == "Q4_0"
    assert np.array_equal(gguf.quants.dequantize(blocks, GGMLQuantizationType.Q4_0), expected.reshape(6, 128)[1:])
    assert np.array_equal(weight.read_rows(0, 6), expected.reshape(6, 128))


def make_gsq(folder, source) -> dict[str, np.ndarray]:
    """A folder like the release: experts of `source` as 2-bit codes; returns what they stand for by tensor name."""
    import torch

    folder.mkdir()
    tensors, expected = {}, {}
    for file in source.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if ".experts." not in name:
                tensors[name] = weight
                continue
            groups = weight.float().unflatten(-1, (-1, 128))
            scales = groups.abs().mean(-1).to(torch.bfloat16)
            codes = (groups / scales.float()[..., None]).round().clamp(-2, 1)
            expected[name] = (codes * scales.float()[..., None]).flatten(-2).numpy()
            tensors[name] = torch.from_numpy(pack(codes.flatten(-2).numpy().astype(int)))
            tensors[f"{name}_scale"] = scales
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tiktoken.model", "tokenizer_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    return expected


def test_the_release_is_kept_without_loss(tmp_path):
    make_checkpoint(tmp_path / "hf", "kimi")
    expected = make_gsq(tmp_path / "gsq", tmp_path / "hf")
    report = convert(tmp_path / "gsq", tmp_path / "out.gguf", find_recipe("q2_0"))
    view = GGUFStore.open(report.path).tensors["blk.2.ffn_down_exps.weight"]
    stacked = np.stack([expected[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] for e in range(8)])
    assert view.layout.name == "Q2_0"
    assert np.array_equal(
        dequantize(view.data.reshape(-1, view.data.shape[-1]), "Q2_0").reshape(stacked.shape), stacked
    )
    assert not [note for note in report.notes if "quantized in the source" in note]
    lossy = convert(tmp_path / "gsq", tmp_path / "lossy.gguf", find_recipe("tq1_0"))
    assert [note for note in lossy.notes if "(int2)" in note]


def test_integers_without_scales_are_refused(tmp_path):
    raw = {"x.weight": raw_tensor(tmp_path, "x.weight", "I32", np.zeros((4, 8), np.int32))}
    with pytest.raises(KimiLiteError, match=r"packed in I32 .* without its scale"):
        make_weight("x.weight", raw, (128, 128))
