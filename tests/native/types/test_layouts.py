"""Block layouts against gguf's table, and the reference decoders against gguf's and ggml's, bit for bit."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest

from kimi_lite.native.layouts import BY_NAME, LAYOUTS
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import REGIMES, hostile_rows
from tests.native.types.ik_oracle import IK_TYPES

WITHOUT_GGUF_DECODER = {"Q1_0", "Q2_0", "LITE2_128", *IK_TYPES}


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"Q2_0", "LITE2_128", *IK_TYPES}))
def test_sizes_are_ggufs(name):
    layout = BY_NAME[name]
    assert LAYOUTS[layout.ggml_id] is layout
    kind = gguf.GGMLQuantizationType(layout.ggml_id)
    assert kind.name == name
    assert gguf.GGML_QUANT_SIZES[kind] == (layout.block_size, layout.block_bytes)


def test_every_quantized_type_that_files_hold_is_drawn():
    never_in_files = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    assert {kind.name for kind in gguf.GGMLQuantizationType} - never_in_files <= BY_NAME.keys()


def test_rows():
    assert BY_NAME["Q8_0"].row_bytes(576) == 18 * 34
    assert BY_NAME["TQ1_0"].bits_per_weight == 1.6875
    assert BY_NAME["IQ2_KS"].row_bytes(7168) == 2 + 28 * 70 and BY_NAME["IQ2_KS"].row_weights(1962) == 7168
    with pytest.raises(AssertionError, match="Q8_0"):
        BY_NAME["Q8_0"].row_bytes(40)


@pytest.mark.parametrize("name", BY_NAME)
def test_weights_of_a_row(name):
    """The inverse of its bytes, whatever stands in front of the row."""
    layout = BY_NAME[name]
    for num_blocks in (1, 3, 28):
        assert layout.row_weights(layout.row_bytes(num_blocks * layout.block_size)) == num_blocks * layout.block_size


def rows_of(name, regime):
    return hostile_rows(name, 5, 4 * max(16, BY_NAME[name].block_size), np.random.default_rng(1), regime)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - WITHOUT_GGUF_DECODER))
def test_decoders_agree_with_gguf(name, regime):
    data = rows_of(name, regime)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert np.array_equal(dequantize(data, name), expected)


class _Traits(ctypes.Structure):
    """ggml.h `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


def ggml_traits(name):
    package = importlib.util.find_spec("llama_cpp")
    files = [
        f
        for place in (package.submodule_search_locations if package else [])
        for f in Path(place, "lib").glob("*ggml-base.so")
    ]
    if not files:
        pytest.skip("needs the ggml extra on Linux")
    function = ctypes.CDLL(str(files[0])).ggml_get_type_traits
    function.restype, function.argtypes = ctypes.POINTER(_Traits), [ctypes.c_int]
    return function(BY_NAME[name].ggml_id).contents


@pytest.mark.parametrize("name", ["Q1_0", "Q8_0", "Q6_K", "IQ3_S"])
def test_decoders_agree_with_ggml(name):
    """One that gguf cannot decode, and three that show that this test can."""
    traits = ggml_traits(name)
    assert (traits.type_name.decode().upper(), traits.block_size) == (name, BY_NAME[name].block_size)
    data = rows_of(name, "normal")
    expected = np.empty(dequantize(data, name).shape, np.float32)
    traits.to_float(data.ctypes.data, expected.ctypes.data, expected.size)
    assert np.array_equal(dequantize(data, name), expected)


def test_q2_0_by_hand():
    """Newer than both packages. Four neighbours a byte, lowest bits first; codes 0..3 are -1, 0, 1, 2 times d."""
    assert (BY_NAME["Q2_0"].ggml_id, BY_NAME["Q2_0"].block_size, BY_NAME["Q2_0"].block_bytes) == (42, 64, 18)
    block = np.zeros(1, BY_NAME["Q2_0"].dtype)
    block["d"], block["qs"][0, 0], block["qs"][0, 15] = 0.5, 0b11_10_01_00, 0b00_00_00_11
    values = dequantize(block.view(np.uint8).reshape(1, -1), "Q2_0")[0]
    assert values[:4].tolist() == [-0.5, 0, 0.5, 1]
    assert values[60:].tolist() == [1, -0.5, -0.5, -0.5]
    assert (values[4:60] == -0.5).all()


def test_lite2_128_is_ours_and_by_hand():
    """Q2_0's bytes with one scale for two of its blocks, under a number that no program gives out."""
    layout = BY_NAME["LITE2_128"]
    assert (layout.block_size, layout.block_bytes, layout.bits_per_weight) == (128, 34, 2.125)
    assert layout.is_own and not layout.is_ik
    rows = hostile_rows("LITE2_128", 3, 512, np.random.default_rng(0), "normal")
    blocks = rows.reshape(-1, 34)
    halves = np.stack([np.concatenate([blocks[:, :2], blocks[:, first : first + 16]], axis=1) for first in (2, 18)], 1)
    assert np.array_equal(dequantize(rows, "LITE2_128"), dequantize(halves.reshape(3, -1), "Q2_0"))
