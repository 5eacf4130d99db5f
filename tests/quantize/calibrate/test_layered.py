"""Calibration straight from a checkpoint, INT4, FP8 or bf16: the bytes of a lossless GGUF, also after a kill."""

import numpy as np
import pytest

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.calibrate.calibration import CalibrationText
from kimi_lite.quantize.calibrate.statistics import collect_importance
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe
from tests import checkpoint_formats
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder with INT4 experts, text of four chunks)"""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder / "model", "kimi_int4", num_layers=2, n_routed_experts=4, num_experts_per_tok=2)
    text = folder / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 2200))))
    return folder / "model", text


def quiet(name: str, done: int, total: int) -> None:
    pass


def settings(src, dst, text, **changed) -> Settings:
    return Settings(
        src, dst, "tq1_0", None, (), None, "45G", is_overwriting=False, calibrate=text, calibrate_chunks=4, **changed
    )


def test_a_checkpoint_gives_the_bytes_of_its_lossless_gguf(checkpoint, tmp_path):
    folder, text = checkpoint
    lossless = convert(folder, tmp_path / "lossless.gguf", find_recipe("q4_0-lossless")).path
    lines = run(settings(folder, tmp_path / "direct.gguf", text), quiet, False, False)
    run(settings(lossless, tmp_path / "again.gguf", text), quiet, False, False)
    direct, again = (GGUFStore.open(tmp_path / f"{name}.gguf") for name in ("direct", "again"))
    assert direct.tensors.keys() == again.tensors.keys() and any("TQ1_0" in line for line in lines)
    for name, view in direct.tensors.items():
        assert np.array_equal(view.data, again.tensors[name].data), name
    collect_importance(folder, text, tmp_path / "direct.imatrix", 2)
    collect_importance(lossless, text, tmp_path / "again.imatrix", 2)
    assert (tmp_path / "direct.imatrix").read_bytes() == (tmp_path / "again.imatrix").read_bytes()


@pytest.mark.parametrize("kind", ["kimi", "deepseek_v3_fp8"])
def test_bf16_and_fp8_give_the_bytes_of_their_lossless_gguf(kind, tmp_path, monkeypatch):
    """FP8's factors are powers of two here, so that its weights are numbers of BF16."""
    if kind == "deepseek_v3_fp8":
        monkeypatch.setattr(checkpoint_formats, "_to_fp8", to_fp8_by_powers_of_two)
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    make_checkpoint(
        folder, kind, num_layers=2, first_k_dense_replace=1, moe_intermediate_size=256, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    text.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 2200))))
    lossless = convert(folder, tmp_path / "lossless.gguf", "bf16").path
    run(settings(folder, tmp_path / "direct.gguf", text), quiet, False, False)
    run(settings(lossless, tmp_path / "again.gguf", text), quiet, False, False)
    run(settings(lossless, tmp_path / "plain.gguf", None), quiet, False, False)
    direct, again, plain = (GGUFStore.open(tmp_path / f"{name}.gguf") for name in ("direct", "again", "plain"))
    for name, view in direct.tensors.items():
        assert np.array_equal(view.data, again.tensors[name].data), name
    experts = "blk.1.ffn_gate_exps.weight"
    assert direct.tensors[experts].layout.name == "TQ1_0"
    assert not np.array_equal(direct.tensors[experts].data, plain.tensors[experts].data)


def to_fp8_by_powers_of_two(weight):
    """Rounds `weight` (N, M) in place; FP8 e4m3 codes and a float32 factor for each block of 128 x 128."""
    import torch

    rows, columns = weight.shape
    factors = torch.empty(-(-rows // 128), -(-columns // 128))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row, column in np.ndindex(*factors.shape):
        block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        factors[row, column] = 2.0 ** torch.ceil(torch.log2(weight[block].abs().max() / 448))
        codes[block] = (weight[block] / factors[row, column]).to(torch.float8_e4m3fn)
        weight[block] = codes[block].float() * factors[row, column]
    return codes, factors


def test_a_killed_one_goes_on_behind_what_is_safe(checkpoint, tmp_path):
    """Stopped after two of a layer's three expert tensors, of which every one is safe at once."""
    folder, text = checkpoint
    named: list[str] = []

    def stop_at_down(name: str, done: int, total: int) -> None:
        if "blk.1.ffn_down_exps" in name:
            raise KeyboardInterrupt

    def convert_from(on_progress):
        calibration = CalibrationText.open(folder, text, 4)
        dst, recipe = tmp_path / "out.gguf", find_recipe("tq1_0")
        try:
            return convert(folder, dst, recipe, on_progress, calibration=calibration, sync_bytes=0)
        finally:
            calibration.close()

    whole = convert_from(quiet).path.read_bytes()
    (tmp_path / "out.gguf").unlink()
    with pytest.raises(KeyboardInterrupt):
        convert_from(stop_at_down)
    journal = (tmp_path / "out.quantize.jsonl.partial").read_text()
    assert "blk.1.ffn_up_exps" in journal and "blk.1.ffn_down_exps" not in journal
    assert convert_from(lambda name, done, total: named.append(name)).path.read_bytes() == whole
    assert named[0] == "blk.1.ffn_down_exps.weight"
