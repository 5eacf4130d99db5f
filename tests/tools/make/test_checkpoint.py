"""K2.5-shaped checkpoints with random weights: `quantize` takes them as it takes the vendor's."""

from dataclasses import replace

import numpy as np
import pytest

from kimi_lite.arch.known import K2_5
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.tools.make.checkpoint import make_checkpoint

DIMS = replace(
    K2_5, num_dense_layers=1, num_layers=2, num_experts=8, vocab_size=1024, hidden_size=256, feed_forward_size=512,
    expert_feed_forward_size=256, num_heads=4, q_lora_rank=128, kv_lora_rank=96, qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
)  # fmt: skip


def test_it_converts(tmp_path):
    num_bytes = make_checkpoint(tmp_path / "model", DIMS)
    assert num_bytes == sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")) - headers(
        tmp_path / "model"
    )
    model = open_model(tmp_path / "model")
    experts = {tensor.name: tensor for tensor in model.tensors if tensor.name.endswith("_exps.weight")}
    assert len(experts) == 3 and {tensor.stored for tensor in experts.values()} == {"int4"}
    rows = experts["blk.1.ffn_up_exps.weight"].open_rows()(0, 64)
    assert 0.005 < rows.std() < 0.05 and np.abs(rows.mean()) < 0.002  # Gaussian, deviation 0.02
    report = convert(model, tmp_path / "out.gguf", "tq1_0")
    store = GGUFStore.open(report.path)
    assert store.tensor("blk.1.ffn_down_exps.weight").shape == (8, 256, 256)
    assert 0.3 < report.errors["blk.1.ffn_up_exps.weight"] < 0.55


def headers(folder) -> int:
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KimiLiteError, match="is not empty"):
        make_checkpoint(tmp_path, DIMS)
