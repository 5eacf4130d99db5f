"""Low-bit training sees what a file will hold, and lowers the divergence from the unquantized model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.engine.scoring import TEXT
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.quantize.codecs import find_layout
from kimi_lite.quantize.convert import convert
from kimi_lite.tools.train.data import write_tokenizer
from kimi_lite.tools.train.lowbit import LowBit, divergence, is_expert, round_to, within_cells
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


@pytest.mark.parametrize("trained", ["experts", "rest"])
def test_distillation_lowers_the_divergence_from_the_teacher(source, tmp_path, trained):
    """What is not trained stays as it was, experts as the file has them that they come from; the balance always."""
    convert(source, tmp_path / "encoded.gguf", "q2_0")
    wanted = Settings(
        model=str(source), texts=(str(TEXT),), num_steps=40, batch_size=4, length=32, lr=2e-3, warmup_steps=3,
        weight_decay=0.0, trained=trained, low_bit="q2_0", teacher=str(source), held_out_batches=2, is_bf16=False,
        calibrated=str(tmp_path / "encoded.gguf") if trained == "rest" else "",
    )  # fmt: skip
    run = Run.open(tmp_path / "run", wanted)
    before = run.held_out_loss()
    run.train(until=20)
    run = Run.open(tmp_path / "run", wanted)
    run.train()
    steps = list(read_metrics(tmp_path / "run"))
    assert steps[-1].held_out == pytest.approx(run.held_out_loss(), rel=1e-5)
    assert run.held_out_loss() < 0.9 * before
    after, start = load_model(tmp_path / "run/model"), load_model(source)
    encoded = dict(load_model(tmp_path / "encoded.gguf").named_parameters())
    for (name, weight), old in zip(after.named_parameters(), start.parameters(), strict=True):
        given = encoded[name] if trained == "rest" and is_expert(name) else old
        assert torch.equal(weight, given) == (is_expert(name) == (trained == "rest")), name
    for (name, bias), old in zip(after.named_buffers(), start.buffers(), strict=True):
        assert torch.equal(bias, old), name


@given(tokens=st.integers(1, 20), words=st.integers(2, 40), seed=st.integers(0, 2**16), size=st.floats(0.1, 30))
def test_divergence_and_its_gradient_are_torchs(tokens, words, seed, size):
    """More tokens than are in the cache at once, and logits so far apart that one word has all."""
    wanted, ours = torch.randn(2, 2, tokens, words, generator=torch.Generator().manual_seed(seed)) * size
    found, theirs = (ours.clone().requires_grad_() for _ in range(2))
    divergence(wanted, found).backward()
    flat = theirs.log_softmax(-1).flatten(0, 1), wanted.log_softmax(-1).flatten(0, 1)
    want = torch.nn.functional.kl_div(*flat, log_target=True, reduction="batchmean")
    want.backward()
    assert float(divergence(wanted, ours)) == pytest.approx(float(want.detach()), rel=1e-4, abs=1e-6)
    assert torch.allclose(found.grad, theirs.grad, atol=1e-6)
    assert float(divergence(ours, ours)) == pytest.approx(0, abs=1e-7)


def test_what_is_fixed_gives_the_same_in_the_precision_of_products():
    """Held as bfloat16 once, or converted in every product."""
    model = Model(CONFIG).initialize(0)
    for name, weight in model.named_parameters():
        weight.requires_grad_(is_expert(name))
    results = []
    for low_bit in (LowBit.of(model, "q2_0"), LowBit.of(model, "q2_0", torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            output = low_bit.forward(IDS, low_bit.rounded())
        output.logits.float().square().mean().backward()
        results.append((output.logits, [weight.grad for weight in model.parameters() if weight.requires_grad]))
        model.zero_grad(set_to_none=True)
    assert len(low_bit.fixed) > 10 and all(weight.dtype == torch.bfloat16 for weight in low_bit.fixed.values())
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@given(
    kind=st.sampled_from(["tq1_0", "tq2_0", "q2_0"]), seed=st.integers(0, 2**16), spread=st.floats(0.0, 3.0),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_training_begins_where_the_experts_of_a_file_are(kind, seed, spread, scale):
    """Numbers near to the unquantized ones that round to those of a file, however far its encoder went from them."""
    layout, generator = find_layout(kind), torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 8, 256, generator=generator) * scale
    fed_back = weight + torch.randn(4, 8, 256, generator=generator) * spread * scale
    encoded = round_to(layout, fed_back)
    start = within_cells(layout, weight, encoded)
    error = (round_to(layout, start) - encoded).square().mean() / encoded.square().mean()
    assert error < 1e-4
    assert (start - weight).square().mean() <= (encoded - weight).square().mean()


def test_a_run_begins_with_the_experts_of_a_file(source, tmp_path):
    convert(source, tmp_path / "encoded.gguf", "q2_0")
    wanted = Settings(
        model=str(source), texts=(str(TEXT),), num_steps=1, batch_size=2, length=16, trained="experts",
        low_bit="q2_0", calibrated=str(tmp_path / "encoded.gguf"), teacher=str(source),
    )  # fmt: skip
    run = Run.open(tmp_path / "run", wanted)
    start, encoded = dict(load_model(source).named_parameters()), load_model(tmp_path / "encoded.gguf")
    for name, weight in encoded.named_parameters():
        if is_expert(name):
            begun = dict(run.model.named_parameters())[name]
            assert torch.equal(begun, within_cells(run.low_bit.layout, start[name], weight))
    with pytest.raises(KimiLiteError, match="--low-bit"):
        Run.open(tmp_path / "other", replace(wanted, low_bit=""))


def test_types_that_do_not_fit_are_refused():
    with pytest.raises(KimiLiteError, match="rows of 64, and TQ1_0 has blocks of 256"):
        LowBit.of(Model(CONFIG), "tq1_0")
