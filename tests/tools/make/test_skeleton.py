"""Kimi K2.5 at its real size without its weights: every tensor of a list in its place, plan and doctor on it, and a
token from files of full width."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, slice_of
from kimi_lite.arch.sizes import sizes_of, store_sizes
from kimi_lite.arch.tensors import open_model, tensor_shapes
from kimi_lite.cli import app as kimi_lite
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.tools.make import skeleton
from kimi_lite.tools.make.skeleton import ListedTensor, make_skeleton, read_tensor_list
from tests.model.hybrid.runner import HybridRunner
from tests.model.runner import Runner

REAL_LISTS = sorted((Path(__file__).parents[4] / "shared/data/k2.5-files").glob("*.tsv"))


def listed(config: ModelConfig = K2_5, type_name: str = "IQ2_XXS") -> list[ListedTensor]:
    """As llama.cpp types a file of IQ2_XXS without an importance matrix: short rows in IQ4_NL, routers in F32."""

    def layout(name: str, shape: tuple[int, ...]):
        is_exact = len(shape) == 1 or "ffn_gate_inp" in name
        return BY_NAME["F32" if is_exact else type_name if shape[-1] % 256 == 0 else "IQ4_NL"]

    return [ListedTensor(name, shape, layout(name, shape)) for name, shape in tensor_shapes(config).items()]


def write_list(path: Path, tensors: list[ListedTensor], other_types: dict[str, str] | None = None) -> Path:
    rows = ["tensor\tshape (ggml order)\ttype\tbytes"]
    for name, shape, layout in tensors:
        dims = ",".join(map(str, shape[::-1])) + ("," if len(shape) == 1 else "")
        type_name = (other_types or {}).get(layout.name, layout.name).lower()
        rows.append(f"{name}\t{dims}\t{type_name}\t{ListedTensor(name, shape, layout).num_bytes}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[ListedTensor]]:
    """The first shard of a skeleton of all 61 layers, by the command, and its list."""
    folder, tensors = tmp_path_factory.mktemp("skeleton"), listed()
    source = write_list(folder / "list.tsv", tensors)
    command = [str(source), str(folder / "k2.5.gguf"), "--split-size", "50G"]
    assert CliRunner().invoke(skeleton.app, command).exit_code == 0
    return folder / "k2.5-00001-of-00006.gguf", tensors


def test_every_tensor_lies_where_the_list_has_it(whole):
    path, tensors = whole
    store, config = open_model(path)
    assert (config.num_layers, config.num_experts, config.vocab_size) == (61, 384, 163_840)
    assert len(store.shards) == 6 and len(store.tensors) == len(tensors) == 1096
    for name, shape, layout in tensors:
        assert (store.tensors[name].shape, store.tensors[name].layout) == (shape, layout)
    assert store.total_bytes == sum(tensor.num_bytes for tensor in tensors) > 246 * 2**30
    assert sum(shard.stat().st_blocks * 512 for shard in store.shards) < 32 << 20, "the weights take no place"
    assert max(shard.stat().st_size for shard in store.shards) < 50.1e9
    assert (store.tensors["blk.60.ffn_norm.weight"].data.view(np.float32) == 1).all()
    biases = [store.tensors[f"blk.{layer}.exp_probs_b.bias"].data.view(np.float32) for layer in (1, 2)]
    assert not np.array_equal(*biases) and np.isfinite(biases).all()
    assert not store.tensors["blk.60.ffn_down_exps.weight"].data[383].any()
    sizes = store_sizes(store, config)
    assert sizes.num_experts == 23_040 and sizes.total_bytes == store.total_bytes


def test_index_of_all_experts(whole):
    """Every expert's bytes lie inside its tensor's shard, apart from each other."""
    store, config = open_model(whole[0])
    index = ExpertIndex.find(store, config)
    assert index.routed_bytes == store_sizes(store, config).expert_bytes
    for layer in index.layers.values():
        for matrix in layer.matrices:
            tensor = store.tensors[matrix.tensor]
            assert matrix.run(383).start + matrix.num_bytes == tensor.start + tensor.num_bytes


def test_plan_and_doctor_on_the_whole(whole):
    path, _ = whole
    arguments = ["plan", "-m", str(path), "--vram", "24G", "--ram", "256G", "--json"]
    found = CliRunner().invoke(kimi_lite, arguments)
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert plan["verdict"] in ("fits", "tight", "from disk") and plan["num_experts"] == 23_040
    doctor = CliRunner().invoke(kimi_lite, ["doctor", "-m", str(path)])
    assert "Traceback" not in doctor.output and "61 layers" in doctor.output, doctor.output


def test_types_that_are_not_read(tmp_path):
    tensors = listed(slice_of(K2_5, 1, 1, 8, 1024))
    source = write_list(tmp_path / "list.tsv", tensors, {"IQ2_XXS": "iq2_bn"})
    with pytest.raises(KimiLiteError, match=r"does not read the type iq2_bn .*") as caught:
        read_tensor_list(source)
    assert "--nearest" in caught.value.hint
    found, replaced = read_tensor_list(source, takes_nearest=True)
    assert list(replaced) == ["iq2_bn"]
    assert [(each.name, each.shape, each.num_bytes) for each in found] == [
        (each.name, each.shape, each.num_bytes) for each in tensors
    ]


def test_lists_that_are_none(tmp_path):
    broken = tmp_path / "broken.tsv"
    broken.write_text("tensor\tshape\ttype\tbytes\nblk.0.attn_norm.weight 7168\n")
    with pytest.raises(KimiLiteError, match=r"line 2: .* is not name, shape, type and bytes"):
        read_tensor_list(broken)
    tensors = listed(slice_of(K2_5, 1, 1, 8, 1024))
    with pytest.raises(KimiLiteError, match=r"not Kimi K2\.5's: blk\.1\.attn_output\.weight is missing"):
        make_skeleton(tmp_path / "out.gguf", [each for each in tensors if each.name != "blk.1.attn_output.weight"])
    narrow = [each._replace(shape=(4096,)) if each.name == "blk.0.attn_norm.weight" else each for each in tensors]
    with pytest.raises(KimiLiteError, match=r"not Kimi K2\.5's: blk\.0\.attn_norm\.weight is \(4096,\)"):
        make_skeleton(tmp_path / "out.gguf", narrow)
    assert not list(tmp_path.glob("*.gguf*")), "nothing is left"


@pytest.mark.skipif(not REAL_LISTS, reason="the lists of real files are not here")
@pytest.mark.parametrize("path", REAL_LISTS, ids=lambda path: path.stem)
def test_lists_of_real_files(path, tmp_path):
    tensors, _ = read_tensor_list(path, takes_nearest=True)
    made = make_skeleton(tmp_path / "k2.5.gguf", tensors)
    store, config = open_model(made.shards[0])
    assert made.num_tensors == len(store.tensors) == 1096 and made.disk_bytes < 32 << 20
    assert store_sizes(store, config) == sizes_of(config, tensors)


@pytest.mark.parametrize("runner_class", [Runner, HybridRunner])
def test_a_token_at_full_width(tmp_path, runner_class):
    """Two layers with all 384 experts of K2.5's width, few of them in RAM: on the CPU path and with a CPU device in a
    GPU's place the disk tier reads what the random biases choose, and the numbers stay finite."""
    path = tmp_path / "k2.5.gguf"
    make_skeleton(path, listed(slice_of(K2_5, 0, 2, 384, 1024), "Q2_K"))
    index = ExpertIndex.find(*open_model(path))
    tier = {"ram_expert_bytes": 2 * 40 * index.layers[0].ram_slot_bytes}
    with runner_class(path, **tier) as runner:
        logits = runner.decode(np.array([5, 6]))
        assert logits.shape == (2, 1024) and np.isfinite(logits).all()
        counters = runner.transformer.counters()
    assert counters["expert_slots"] == 80 and counters["expert_misses"] >= 8  # the others are guessed
    assert counters["disk_bytes"] >= 16 * index.layers[0].expert_bytes
