"""The bar of the context and the map of the experts' heat."""

from pathlib import Path

import numpy as np
import pytest

from kimi_lite.apps.chat.pictures import bar, heat_rows
from tests.model.runner import Runner
from tests.tiny import write_tiny_gguf

SLOTS_BYTES = 8 * 3 * 3 * 256 * 256 * 4  # eight of the experts of three layers, in float32


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, "░░░░"), (0.5, "██░░"), (1.0, "████"), (1.7, "████"), (-1.0, "░░░░")]
)
def test_the_bar_is_as_full_as_the_context(share: float, expected: str) -> None:
    assert bar(share, 4) == expected


def test_the_map_sorts_experts_and_groups_layers() -> None:
    heat = np.zeros((60, 384))
    heat[1:, ::2] = 1.0
    *rows, legend = heat_rows(heat, 96)
    assert len(rows) == 16
    assert rows[-1] == " 57 " + "█" * 48 + " " * 48
    assert "384 experts a layer" in legend
    assert "20 %" in legend  # the first tenth of equals
    assert max(map(len, rows)) == 100
    assert "#" in heat_rows(heat, 96, is_ascii=True)[-2]


def test_a_cold_map_says_so() -> None:
    assert heat_rows(np.zeros((3, 8)), 40) == ["no expert has been used yet"]


def test_the_disk_tier_gives_the_heat_that_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    sizes = {
        "num_layers": 4,
        "num_experts": 24,
        "num_experts_used": 3,
        "hidden_size": 256,
        "expert_feed_forward_size": 256,
    }
    write_tiny_gguf(path, np.random.default_rng(0), **sizes)
    with Runner(path) as runner:
        assert runner.transformer.heat() is None
    with Runner(path, ram_expert_bytes=SLOTS_BYTES) as runner:
        assert runner.transformer.heat().max() == 0
        runner.prefill(np.arange(40))
        heat = runner.transformer.heat()
        assert heat.shape == (runner.config.num_layers, runner.config.num_experts)
        assert heat.max() > 0
        assert len(heat_rows(heat, 60)) == runner.config.num_layers + 1
