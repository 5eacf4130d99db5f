"""Plans for checkpoints that are stored by codes: which recipes keep them, as quantize then finds of all codes."""

import json

import numpy as np
import pytest

from kimi_lite.arch.checkpoint import read_checkpoint_config
from kimi_lite.hardware.machine import Hardware
from kimi_lite.options import Options
from kimi_lite.plan.codes import kept_recipes
from kimi_lite.plan.subject import best_choice, choices, explain_choice, find_subject
from kimi_lite.quantize.convert import open_model
from kimi_lite.quantize.recipe.budget import FitTarget, fit_recipe
from tests.checkpoints import make_checkpoint
from tests.quantize.source.gsq_folder import write_gsq

GIB = 1 << 30
TWO_BITS = ("q2_0", "lite2_128")


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    make_checkpoint(folder, "kimi")
    return folder


@pytest.mark.parametrize(
    ("form", "levels", "bits", "kept"),
    [
        ("packed", "2-bit", 4, TWO_BITS),
        ("packed", "ternary", 4, TWO_BITS),
        ("packed", "3-bit", 4, ("q4_0",)),
        ("packed", "3-bit", 3, ("q4_0",)),
        ("humming", "2-bit", 2, TWO_BITS),
        ("humming", "3-bit", 3, ("q4_0",)),
    ],
)
def test_what_is_planned_is_what_quantize_keeps(tmp_path, floats, form, levels, bits, kept):
    write_gsq(tmp_path / "gsq", floats, form, levels, bits)
    subject = find_subject(str(tmp_path / "gsq"), has_vision=False)
    assert subject.kept == kept and set(kept) <= set(subject.recipes)
    experts = [tensor for tensor in open_model(tmp_path / "gsq").tensors if tensor.codes]
    assert experts and {name.upper() for name in kept} <= set.intersection(*(set(each.exact) for each in experts))


def test_a_plan_takes_the_codes_as_they_are_where_they_fit(tmp_path, floats):
    write_gsq(tmp_path / "gsq", floats)
    subject = find_subject(str(tmp_path / "gsq"), has_vision=False)
    every = list(choices(subject, Hardware("a CPU", 4, "avx2", 8 * GIB, 7 * GIB), Options()))
    best = best_choice(every)
    assert best.recipe == "q2_0" and best.is_exact
    assert "keeps the experts as they are" in explain_choice(every, best.recipe)
    own = next(choice for choice in every if choice.recipe == "lite2_128")
    assert own.plan.sizes.expert_bits == 2.125 < best.plan.sizes.expert_bits == 2.25
    assert min((each for each in every if each is not best), key=lambda each: each.loss_order) is own


@pytest.mark.parametrize("change", [{}, {"num_bits": 5}, {"num_bits": "4"}])
def test_without_weights_nothing_is_promised(tmp_path, floats, change):
    """A container of 4 bits says nothing of its codes, and a folder may have config.json alone."""
    write_gsq(tmp_path / "gsq", floats)
    config = json.loads((tmp_path / "gsq" / "config.json").read_text())
    config["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (tmp_path / "gsq" / "config.json").write_text(json.dumps(config))
    if not change:
        (tmp_path / "gsq" / "model.safetensors").write_bytes(b"cut off")
    assert kept_recipes(read_checkpoint_config(tmp_path / "gsq")) == ()


def test_fit_keeps_the_codes_where_it_can_and_says_what_goes(tmp_path, floats, monkeypatch):
    """Between all in Q2_0 and half of it: some tensors stay as they are, and only others lose anything."""
    from kimi_lite.quantize.recipe import budget

    monkeypatch.setattr(budget, "_EXPERT_TYPES", ("TQ1_0", "Q2_0", "Q8_0"))
    write_gsq(tmp_path / "gsq", floats)
    model = open_model(tmp_path / "gsq")
    in_q2_0 = sum(np.prod(tensor.shape) for tensor in model.tensors if tensor.codes) * 18 // 64
    for share, least in ((1.0, 6), (0.9, 3), (0.75, 0)):
        target = FitTarget(
            Hardware("a CPU", 4, "avx2", 8 * GIB, 7 * GIB), Options(ram_expert_bytes=int(share * in_q2_0))
        )
        layouts = [override.layout.name for override in fit_recipe(model, target).recipe.overrides]
        assert layouts.count("Q2_0") >= least and layouts.count("Q8_0") == 0
    assert layouts.count("TQ1_0") == 6
