"""disk_tier: both paths decode the same, the disk is measured by the readers, cgroups are left as they were."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.arch.config import ModelConfig
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.options import Options
from kimi_lite.tools.bench import disk_tier
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk_tier")
    return write_tiny_gguf(folder / "tiny.gguf", np.random.default_rng(0), num_experts=32, hidden_size=512)


def test_both_paths_decode_the_same(path):
    store = GGUFStore.open(path)
    index = ExpertIndex.find(store, ModelConfig.from_metadata(store.metadata))
    tier = disk_tier.decode(path, 6, Options(num_threads=1, ram_expert_bytes=index.routed_bytes // 3))
    mapped = disk_tier.decode(path, 6, Options(num_threads=1))
    assert tier["checksum"] == mapped["checksum"]
    assert tier["expert_hits"] + tier["expert_late"] + tier["expert_misses"] > 0 and "expert_hits" not in mapped
    assert disk_tier.measure_disk(index, 2, is_direct=True, seconds=0.2) > 1e6


def test_the_command_without_a_cgroup(path, monkeypatch, tmp_path):
    monkeypatch.setattr(disk_tier, "_CGROUPS", (tmp_path / "nowhere",))
    monkeypatch.setattr(disk_tier, "measure_disk", lambda *_: 1e9)
    few = Options(num_threads=1, ram_expert_bytes=4_000_000)
    monkeypatch.setattr(disk_tier, "_child", lambda arguments, group: disk_tier.decode(path, 4, few))
    run = CliRunner().invoke(disk_tier.app, ["-m", str(path), "--share", "0.5", "-n", "4"])
    assert run.exit_code == 0, run.output
    assert "memory mapping under a limit was not measured" in run.stdout
    document = json.loads(run.stdout.strip().rpartition("\n")[2])
    assert set(document["paths"]) == {"tier"} and document["share_of_bound"] > 0


def test_a_cgroup_is_removed(tmp_path, monkeypatch):
    base = tmp_path / "memory"
    base.mkdir()
    monkeypatch.setattr(disk_tier, "_CGROUPS", (base,))
    with disk_tier.memory_cgroup(5 << 20) as group:
        limit = group / "memory.limit_in_bytes"
        assert limit.read_text() == str(5 << 20)
        limit.unlink()  # a real one goes with its folder
    assert not list(base.iterdir())
