"""Records of routing: what was chosen comes back, and damaged files are refused."""

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.recorder import RoutingRecorder, read_trace
from kimi_lite.gguf.store import GGUFStore
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_tiny_gguf(
        tmp_path_factory.mktemp("routing") / "tiny.gguf", np.random.default_rng(0), num_experts_used=3
    )
    return ModelConfig.from_metadata(GGUFStore.open(path).metadata)


def test_what_was_chosen_comes_back(tmp_path, config):
    rng, want = np.random.default_rng(0), []
    recorder = RoutingRecorder(tmp_path / "trace.npz", config)
    for num_tokens in (700, 1, 1, 2500, 1):
        recorder.begin(num_tokens)
        chosen = rng.integers(0, 8, (num_tokens, 3, 3)).astype(np.int32)
        for layer in (1, 2):
            recorder.add(layer, chosen[:, layer])
        if num_tokens == 2500:
            recorder.drop()
        else:
            want.append(chosen)
    assert not list(tmp_path.iterdir())
    recorder.close()
    recorder.close()
    trace = read_trace(tmp_path / "trace.npz")
    assert np.array_equal(trace.ids[:, 1:], np.concatenate(want)[:, 1:]) and (trace.ids[:, 0] == -1).all()
    assert trace.starts.tolist() == [0, 700, 701, 702, 703]
    assert (trace.num_experts, trace.num_layers, trace.moe_layers.tolist(), trace.name) == (8, 3, [1, 2], "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_nothing_was_run(tmp_path, config):
    RoutingRecorder(tmp_path / "trace.npz", config).close()
    assert len(read_trace(tmp_path / "trace.npz").ids) == 0


def test_where_it_cannot_write_it_says_so_at_once(tmp_path, config):
    with pytest.raises(KimiLiteError, match="cannot write"):
        RoutingRecorder(tmp_path / "no" / "trace.npz", config)
    with pytest.raises(KimiLiteError, match="cannot write"):
        RoutingRecorder(tmp_path, config)


def test_other_files_are_refused(tmp_path, config):
    path = tmp_path / "trace.npz"
    with pytest.raises(KimiLiteError, match="is not a record of routing"):
        read_trace(path)
    path.write_bytes(b"GGUF and more")
    with pytest.raises(KimiLiteError, match="is not a record of routing"):
        read_trace(path)
    good = {
        "ids": np.zeros((2, 3, 1), np.int16),
        "starts": np.array([0, 2]),
        "shape": np.array([3, 8, 1, 1]),
        "name": "x",
    }
    for key, bad in (
        ("ids", np.full((2, 3, 1), 8, np.int16)),
        ("ids", np.zeros((2, 3, 2), np.int16)),
        ("starts", np.array([0, 3])),
        ("starts", np.array([2, 1, 2])),
        ("shape", np.array([3, 8, 1, 2])),
    ):
        np.savez(path, **(good | {key: bad}))
        with pytest.raises(KimiLiteError, match="damaged or foreign"):
            read_trace(path)
    np.savez(path, **good)
    assert read_trace(path).num_experts == 8
