"""Dense weights on the device: encoders next to ggml's, and the bytes that the plan counted for every type and file."""

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.sizes import store_sizes
from kimi_lite.arch.tensors import open_model
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.hybrid import weights as weights_module
from kimi_lite.model.hybrid.encode import encode
from kimi_lite.model.hybrid.weights import DenseWeights
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize
from kimi_lite.options import DENSE_TYPES
from kimi_lite.quantize.codecs import encode as encode_on_cpu
from kimi_lite.quantize.codecs import ggml
from tests.model.hybrid.runner import HybridRunner
from tests.model.hybrid.stand_in import StandInKernels
from tests.tiny import write_tiny_gguf

ENCODED = ("Q8_0", "Q6_K", "Q4_K")


def weights_of_a_kind(kind: str, rng: np.random.Generator, rows: int = 24, k: int = 512) -> np.ndarray:
    """float32 (rows, k), as matrices have them: Gaussian, with heavy tails, off zero, mostly zero, of every size."""
    x = rng.standard_normal((rows, k)).astype(np.float32) * np.float32(0.02)
    if kind == "heavy":
        x = x**3 * 1000
    elif kind == "offset":
        x += 0.05
    elif kind == "sparse":
        x *= rng.random(x.shape) < 0.05
    elif kind == "sizes":
        x *= (10.0 ** rng.integers(-4, 4, (rows, 1))).astype(np.float32)
    return x


def relative_error(values: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(((values - want) ** 2).mean() / (want**2).mean()))


@pytest.mark.parametrize("kind", ["normal", "heavy", "offset", "sparse", "sizes"])
@pytest.mark.parametrize("type_name", ENCODED)
def test_errors_are_those_of_ggmls_encoder(type_name, kind):
    pytest.importorskip("llama_cpp", reason="ggml's encoder")
    x = weights_of_a_kind(kind, np.random.default_rng(1))
    ours, theirs = encode(torch.from_numpy(x), type_name, "w").numpy(), ggml.encode(BY_NAME[type_name], x)
    errors = [relative_error(dequantize(data, type_name), x) for data in (ours, theirs)]
    assert errors[0] <= 1.02 * errors[1]
    assert type_name != "Q8_0" or np.array_equal(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(ENCODED), st.floats(-30, 4), st.booleans())
def test_what_was_encoded_is_near(seed, type_name, exponent, has_constant_rows):
    """Weights of any size: no block is further off than its type allows, zeros stay zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 512)).astype(np.float32) * np.float32(10**exponent)
    x[1] = x[1, 0] if has_constant_rows else 0
    found = dequantize(encode(torch.from_numpy(x), type_name, "w").numpy(), type_name)
    assert np.isfinite(found).all()
    step = {"Q8_0": 2 / 127, "Q6_K": 2 / 31, "Q4_K": 2 / 15}[type_name]
    blocks, errors = (each.reshape(-1, 256) for each in (x, found - x))
    tiny = 127 * 63 * 2.0**-24  # what float16 scales round away
    assert (np.abs(errors).max(axis=1) <= step * np.abs(blocks).max(axis=1) + tiny).all()
    assert not found[1].any() or has_constant_rows


def test_q8_0_on_the_device_is_llama_cpps():
    """The quantizer's bytes, for weights of every size, zeros and halves that must be rounded away from zero."""
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((8, 96)) * 10.0 ** rng.integers(-6, 4, (8, 1))).astype(np.float32)
    rows[3, :32], rows[4, :32] = 0, np.arange(-16, 16) + 0.5
    rows[4, 0] = 127
    have = encode(torch.from_numpy(rows), "Q8_0", "w").numpy()
    assert np.array_equal(have, encode_on_cpu(BY_NAME["Q8_0"], rows))


@pytest.mark.parametrize("type_name", ENCODED)
def test_weights_that_the_type_cannot_hold(type_name):
    with pytest.raises(KimiLiteError, match=rf"Tensor w .* {type_name} cannot hold"):
        encode(torch.full((1, 256), -1e9), type_name, "w")


