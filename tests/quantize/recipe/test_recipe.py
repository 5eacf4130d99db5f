"""Recipes, exceptions and the dry run's table."""

import importlib.util

import numpy as np
import pytest

from kimi_lite.arch.recipe import group_of
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.quantize.codecs import find_layout, ggml
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe.choose import find_recipe, uniform_recipe, with_overrides, write_recipe
from kimi_lite.quantize.recipe.plan import describe_plan, estimate_seconds, plan_conversion
from kimi_lite.quantize.source.gguf_model import open_gguf_model
from kimi_lite.quantize.write.sharding import plan_shards
from tests.checkpoints import make_checkpoint

NEEDS_EXPERTS = "blk.7.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    make_checkpoint(folder, "kimi_int4")
    return folder


@pytest.fixture
def without_ggml(monkeypatch):
    """As if the ggml extra were not installed."""
    ggml._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    yield
    ggml._library.cache_clear()


@pytest.mark.parametrize(
    ("name", "shape", "group"),
    [
        ("blk.7.ffn_down_exps.weight", (8, 256, 256), "routed experts"),
        ("blk.7.ffn_down_shexp.weight", (256, 256), "shared+dense+embed"),
        ("blk.0.ffn_gate.weight", (256, 256), "shared+dense+embed"),
        ("token_embd.weight", (512, 256), "shared+dense+embed"),
        ("blk.7.attn_k_b.weight", (4, 96, 32), "attention"),
        ("blk.7.attn_norm.weight", (256,), "norms+router"),
        ("blk.7.ffn_gate_inp.weight", (8, 256), "norms+router"),
        ("blk.7.exp_probs_b.bias", (8,), "norms+router"),
    ],
)
def test_groups(name, shape, group):
    assert group_of(name, shape) == group


def test_a_recipe_spares_all_but_the_experts():
    recipe = find_recipe("TQ1_0")
    assert recipe.choose(NEEDS_EXPERTS, (8, 256, 256)).layout.name == "TQ1_0"
    assert recipe.choose("output.weight", (512, 256)).layout.name == "Q8_0"
    assert recipe.choose("blk.1.attn_norm.weight", (256,)).layout.name == "F32"
    assert find_recipe("bf16").choose("output.weight", (512, 256)).layout.name == "BF16"
    assert uniform_recipe("tq2_0").choose("output.weight", (512, 256)).layout.name == "TQ2_0"


def test_the_first_exception_counts_and_router_and_norms_stay():
    recipe = with_overrides(find_recipe("tq1_0"), [r"blk\.7\..*_exps=q2_0", "_exps=tq2_0", "norm=bf16"])
    assert recipe.choose(NEEDS_EXPERTS, (8, 256, 256)).layout.name == "Q2_0"
    assert recipe.choose("blk.6.ffn_up_exps.weight", (8, 256, 256)).layout.name == "TQ2_0"
    assert recipe.choose("blk.6.attn_norm.weight", (256,)).layout.name == "F32"


@pytest.mark.parametrize("text", ["_exps", "=q8_0", "_exps=", "[=q8_0", "_exps=q9_9"])
def test_exceptions_that_cannot_be(text):
    with pytest.raises(KimiLiteError):
        with_overrides(find_recipe("q8_0"), [text])


def test_an_exception_that_names_nothing_is_refused(folder):
    with pytest.raises(KimiLiteError, match="No tensor's name has 'ffn_dwon'"):
        plan_conversion(open_model(folder), with_overrides(find_recipe("q8_0"), ["ffn_dwon=tq1_0"]))


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(KimiLiteError, match="no recipe 'tiny'") as caught:
        find_recipe("tiny")
    assert "q4_0-lossless" in caught.value.hint
    assert "tq1_0" in caught.value.hint


