"""Low-bit training sees what a file will hold, and lowers the divergence from the unquantized model."""

from dataclasses import replace

import pytest
import torch

from kimi_lite.engine.scoring import TEXT
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.quantize.convert import convert
from kimi_lite.tools.train.data import write_tokenizer
from kimi_lite.tools.train.lowbit import LowBit, divergence, is_expert
from kimi_lite.tools.train.model import Model, load_model, save_checkpoint
from kimi_lite.tools.train.train import Run, Settings, read_metrics
from tests.tools.train.small import SMALL

CONFIG = replace(SMALL, hidden_size=64, expert_feed_forward_size=64, vocab_size=600)
IDS = torch.arange(40).view(2, 20) * 7 % 600


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose experts matter."""
    folder = tmp_path_factory.mktemp("model")
    model = Model(CONFIG).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    write_tokenizer(folder, [TEXT], 600)
    save_checkpoint(model, folder)
    return folder


def test_the_gradient_passes_the_rounding():
    """Equal to that of a model whose experts are the rounded ones, and no other weights are rounded."""
    model = Model(CONFIG).initialize(0)
    low_bit = LowBit.of(model, "q2_0")
    rounded = low_bit.rounded()
    assert set(rounded) == {name for name, _ in model.named_parameters() if is_expert(name)} and len(rounded) == 6
    low_bit.forward(IDS, rounded).logits.square().mean().backward()
    other = Model(CONFIG).initialize(0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(rounded.get(name, parameter))
    other(IDS).logits.square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert not torch.equal(model.blk[1].ffn_up_exps, other.blk[1].ffn_up_exps)


@pytest.mark.parametrize("kind", ["q2_0", "q8_0"])
def test_quantize_writes_what_was_trained_with(source, tmp_path, kind):
    low_bit = LowBit.of(load_model(source), kind)
    convert(source, tmp_path / "model.gguf", kind)
    store = GGUFStore.open(tmp_path / "model.gguf")
    for name, rounded in low_bit.rounded().items():
        data = store.tensors[f"{name}.weight"].data
        stored = dequantize(data.reshape(-1, data.shape[-1]), kind.upper())
        assert torch.equal(torch.from_numpy(stored).view_as(rounded), rounded), name


def test_distillation_lowers_the_divergence_from_the_teacher(source, tmp_path):
    """Experts alone are trained; everything else stays as it was."""
    wanted = Settings(
        model=str(source), texts=(str(TEXT),), num_steps=40, batch_size=4, length=32, lr=2e-3, warmup_steps=3,
        weight_decay=0.0, trained="experts", low_bit="q2_0", teacher=str(source), held_out_batches=2,
        is_bf16=False,
    )  # fmt: skip
    run = Run.open(tmp_path / "run", wanted)
    before = run.held_out_loss()
    run.train()
    steps = list(read_metrics(tmp_path / "run"))
    assert steps[-1].held_out == pytest.approx(run.held_out_loss(), rel=1e-5)
    assert run.held_out_loss() < 0.9 * before
    trained, start = load_model(tmp_path / "run/model"), load_model(source)
    for (name, weight), old in zip(trained.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(weight, old) != is_expert(name), name


def test_divergence_is_torchs():
    a, b = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")
    assert divergence(a, b) == pytest.approx(float(want), rel=1e-5)
    assert float(divergence(a, a)) == 0


def test_types_that_do_not_fit_are_refused():
    with pytest.raises(KimiLiteError, match="rows of 64, and TQ1_0 has blocks of 256"):
        LowBit.of(Model(CONFIG), "tq1_0")