FILES = {
    "floats": {},
    "two bits": {"attn_": "IQ2_XXS", "ffn_": "IQ2_XXS", "output": "IQ2_XXS", "_norm": "F32", "ffn_gate_inp": "F32"},
    "gate is not up": {"ffn_gate": "Q2_K", "ffn_up": "Q5_K", "ffn_gate_inp": "F32", "shexp": "Q8_0"},
    "of 8 and 4 bits": {"attn_": "Q8_0", "ffn_": "Q4_K", "output": "Q6_K", "_norm": "F32", "ffn_gate_inp": "BF16"},
}
WIDE = {
    "v_head_dim": 64,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "feed_forward_size": 256,
    "expert_feed_forward_size": 256,
}


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_the_loader_takes_what_the_plan_counts(tmp_path, name, is_joined):
    """By the last byte, for every type: layers, head, norms, heads that are cut out of a joint matrix."""
    types = {"_exps": "Q8_0"} | FILES[name]
    shape = WIDE | {"num_layers": 2, "is_kv_b_joined": is_joined}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), types=types, **shape)
    store, config = open_model(path)
    sizes = store_sizes(store, config)
    for dense_type in DENSE_TYPES:
        with HybridRunner(path, dense_type=dense_type) as runner:
            loaded = runner.transformer
            vectors = sum(4 * v.data.size // v.layout.row_bytes(1) for v in store.tensors.values() if len(v.shape) == 1)
            narrowed = sum(  # routers that bfloat16 says exactly
                v.num_bytes - layer.router.ffn_gate_inp.data.nbytes
                for layer in loaded.layers
                if layer.router
                for v in [store.tensors[f"blk.{layer.number}.ffn_gate_inp.weight"]]
            )
            assert loaded.dense_bytes + vectors + narrowed == sizes.gpu[dense_type].num_bytes, dense_type
    for finer, coarser in pairwise(("bf16", "q8_0", "q6_k", "q4_k")):
        assert sizes.gpu[coarser].num_bytes <= sizes.gpu[finer].num_bytes


@pytest.mark.parametrize("dense_type", ["q8_0", "q6_k", "q4_k", "bf16", "file"])
def test_dense_weights(tmp_path, dense_type):
    """Each type as it is or encoded anew, a few rows at a time; several matrices as one."""
    types = {"_exps": "Q8_0", "attn_output": "Q4_0"}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), types=types)
    store = GGUFStore.open(path)
    weights = DenseWeights(store, GpuStreams("cpu"), StandInKernels(), dense_type)
    names = [f"blk.0.ffn_{part}.weight" for part in ("gate", "up")]
    with patch.object(weights_module, "_ENCODED_WEIGHTS", 5 * 256):
        matrix = weights.matrix(*names)
    kept = {"bf16": "BF16", "file": "F32"}.get(dense_type, dense_type.upper())
    assert matrix.layout_name == kept and matrix.data.shape[0] == 256
    want = np.concatenate([store.tensor(name).data.view(np.float32) for name in names])
    most = {"Q6_K": 0.04, "Q4_K": 0.14}.get(kept, 2e-2)
    assert np.abs(dequantize(matrix.data.numpy(), kept) - want).max() < most * np.abs(want).max()
    low = weights.matrix("blk.0.attn_output.weight")  # rows of 128: whole blocks of Q4_0 and Q8_0 alone
    assert low.layout_name == ("BF16" if dense_type == "bf16" else "Q4_0")
    assert weights.num_bytes == matrix.data.nbytes + low.data.nbytes


@pytest.mark.parametrize("dense_type", ["q6_k", "q4_k"])
def test_a_model_with_encoded_weights_is_near_the_file(tmp_path, dense_type):
    """The whole path in the coarser types: logits as near as the types are."""
    shape = WIDE | {"num_layers": 2, "num_dense_layers": 2}  # no router that another rounding would send elsewhere
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), **shape)
    ids = np.random.default_rng(1).integers(0, 250, 40)
    logits = []
    for kind in ("file", dense_type):
        with HybridRunner(path, dense_type=kind) as runner:
            logits.append(runner.prefill(ids))
    errors = np.linalg.norm(logits[1] - logits[0], axis=1) / np.linalg.norm(logits[0], axis=1)
    assert 1e-4 < np.median(errors) < {"q6_k": 0.1, "q4_k": 0.35}[dense_type]
