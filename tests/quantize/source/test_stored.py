"""Stored formats against torch and compressed-tensors, and row ranges that do not fit the blocks."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.source.stored import CodedWeight, Fp8Weight, PlainWeight, e4m3_values, make_weight
from tests.quantize.source.raw import raw_tensor


def test_e4m3_values_equal_torch():
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3_values(), expected, equal_nan=True)
    assert np.array_equal(np.signbit(e4m3_values()[[0, 128]]), [False, True])


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)]
)
def test_plain_floats_equal_torch(tmp_path, dtype, torch_dtype):
    values = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    bits = values.view(torch.int32 if dtype == "F32" else torch.int16).numpy()
    weight = PlainWeight(raw_tensor(tmp_path, "w", dtype, bits))
    assert np.array_equal(weight.read_rows(3, 9), values.float().reshape(10, 33)[3:9].numpy())


@pytest.mark.parametrize("shape", [(300, 200), (128, 128), (1, 257)])
def test_fp8_blocks_equal_torch(tmp_path, shape):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).mul(100).to(torch.float8_e4m3fn)
    factors = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator) + 0.1
    full = factors.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    expected = (codes.float() * full).numpy()
    raw = {
        "w.weight": raw_tensor(tmp_path, "w", "F8_E4M3", codes.view(torch.uint8).numpy()),
        "w.weight_scale_inv": raw_tensor(tmp_path, "s", "F32", factors.numpy()),
    }
    weight = make_weight("w.weight", raw, (128, 128))
    assert isinstance(weight, Fp8Weight)
    start = shape[0] // 3
    assert np.array_equal(weight.read_rows(start, shape[0]), expected[start:])


def test_int4_equals_compressed_tensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (10, 256), generator=generator, dtype=torch.int8)
    scales = torch.rand(10, 8, generator=generator).to(torch.bfloat16)
    packed = pack_to_int32(codes, 4)
    raw = {
        "w.weight_packed": raw_tensor(tmp_path, "p", "I32", packed.numpy()),
        "w.weight_scale": raw_tensor(tmp_path, "s", "BF16", scales.view(torch.int16).numpy()),
    }
    weight = make_weight("w.weight", raw, (128, 128))
    assert isinstance(weight, CodedWeight) and weight.kind == "int4"
    assert (weight.shape, weight.group) == ((10, 256), 32)
    unpacked = unpack_from_int32(packed, 4, torch.Size((10, 256)))
    expected = (unpacked.float().unflatten(1, (8, 32)) * scales.float()[..., None]).flatten(1)
    assert np.array_equal(weight.read_rows(2, 9), expected[2:9].numpy())


def test_int4_word_of_the_published_example(tmp_path):
    packed = raw_tensor(tmp_path, "p", "I32", np.array([[-1075214576]], "<i4"))  # 0xBFE98710
    weight = CodedWeight(packed, raw_tensor(tmp_path, "s", "F32", np.ones((1, 1), "<f4")), 4)
    assert weight.read_rows(0, 1).tolist() == [[-8, -7, -1, 0, 1, 6, 7, 3]]


@pytest.mark.parametrize(
    ("stored", "word"),
    [
        ({"w.weight": ("U8", (2, 2))}, "stored as 'U8'"),
        ({"w.weight": ("I32", (2, 2)), "w.weight_scale": ("F32", (2, 3))}, "not 2-bit codes in groups"),
        ({"w.weight": ("F8_E4M3", (2, 2))}, "without w.weight_scale_inv"),
        ({"w.weight": ("F8_E4M3", (300, 2)), "w.weight_scale_inv": ("F32", (2, 1))}, r"need floats \[3, 1\]"),
        ({"w.weight_packed": ("I32", (2, 4))}, "without its scale"),
        ({"w.weight_packed": ("I32", (2, 4)), "w.weight_scale": ("F32", (2, 5))}, "not 4-bit codes in groups"),
        (
            {
                "w.weight_packed": ("I32", (2, 4)),
                "w.weight_scale": ("F32", (2, 1)),
                "w.weight_zero_point": ("I32", (2, 1)),
            },
            "is int4, and w.weight_zero_point would change it",
        ),
        ({"w.weight": ("F32", (2, 2)), "w.weight_scale": ("F32", (2, 1))}, "is f32, and w.weight_scale would change"),
        ({"w.weight": ("BF16", (2, 2)), "w.weight_scale_inv": ("F32", (1, 1))}, "is bf16, and w.weight_scale_inv"),
        (
            {"w.weight": ("F8_E4M3", (2, 2)), "w.weight_scale_inv": ("F32", (1, 1)), "w.weight_scale": ("F32", (1, 1))},
            "is fp8, and w.weight_scale would",
        ),
        ({"w.weight_scale": ("F32", (2, 1))}, "no weights with them"),
    ],
)
def test_unknown_ways_of_storing_are_refused(tmp_path, stored, word):
    itemsize = {"U8": "u1", "I32": "<i4", "F32": "<f4", "F8_E4M3": "u1", "BF16": "<u2"}
    raw = {
        name: raw_tensor(tmp_path, name, dtype, np.zeros(shape, itemsize[dtype]))
        for name, (dtype, shape) in stored.items()
    }
    with pytest.raises(KimiLiteError, match=word):
        make_weight("w.weight", raw, (128, 128))
