"""`--fit`: the choice against all combinations, and what it takes into account."""

import itertools
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe import budget as budget_module
from kimi_lite.quantize.recipe.budget import Budget, Option, choose_options, fit_recipe, lower_hull, parse_budget
from kimi_lite.quantize.source.model import SourceTensor
from tests.checkpoints import make_checkpoint

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    make_checkpoint(folder, "kimi")
    return folder


@pytest.fixture
def small(monkeypatch):
    """A machine on which megabytes matter, and types that are quickly tried."""
    monkeypatch.setattr(budget_module, "_CANDIDATES", ("TQ1_0", "TQ2_0", "Q2_0", "Q8_0"))
    monkeypatch.setattr(budget_module, "_SYSTEM_BYTES", 0)
    monkeypatch.setattr(budget_module, "_GPU_BYTES", 0)
    monkeypatch.setattr(budget_module, "_CONTEXT_TOKENS", 0)


def random_options(rng: np.random.Generator, num_tensors: int) -> dict[SourceTensor, list[Option]]:
    tensors = [
        SourceTensor(f"t{i}", f"t{i}", (1,), "bf16", frozenset(), lambda: None, lambda layout: None)
        for i in range(num_tensors)
    ]
    sizes, losses = np.array([10, 13, 14, 18, 40]), np.array([0.19, 0.14, 0.12, 0.07, 0.001])
    return {
        tensor: [
            Option(int(size), float(loss * noise), BY_NAME["F32"])
            for size, loss, noise in zip(sizes, losses, rng.uniform(0.3, 2.0, 5), strict=True)
        ]
        for tensor in tensors
    }


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_within_a_step_of_the_best_combination(seed):
    options = random_options(np.random.default_rng(seed), 5)
    for available in (50, 63, 80, 110, 200):
        chosen = choose_options(options, available)
        assert sum(option.num_bytes for option in chosen.values()) <= available
        every = itertools.product(*options.values())
        best = min(sum(o.loss for o in combo) for combo in every if sum(o.num_bytes for o in combo) <= available)
        step = max(a.loss - b.loss for hull in map(lower_hull, options.values()) for a, b in itertools.pairwise(hull))
        assert sum(option.loss for option in chosen.values()) <= best + step


def test_the_hull_drops_what_no_price_would_buy():
    sizes_and_losses = [(10, 5.0), (12, 4.9), (14, 2.0), (15, 3.0), (20, 1.0), (20, 0.5)]
    hull = lower_hull([Option(size, loss, BY_NAME["F32"]) for size, loss in sizes_and_losses])
    assert [(option.num_bytes, option.loss) for option in hull] == [(10, 5.0), (14, 2.0), (20, 0.5)]


def test_more_memory_never_loses_more(folder, small):
    model, experts, before = open_model(folder), None, float("inf")
    for megabytes in (2.4, 2.6, 2.9, 3.6, 5.0):
        fit = fit_recipe(model, Budget(0, int(megabytes * 1e6)))
        layouts = [override.layout for override in fit.recipe.overrides]
        experts = sum(8 * 256 * layout.row_bytes(256) for layout in layouts)
        loss = sum({"TQ1_0": 0.19, "TQ2_0": 0.14, "Q2_0": 0.12, "Q8_0": 0.0}[layout.name] for layout in layouts)
        assert len(layouts) == 6
        assert loss <= before
        before = loss
    assert experts > 1_500_000


def test_what_is_written_fits_and_the_rest_keeps_eight_bits(folder, small, tmp_path):
    model = open_model(folder)
    fit = fit_recipe(model, Budget(1_700_000, 900_000))
    report = convert(model, tmp_path / "out.gguf", fit.recipe)
    store = GGUFStore.open(report.path)
    assert 0.9 * 2_600_000 < store.total_bytes <= 2_600_000
    types = {name: view.layout.name for name, view in store.tensors.items()}
    assert {kind for name, kind in types.items() if "_exps" not in name} == {"F32", "Q8_0"}
    assert "experts" in fit.summary


def test_too_small_a_machine_is_told_what_is_needed(folder):
    with pytest.raises(KimiLiteError, match=r"needs \d+\.\d GiB, VRAM and memory have 4\.0"):
        fit_recipe(open_model(folder), Budget(GIB, 3 * GIB))


def test_importance_moves_bytes_to_where_they_count(folder, small):
    """Rows whose inputs are all in two columns are hard to round badly: other tensors get the bytes."""
    model, rng = open_model(folder), np.random.default_rng(0)
    names = [tensor.name for tensor in model.tensors if "_exps" in tensor.name]
    vectors = {name: np.ones((8, 256), np.float32) for name in names}
    vectors[names[0]] = rng.gamma(0.05, size=(8, 256)).astype(np.float32)
    plain = fit_recipe(model, Budget(0, 2_450_000)).recipe.overrides
    weighed = fit_recipe(model, Budget(0, 2_450_000), Importance(folder, vectors)).recipe.overrides
    assert [override.layout for override in plain] != [override.layout for override in weighed]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("24G+256G", (24 * GIB, 256 * GIB)),
        ("256g", (0, 256 * GIB)),
        ("8GB + 64GB", (8 * GIB, 64 * GIB)),
        ("0+1.5", (0, 3 * GIB // 2)),
    ],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "24G+", "much", "-1+5", "24G+256G+1G", "nan"])
def test_words_that_are_no_budget(text):
    with pytest.raises(KimiLiteError, match="no memory to fit into"):
        parse_budget(text)


def test_this_machine(monkeypatch):
    monkeypatch.setattr(budget_module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout="24564\n16376\n"))
    assert parse_budget("this").gpu == 24564 << 20
    assert parse_budget("this").memory > GIB // 2


def test_the_command(folder, tmp_path):
    def settings(**flags) -> Settings:
        fields = {"recipe": None, "type_name": None, "tensor_types": (), "imatrix": None, "split_size": "45G"}
        return Settings(folder, tmp_path / "out.gguf", **fields | {"is_overwriting": False} | flags)

    lines = run(settings(fit="24G+256G"), lambda *state: None, True, False)
    assert any(line.startswith("fit: experts") for line in lines)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(KimiLiteError, match="--recipe and --fit exclude each other"):
        run(settings(fit="24G+256G", recipe="tq1_0"), lambda *state: None, True, False)
