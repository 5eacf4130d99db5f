"""Our F32 forward pass against `transformers` on random checkpoints of the whole family, converted by our quantizer."""

from dataclasses import replace

import numpy as np
import pytest

from kimi_lite.options import Options
from kimi_lite.quantize.convert import convert
from tests.model.runner import Runner, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="the test extra brings transformers")

from tests.checkpoints import KINDS, VOCAB_SIZE, make_checkpoint  # noqa: E402

NUM_TOKENS = 256


def reference_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids[None].astype(np.int64))).logits[0].float().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, tmp_path):
    """1e-4 relative and the same argmax at every one of 256 positions, as a prompt and token by token."""
    model = make_checkpoint(tmp_path / "source", kind)
    convert(tmp_path / "source", tmp_path / "model.gguf", "f32")
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, NUM_TOKENS)
    want = reference_logits(model, ids)
    with Runner(tmp_path / "model.gguf") as runner:
        for have in (runner.prefill(ids), runner.decode(ids)):
            assert relative_error(have, want) < 1e-4
            assert (have.argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize(
    "shape", [{"num_attention_heads": 9, "num_key_value_heads": 9, "v_head_dim": 64}, {"n_shared_experts": 3}]
)
def test_other_shapes(shape, tmp_path):
    """Heads that are no multiple of a tile, shared experts that are cut into several."""
    model = make_checkpoint(tmp_path / "source", "kimi", num_layers=2, **shape)
    convert(tmp_path / "source", tmp_path / "model.gguf", "f32")
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, 100)
    want = reference_logits(model, ids)
    with Runner(tmp_path / "model.gguf") as runner:
        assert relative_error(runner.prefill(ids), want) < 1e-4
        assert relative_error(runner.decode(ids[:40]), want[:40]) < 1e-4


def test_older_files_with_joined_matrices(tmp_path):
    """attn_kv_b instead of attn_k_b and attn_v_b, ffn_gate_up_exps instead of two tensors: the same logits."""
    make_checkpoint(tmp_path / "source", "kimi", num_layers=2)
    convert(tmp_path / "source", tmp_path / "model.gguf", "f32")
    ids = np.random.default_rng(2).integers(0, VOCAB_SIZE, 64)
    with Runner(tmp_path / "model.gguf") as runner:
        want, tensors = runner.prefill(ids), dict(runner.store.tensors)
        heads = runner.config.num_heads
        for layer in range(runner.config.num_layers):
            join_key_and_value(tensors, f"blk.{layer}", heads)
            join_gate_and_up(tensors, f"blk.{layer}")
        runner.store.tensors = tensors
        runner.transformer.close()
        runner.transformer = type(runner.transformer)(runner.store, runner.config, runner.kv, Options(num_threads=2))
        assert relative_error(runner.prefill(ids), want) < 1e-6


def join_key_and_value(tensors: dict, block: str, heads: int) -> None:
    k = tensors.pop(f"{block}.attn_k_b.weight")
    v = tensors.pop(f"{block}.attn_v_b.weight")
    keys = k.data.view(np.float32).transpose(0, 2, 1)  # (heads, nope, kv_lora)
    joint = np.concatenate([keys, v.data.view(np.float32)], axis=1).reshape(-1, keys.shape[-1])
    name = f"{block}.attn_kv_b.weight"
    tensors[name] = replace(k, name=name, shape=joint.shape, data=np.ascontiguousarray(joint).view(np.uint8))


def join_gate_and_up(tensors: dict, block: str) -> None:
    if f"{block}.ffn_gate_exps.weight" not in tensors:
        return
    gate, up = tensors.pop(f"{block}.ffn_gate_exps.weight"), tensors.pop(f"{block}.ffn_up_exps.weight")
    data = np.concatenate([gate.data, up.data], axis=1)
    name = f"{block}.ffn_gate_up_exps.weight"
    shape = (gate.shape[0], 2 * gate.shape[1], gate.shape[2])
    tensors[name] = replace(gate, name=name, shape=shape, data=data)
