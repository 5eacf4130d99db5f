"""Vision files with random weights: the size that is said, and what is refused."""

from dataclasses import replace

import pytest

from kimi_lite.arch.known import KNOWN
from kimi_lite.arch.moonvit import read_vision_file
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.tools.make.vision import TOWERS, write_tower


def test_true_sizes():
    """The published tensors' bytes in bfloat16."""
    for name, tower in TOWERS.items():
        assert 2 * tower.num_weights == KNOWN[name].vision_bytes


def test_a_file_is_what_its_tower_says(tmp_path):
    tower = replace(TOWERS["kimi-k2.5"], layers=1, hidden=64, heads=4, feed_forward=80, height=4, width=6, eps=0.5)
    num_bytes = write_tower(tmp_path / "a.gguf", tower, "q8_0")
    assert num_bytes == (tmp_path / "a.gguf").stat().st_size
    store = GGUFStore.open(tmp_path / "a.gguf")
    assert read_vision_file(store).tower == tower
    types = {store.tensor(f"v.blk.0.{name}.weight").layout.name for name in ("attn_qkv", "ffn_up")}
    assert types == {"Q8_0"} and store.tensor("v.blk.0.ffn_down.weight").layout.name == "F16"  # rows of 80
    with pytest.raises(KimiLiteError, match="exists"):
        write_tower(tmp_path / "a.gguf", tower)