def test_the_table_reads_no_weights_and_its_sizes_are_those_written(folder, tmp_path, monkeypatch):
    recipe = find_recipe("tq1_0")
    model = open_model(folder)
    with monkeypatch.context() as patch:
        patch.setattr(np, "fromfile", lambda *args, **kwargs: pytest.fail("weights were read"))
        plan = plan_conversion(model, recipe)
        lines = describe_plan(plan, plan_shards(tmp_path / "out.gguf", [], 10**9), tmp_path / "not" / "there")
    assert not [*tmp_path.iterdir()]
    assert lines[1].startswith("routed experts")
    assert "int4 -> tq1_0" in lines[1]
    assert "1.69" in lines[1]
    assert "bf16 -> q8_0" in lines[2]
    assert any(line.startswith("disk free") and line.endswith("enough") for line in lines)
    assert any("encoding takes about" in line for line in lines)
    assert lines[-1].startswith("here it fits") and "tokens/s" in lines[-1]
    report = convert(folder, tmp_path / "out.gguf", recipe)
    assert GGUFStore.open(report.path).total_bytes == plan.num_bytes
    assert report.num_weights == plan.num_weights


def test_the_estimate_counts_every_tensor(folder):
    model = open_model(folder)
    assert estimate_seconds(plan_conversion(model, find_recipe("tq1_0"))) > 0


def test_lossless_keeps_every_bit(folder, tmp_path, without_ggml):
    recipe = find_recipe("q4_0-lossless")
    assert estimate_seconds(plan_conversion(open_model(folder), recipe)) == 0.0  # nothing is encoded
    convert(folder, tmp_path / "out.gguf", recipe)
    convert(folder, tmp_path / "f32.gguf", "f32")
    lossless, exact = (open_gguf_model(tmp_path / name).tensors for name in ("out.gguf", "f32.gguf"))
    assert {tensor.stored for tensor in lossless} == {"q4_0", "bf16", "f32"}
    for ours, theirs in zip(lossless, exact, strict=True):
        rows = np.prod(ours.shape[:-1], dtype=int)
        a, b = (tensor.open_rows()(0, rows) for tensor in (ours, theirs))
        assert np.array_equal(a.view("<f4"), b.view("<f4")), ours.name


def test_lossless_refuses_what_it_would_change(tmp_path):
    make_checkpoint(tmp_path / "hf", "moonlight")
    with pytest.raises(KimiLiteError, match=r"q4_0-lossless cannot keep 6 of .*_exps\.weight is bf16"):
        plan_conversion(open_model(tmp_path / "hf"), find_recipe("q4_0-lossless"))


def test_every_own_type_is_a_recipe():
    for name in ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "q2_0"):
        assert find_recipe(name).experts == find_layout(name)


def test_a_recipe_in_a_file(folder, tmp_path):
    """First match counts, the rest is Q8_0, and what is written again is the same."""
    file = tmp_path / "mine.recipe"
    file.write_text("# of a test\n\n^blk\\.1\\..*_exps = q2_0  # early\n_exps=tq1_0\n".replace(" = ", "="))
    recipe = find_recipe(str(file))
    model = open_model(folder)
    types = {t.source.name: t.layout.name for t in plan_conversion(model, recipe).tensors}
    assert types["blk.1.ffn_up_exps.weight"] == "Q2_0" and types["blk.2.ffn_up_exps.weight"] == "TQ1_0"
    assert types["output.weight"] == "Q8_0" and recipe.name == "mine"
    write_recipe(tmp_path / "again.recipe", model, recipe)
    again = plan_conversion(model, find_recipe(str(tmp_path / "again.recipe")))
    assert {t.source.name: t.layout.name for t in again.tensors} == types


@pytest.mark.parametrize(
    ("content", "said"), [("", "no line of REGEX=TYPE"), ("_exps\n", "is not REGEX=TYPE"), ("a=iq9\n", "no type 'iq9'")]
)
def test_recipes_in_files_that_cannot_be(tmp_path, content, said):
    (tmp_path / "r.recipe").write_text(content)
    with pytest.raises(KimiLiteError, match=said):
        find_recipe(str(tmp_path / "r.recipe"))
    with pytest.raises(KimiLiteError, match="There is no file"):
        find_recipe(str(tmp_path / "none.recipe"))
