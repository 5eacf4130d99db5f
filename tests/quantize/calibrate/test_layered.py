"""Calibration straight from a checkpoint: the same bytes as from a lossless GGUF of it, with a layer in memory at a
time."""

import numpy as np
import pytest

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.walk import LayerWalk
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.calibrate.calibration import CalibrationText
from kimi_lite.quantize.calibrate.layered import checkpoint_layers
from kimi_lite.quantize.calibrate.statistics import collect_importance, open_walk
from kimi_lite.quantize.convert import convert, open_model
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


def test_a_killed_one_goes_on_within_a_layer(checkpoint, tmp_path):
    """After two of a layer's three expert tensors; nothing that is finished is encoded again."""
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
    encoded = []
    assert convert_from(lambda name, done, total: encoded.append(name)).path.read_bytes() == whole
    assert not any("blk.0." in name for name in encoded)


def test_one_layer_is_in_memory(checkpoint):
    """Outside its turn a layer's bytes are not there; the bound is that of the largest layer."""
    folder, _ = checkpoint
    layered = checkpoint_layers(open_model(folder), folder)
    walk, _ = open_walk(folder, allows_checkpoint=True)
    sizes = {}
    for layer in (-1, 0, 1):
        tensors = layered._members(layer)
        assert not any(layered.store.tensor(tensor.name).data.any() for tensor in tensors)
        layered.load(layer)
        assert all(layered.store.tensor(tensor.name).data.any() for tensor in tensors)
        layered.release(layer)
        assert not any(layered.store.tensor(tensor.name).data.any() for tensor in tensors)
        sizes[layer] = sum(tensor.num_bytes for tensor in tensors)
    assert layered.largest_layer_bytes == max(sizes.values()) == walk.resident_bytes > 0
    walk.close()
    assert isinstance(walk, LayerWalk)
