"""Calibration straight from a checkpoint: the same bytes as from a lossless GGUF of it, and after a kill."""

import numpy as np
import pytest

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.calibrate.calibration import CalibrationText
from kimi_lite.quantize.calibrate.statistics import collect_importance
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe
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


def test_a_killed_one_repeated_gives_the_same_bytes(checkpoint, tmp_path):
    """Stopped after two of a layer's three expert tensors."""
    folder, text = checkpoint

    def stop_at_down(name: str, done: int, total: int) -> None:
        if "blk.1.ffn_down_exps" in name:
            raise KeyboardInterrupt

    def convert_from(on_progress):
        calibration = CalibrationText.open(folder, text, 4)
        try:
            return convert(folder, tmp_path / "out.gguf", find_recipe("tq1_0"), on_progress, calibration=calibration)
        finally:
            calibration.close()

    whole = convert_from(quiet).path.read_bytes()
    (tmp_path / "out.gguf").unlink()
    with pytest.raises(KeyboardInterrupt):
        convert_from(stop_at_down)
    assert convert_from(quiet).path.read_bytes() == whole
