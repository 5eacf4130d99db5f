"""`--fit`: the choice against all combinations, and what it takes into account."""

import itertools

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.machine import Gpu, Hardware, described
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.view import verdict_line
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe import budget as budget_module
from kimi_lite.quantize.recipe.budget import (
    FitTarget,
    TypeOption,
    choose_options,
    fit_recipe,
    lower_hull,
    parse_machine,
)
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


def machine(expert_bytes: int | None = None, gpu: Gpu | None = None, **more: object) -> FitTarget:
    """With so many bytes for experts in RAM."""
    hardware = Hardware("a CPU", 4, "avx2", 8 * GIB, 7 * GIB, gpu=gpu)
    return FitTarget(hardware, Options(ram_expert_bytes=expert_bytes, **more))


def random_options(rng: np.random.Generator, num_tensors: int) -> dict[SourceTensor, list[TypeOption]]:
    tensors = [
        SourceTensor(f"t{i}", f"t{i}", (1,), "bf16", frozenset(), lambda: None, lambda layout: None)
        for i in range(num_tensors)
    ]
    sizes, losses = np.array([10, 13, 14, 18, 40]), np.array([0.19, 0.14, 0.12, 0.07, 0.001])
    return {
        tensor: [
            TypeOption(int(size), float(loss * noise), BY_NAME["F32"])
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
    hull = lower_hull([TypeOption(size, loss, BY_NAME["F32"]) for size, loss in sizes_and_losses])
    assert [(option.num_bytes, option.loss) for option in hull] == [(10, 5.0), (14, 2.0), (20, 0.5)]


def test_more_memory_never_loses_more(folder, small):
    model, experts, before = open_model(folder), None, float("inf")
    for megabytes in (0.7, 0.8, 0.9, 1.2, 2.8):
        fit = fit_recipe(model, machine(int(megabytes * 1e6)))
        layouts = [override.layout for override in fit.recipe.overrides]
        experts = sum(8 * 256 * layout.row_bytes(256) for layout in layouts)
        loss = sum({"TQ1_0": 0.19, "TQ2_0": 0.14, "Q2_0": 0.12, "Q8_0": 0.0}[layout.name] for layout in layouts)
        assert len(layouts) == 6
        assert loss <= before
        before = loss
    assert experts > 1_500_000


def plan_of(path, target: FitTarget):
    """The plan of a file on the machine that it was made for, as the engine makes it."""
    store = GGUFStore.open(path)
    return make_plan(store_sizes(store, ModelConfig.from_metadata(store.metadata)), target.hardware, target.options)


@pytest.mark.parametrize("free_bytes", [340 << 20, 345 << 20, 400 << 20])
@pytest.mark.parametrize("gpu", [None, Gpu("a GPU", 2 * GIB, 15 * GIB // 10)])
def test_what_is_written_fits_by_the_plan_of_the_engine(folder, small, tmp_path, free_bytes, gpu):
    """The same arithmetic: the file that is made for a machine is planned there without a byte on disk."""
    model = open_model(folder)
    target = FitTarget(Hardware("a CPU", 1, "avx2", GIB, free_bytes, gpu=gpu), Options(num_gpu_experts=0))
    fit = fit_recipe(model, target)
    report = convert(model, tmp_path / "out.gguf", fit.recipe)
    plan = plan_of(report.path, target)
    assert plan.verdict in ("fits", "tight") and not plan.disk_expert_bytes
    types = {name: view.layout.name for name, view in GGUFStore.open(report.path).tensors.items()}
    assert {kind for name, kind in types.items() if "_exps" not in name} == {"F32", "Q8_0"}
    assert verdict_line(plan).partition(", limit")[0] in fit.summary


def test_experts_use_the_memory_that_there_is(folder, small, tmp_path):
    target = machine(900_000)
    report = convert(open_model(folder), tmp_path / "out.gguf", fit_recipe(open_model(folder), target).recipe)
    assert 0.9 * 900_000 < plan_of(report.path, target).sizes.expert_bytes <= 900_000


def test_too_small_a_machine_is_told_what_is_needed(folder, small):
    with pytest.raises(KimiLiteError, match=r"smallest types the experts need [\d.]+ GiB; [\d.]+ GiB are left"):
        fit_recipe(open_model(folder), machine(100_000))
    with pytest.raises(KimiLiteError, match=r"At least [\d.]+ GiB of RAM are needed"):
        fit_recipe(open_model(folder), FitTarget(machine().hardware, Options(ram_bytes=64 << 20)))


def test_importance_moves_bytes_to_where_they_count(folder, small):
    """Rows whose inputs are all in two columns are hard to round badly: other tensors get the bytes."""
    model, rng = open_model(folder), np.random.default_rng(0)
    names = [tensor.name for tensor in model.tensors if "_exps" in tensor.name]
    vectors = {name: np.ones((8, 256), np.float32) for name in names}
    vectors[names[0]] = rng.gamma(0.05, size=(8, 256)).astype(np.float32)
    plain = fit_recipe(model, machine(750_000)).recipe.overrides
    weighed = fit_recipe(model, machine(750_000), Importance(folder, vectors)).recipe.overrides
    assert [override.layout for override in plain] != [override.layout for override in weighed]


@pytest.mark.parametrize(
    ("text", "vram", "ram"),
    [("24G+256G", 24, 256), ("256g", 0, 256), ("8GB + 64GB", 8, 64), ("0+1.5G", 0, 1.5), ("12GiB+48GiB", 12, 48)],
)
def test_machines_are_those_of_the_plan(monkeypatch, text, vram, ram):
    """`--fit 24G+256G` is `plan --vram 24G --ram 256G`."""
    here = Hardware("here", 2, "avx2", 16 * GIB, 14 * GIB)
    monkeypatch.setattr(budget_module, "probe", lambda: here)
    found = parse_machine(text)
    assert (found.options.vram_bytes, found.options.ram_bytes) == (vram * GIB, ram * GIB)
    assert found.hardware == described(here, int(ram * GIB), vram * GIB)
    assert parse_machine("this") == FitTarget(here, Options())


@pytest.mark.parametrize("text", ["", "24G+", "much", "-1+5", "24G+256G+1G", "nan", "24+256"])
def test_words_that_are_no_machine(monkeypatch, text):
    with pytest.raises(KimiLiteError, match="is no amount of memory") as caught:
        parse_machine(text)
    assert "24G+256G" in caught.value.hint


def test_the_command(folder, tmp_path):
    def settings(**flags) -> Settings:
        fields = {"recipe": None, "type_name": None, "tensor_types": (), "imatrix": None, "split_size": "45G"}
        return Settings(folder, tmp_path / "out.gguf", **fields | {"is_overwriting": False} | flags)

    lines = run(settings(fit="24G+256G"), lambda *state: None, True, False)
    assert any(line.startswith("fit: experts") for line in lines)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(KimiLiteError, match="--recipe and --fit exclude each other"):
        run(settings(fit="24G+256G", recipe="tq1_0"), lambda *state: None, True, False)
