"""The differentiable model: the logits of transformers, of its own files, and of the runtime."""

import numpy as np
import pytest
import torch

from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.tools.train.model import load_model, named_weights, save_checkpoint, save_gguf
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.runner import Runner, relative_error

pytest.importorskip("transformers", reason="the test extra brings transformers")
SMALL = {
    "rms_norm_eps": 1e-6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
}
IDS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 60))


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy().reshape(-1, VOCAB_SIZE)


def our_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy().reshape(-1, VOCAB_SIZE)


@pytest.mark.parametrize("kind", ["kimi", "kimi_int4", "moonlight", "deepseek_v3"])
def test_logits_equal_those_of_transformers(kind, tmp_path):
    """Within 1e-5 relative, read from the checkpoint; the same again by transformers from what was saved."""
    from transformers import AutoModelForCausalLM

    sizes = SMALL if kind != "moonlight" else SMALL | {"q_lora_rank": None}
    reference = make_checkpoint(tmp_path / "source", kind, num_layers=3, **sizes)
    model, want = load_model(tmp_path / "source"), their_logits(reference)
    assert relative_error(our_logits(model), want) < 1e-5
    save_checkpoint(model, tmp_path / "saved", tokenizer=tmp_path / "source")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert relative_error(their_logits(loaded), want) < 1e-5


def test_the_runtime_has_the_same_logits(tmp_path):
    """Saved, converted to F32 by quantize, and run by the kernels."""
    make_checkpoint(tmp_path / "source", "kimi", num_layers=2)
    model = load_model(tmp_path / "source")
    save_checkpoint(model, tmp_path / "saved", tokenizer=tmp_path / "source")
    convert(tmp_path / "saved", tmp_path / "model.gguf", "f32")
    with Runner(tmp_path / "model.gguf") as runner:
        assert relative_error(runner.prefill(IDS[0]), our_logits(model)[: len(IDS[0])]) < 1e-5


def test_a_tokens_gradient_is_bounded_and_no_other_changes(tmp_path):
    """The loss of one token counts a million times as much as the others'; logits stay the same."""
    make_checkpoint(tmp_path / "source", "kimi", num_layers=1, **SMALL)
    model = load_model(tmp_path / "source")
    weight = torch.ones((*IDS.shape, 1))
    weight[1, 7] = 1e6
    lengths, logits, seen = {}, {}, []

    def keep(x: torch.Tensor) -> None:
        x.retain_grad()
        seen.append(x)

    for bound in (0.0, 3.0):
        model.token_clip = bound
        handle = model.blk[0].register_forward_hook(lambda module, inputs, output: keep(output[0]))
        output = model(torch.tensor(IDS)).logits
        (output.square() * weight).sum().backward()
        handle.remove()
        logits[bound], lengths[bound] = output.detach(), seen[-1].grad.norm(dim=-1)
    assert torch.equal(*logits.values())
    limit = 3 * lengths[0.0].median()
    assert lengths[0.0].max() > 1e4 * limit
    assert torch.allclose(lengths[3.0], lengths[0.0].clamp(max=limit), rtol=1e-4)


def test_files_keep_every_bit(tmp_path):
    make_checkpoint(tmp_path / "source", "kimi", num_layers=2, **SMALL)
    model = load_model(tmp_path / "source")
    save_checkpoint(model, tmp_path / "saved", tokenizer=tmp_path / "source")
    save_gguf(model, tmp_path / "model.gguf", open_model(tmp_path / "saved").make_metadata(BY_NAME["F32"]))
    for path in ("saved", "model.gguf"):
        again = load_model(tmp_path / path)
        rope = again.config.rope
        assert rope.factor == model.config.rope.factor and rope.log_multiplier == pytest.approx(0.1)
        assert again.config.table.num_weights(again.config, "routed") == model.config.routed_parameters
        for (name, weight), (_, other) in zip(named_weights(model), named_weights(again), strict=True):
            assert torch.equal(weight, other), name
