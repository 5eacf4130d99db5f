"""`--fit` and `--size`: what the choice takes into account, and that what is made of it fits."""

import re
from functools import partial

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5
from kimi_lite.arch.recipe import Recipe
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.arch.tensors import tensor_shapes
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
    fit_recipe,
    fit_size,
    parse_machine,
)
from kimi_lite.quantize.recipe.sensitivity import Sensitivity, Unit, read_sensitivity, write_sensitivity
from kimi_lite.quantize.source.metadata import model_metadata
from kimi_lite.quantize.source.model import SourceModel, SourceTensor
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
    monkeypatch.setattr(budget_module, "_EXPERT_TYPES", ("TQ1_0", "TQ2_0", "Q2_0", "Q8_0"))


def machine(expert_bytes: int | None = None, gpu: Gpu | None = None, **more: object) -> FitTarget:
    """With so many bytes for experts in RAM."""
    hardware = Hardware("a CPU", 4, "avx2", 8 * GIB, 7 * GIB, gpu=gpu)
    return FitTarget(hardware, Options(ram_expert_bytes=expert_bytes, **more))


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


def types_of(recipe: Recipe) -> dict[str, str]:
    """Of the tensors that the recipe names."""
    return {re.sub(r"\\(.)", r"\1", each.pattern.pattern).strip("^$"): each.layout.name for each in recipe.overrides}


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
    assert verdict_line(plan).partition(", limit")[0] in fit.lines[0]


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
    """Inputs in few columns: a finer type there brings more than elsewhere, and it gets the bytes for one."""
    model, rng = open_model(folder), np.random.default_rng(0)
    names = [tensor.name for tensor in model.tensors if "_exps" in tensor.name]
    vectors = {name: np.ones((8, 256), np.float32) for name in names}
    vectors[names[0]] = rng.gamma(0.05, size=(8, 256)).astype(np.float32)
    plain = types_of(fit_recipe(model, machine(700_000)).recipe)
    weighed = types_of(fit_recipe(model, machine(700_000), Importance(folder, vectors)).recipe)
    assert list(plain.values()).count("TQ2_0") == list(weighed.values()).count("TQ2_0") == 1
    assert plain[names[0]] == "TQ1_0" and weighed[names[0]] == "TQ2_0"


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


def test_the_command(folder, small, tmp_path):
    def settings(**flags) -> Settings:
        fields = {"recipe": None, "type_name": None, "tensor_types": (), "imatrix": None, "split_size": "45G"}
        return Settings(folder, tmp_path / "out.gguf", **fields | {"is_overwriting": False} | flags)

    lines = run(settings(fit="24G+256G"), lambda *state: None, True, False)
    assert any(line.startswith("fit: experts") for line in lines)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(KimiLiteError, match="--recipe and --fit exclude each other"):
        run(settings(fit="24G+256G", recipe="tq1_0"), lambda *state: None, True, False)


def full_size() -> SourceModel:
    """Kimi K2.5 by name and shape, in the INT4 that it is published in, with a Gaussian row wherever one is read."""
    row = np.random.default_rng(0).standard_normal(1 << 15).astype(np.float32)

    def tensor(name: str, shape: tuple[int, ...]) -> SourceTensor:
        exact = {"Q4_0", "F32"} if "_exps" in name else {"BF16", "F32"}
        open_rows = lambda: lambda start, stop: np.tile(row[: shape[-1]], (stop - start, 1))  # noqa: E731
        return SourceTensor(name, name, shape, "int4", frozenset(exact), open_rows, lambda layout: None)

    tensors = tuple(tensor(name, shape) for name, shape in tensor_shapes(K2_5).items())
    return SourceModel(tensors, lambda layout: model_metadata(K2_5, layout), (), ())


