"""A weight that is not finite, anywhere in a model, must reach the logits, where the sampler refuses it."""

import shutil

import gguf
import numpy as np
import pytest

from kimi_lite.native.layouts import BY_NAME
from tests.model.runner import Runner
from tests.tiny import write_tiny_gguf

TYPES = {
    "F32": {},
    "Q8_0": {"_a": "Q8_0", "_b": "Q8_0", "_mqa": "Q8_0", "exps": "Q8_0", "attn_output": "Q8_0", "output": "Q8_0"},
}


@pytest.fixture(scope="module", params=TYPES)
def model(request, tmp_path_factory):
    return write_tiny_gguf(
        tmp_path_factory.mktemp("tiny") / "tiny.gguf",
        np.random.default_rng(0),
        num_layers=2,
        types=TYPES[request.param],
    )


def damage(path, name, value):
    """Puts `value` into a scale or weight of the middle row of a tensor; of every expert, as any may be chosen."""
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == name)
    layout = BY_NAME[tensor.tensor_type.name]
    blocks = (
        tensor.data.view(np.uint8).reshape(-1, layout.row_bytes(int(tensor.shape[0]))).view(layout.dtype)
    )  # (rows, blocks)
    rows = slice(None) if name.endswith("exps.weight") or name.startswith("token_embd") else [len(blocks) // 2]
    field = "x" if layout.block_size == 1 else "d"
    blocks[field][rows, 0] = value


def tensor_names(path):
    return [tensor.name for tensor in gguf.GGUFReader(path).tensors if tensor.name.split(".")[1] != "0"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_every_tensor(model, value, tmp_path):
    for name in tensor_names(model):
        path = tmp_path / "damaged.gguf"
        shutil.copy(model, path)
        damage(path, name, value)
        with Runner(path) as runner:
            ids = np.array([5, 6, 7, 8, 9])
            for logits in (runner.prefill(ids), runner.decode(ids[:2])):
                assert not np.isfinite(logits[-1]).all(), name