@pytest.fixture
def one_row(monkeypatch):
    """Types of ours alone, and one row of each tensor for what they lose: a full-size model in a second."""
    monkeypatch.setattr(budget_module, "_EXPERT_TYPES", ("TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "Q8_0"))
    monkeypatch.setattr(budget_module, "_REST_TYPES", ("Q2_0", "Q8_0"))
    monkeypatch.setattr(budget_module, "_SAMPLED_ROWS", 1)


def bits_of(types: dict[str, str], layers: range) -> float:
    """Mean bits of the routed experts of these layers, whose tensors are all of one size."""
    found = [BY_NAME[kind] for name, kind in types.items() if "_exps" in name and int(name.split(".")[1]) in layers]
    return float(np.mean([layout.bits_per_weight for layout in found]))


def test_kimi_is_fitted_by_what_was_published_of_it(one_row):
    """The machine that the program is made for: early layers get more bits, all types are used, and it fits."""
    fit = fit_recipe(full_size(), parse_machine("24G+256G"))
    types = types_of(fit.recipe)
    assert len(types) == 180 and {"TQ1_0", "Q2_0"} <= set(types.values())
    assert bits_of(types, range(1, 31)) > bits_of(types, range(31, 61))
    assert fit.lines[0].startswith("fit: experts") and "the rest in Q8_0; here it fits" in fit.lines[0]
    assert any("predicted KL divergence" in line and "Kimi K2.5" in line for line in fit.lines)


def test_without_a_gpu_everything_competes_and_what_carries_much_keeps_its_bits(one_row):
    fit = fit_recipe(full_size(), parse_machine("256G"))
    types = types_of(fit.recipe)
    assert len(types) == 731 and types["output.weight"] == "Q8_0"
    assert sum(kind == "Q8_0" for name, kind in types.items() if "_exps" not in name) > 400
    assert all(kind == "Q8_0" for name, kind in types.items() if "shexp" in name and name.startswith("blk.60."))


def test_a_table_of_ones_own_decides(one_row, tmp_path):
    """One layer that carries everything keeps its experts as they are."""
    units = [
        Unit((tensor.name,), "iq1_kt", 0.15, 0.0, 9.0 if tensor.name.startswith("blk.17.") else 0.001)
        for tensor in full_size().tensors
        if "_exps" in tensor.name
    ]
    write_sensitivity(tmp_path / "own.csv", units, ["of a test"])
    sensitivity = read_sensitivity(tmp_path / "own.csv")
    types = types_of(fit_recipe(full_size(), parse_machine("24G+256G"), None, sensitivity).recipe)
    assert bits_of(types, range(17, 18)) == 4.5 > bits_of(types, range(18, 61))
    write_sensitivity(tmp_path / "part.csv", units[:-3], [])
    with pytest.raises(KimiLiteError, match=r"part\.csv lack 3 tensors of experts of this model: blk\.60"):
        fit_recipe(full_size(), parse_machine("24G+256G"), None, read_sensitivity(tmp_path / "part.csv"))


def test_a_file_of_a_size(folder, small, tmp_path, monkeypatch):
    """Everything competes for the bytes of a file, headers and padding counted; what is written is no larger."""
    monkeypatch.setattr(budget_module, "_REST_TYPES", ("Q2_0", "Q8_0"))
    model = open_model(folder)
    units = [
        Unit((tensor.name,), "q2_0", 0.12, 0.0, 0.1) for tensor in model.tensors if tensor.name.endswith(".weight")
    ]
    sensitivity, written = Sensitivity("a test", tuple(units)), []
    for num_bytes in (1_250_000, 1_500_000, 3_000_000):
        fit = fit_size(model, num_bytes, None, sensitivity)
        report = convert(model, tmp_path / f"{num_bytes}.gguf", fit.recipe)
        assert report.num_bytes <= num_bytes
        written.append(report.num_bytes)
    assert written[0] > 1_000_000 and written[0] < written[1] < written[2]
    with pytest.raises(KimiLiteError, match=r"smallest types the file needs [\d.]+ GiB; --size is"):
        fit_size(model, 400_000, None, sensitivity)


def test_recipes_and_tables_on_the_command_line(folder, small, tmp_path):
    def settings(name: str, **flags) -> Settings:
        fields = {"recipe": None, "type_name": None, "tensor_types": (), "imatrix": None, "split_size": "45G"}
        return Settings(folder, tmp_path / name, **fields | {"is_overwriting": False} | flags)

    run_quietly = partial(run, on_progress=lambda *state: None, is_verifying=False)
    experts = [tensor.name for tensor in open_model(folder).tensors if "_exps" in tensor.name]
    write_sensitivity(tmp_path / "t.csv", [Unit((name,), "q2_0", 0.12, 0.01, 0.1) for name in experts], [])
    recipe_file = tmp_path / "mine.recipe"
    lines = run_quietly(
        settings("a.gguf", fit="64G", sensitivity=tmp_path / "t.csv", recipe_file=recipe_file), is_dry=False
    )
    assert any("predicted KL divergence" in line and "t.csv" in line for line in lines)
    run_quietly(settings("b.gguf", recipe=str(recipe_file)), is_dry=False)
    a, b = (GGUFStore.open(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert {n: v.layout.name for n, v in a.items()} == {n: v.layout.name for n, v in b.items()}
    named = run_quietly(settings("c.gguf", recipe=str(tmp_path / "t.csv")), is_dry=True)
    assert any("predicted KL divergence" in line for line in named)
    for flags, said in (
        ({"sensitivity": tmp_path / "t.csv"}, "not how many bytes"),
        ({"fit": "64G", "size": "2M"}, "--fit and --size exclude each other"),
        ({"recipe": str(tmp_path / "t.csv"), "type_name": "q8_0"}, "--type names one"),
        ({"recipe": str(tmp_path / "none.recipe")}, "There is no file"),
    ):
        with pytest.raises(KimiLiteError, match=said):
            run_quietly(settings("d.gguf", **flags), is_dry=True)
