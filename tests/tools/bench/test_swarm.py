"""What a swarm gains: the unions of experts against counting by hand, and both measurements on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.recorder import RoutingTrace
from kimi_lite.options import Options
from kimi_lite.tools.bench import swarm
from kimi_lite.tools.bench.swarm import FASTEST, MODES, SLOWEST, SwarmBench
from tests.tiny import write_tiny_gguf

AGENTS, CONTEXT, TOKENS = 3, 300, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", np.random.default_rng(0))


def test_the_modes_read_and_say_what_they_should(tiny: Path) -> None:
    bench = SwarmBench(Options(model=str(tiny), num_threads=1), AGENTS, CONTEXT, TOKENS)
    try:
        rounds = {mode.name: bench.run(mode) for mode in [*MODES, *MODES]}  # the second time finds nothing of the first
    finally:
        bench.close()
    assert {one.num_tokens for one in rounds.values()} == {AGENTS * TOKENS}
    assert len({one.prompt_tokens for one in rounds.values()}) == 1
    for is_shared in (True, False):
        cached = [rounds[mode.name].cached_tokens for mode in MODES if mode.is_shared == is_shared]
        common = (AGENTS - 1) * CONTEXT
        assert min(cached) >= common if is_shared else max(cached) < 64 * AGENTS


def test_the_tables_and_documents_on_a_tiny_model(tiny: Path) -> None:
    shown = CliRunner().invoke(swarm.app, ["agents", "-m", str(tiny), "--agents", "2", "--context", "64", "-n", "2",
                                           "-r", "1", "-t", "1"])  # fmt: skip
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout.splitlines()[-1])
    assert set(document["modes"]) == {mode.name for mode in MODES}
    assert document["speed_up"][SLOWEST] == {"mean": 1.0, "sd": 0.0}
    assert document["speed_up"][FASTEST]["mean"] > 0
    shown = CliRunner().invoke(swarm.app, ["experts", "-m", str(tiny), "-b", "1,3", "-n", "12", "-t", "1"])
    assert shown.exit_code == 0, shown.output
    one, three = json.loads(shown.stdout.splitlines()[-1])["rows"]
    top_k = one["experts_per_token"]
    assert top_k == one["uniform"] == one["predicted"]
    assert top_k / 3 <= three["experts_per_token"] < top_k
    assert three["num_steps"] >= 8
    assert three["tok_s"] > 0


def test_a_model_without_experts_is_told(tmp_path: Path) -> None:
    dense = write_tiny_gguf(tmp_path / "dense.gguf", np.random.default_rng(0), num_dense_layers=3)
    with pytest.raises(KimiLiteError, match="no routed experts"):
        swarm.read_experts(Options(model=str(dense), num_threads=1), [1, 2], 4)


def test_too_few_tokens_to_predict_from_are_told(tiny: Path) -> None:
    with pytest.raises(KimiLiteError, match="from 8 tokens of one sequence alone"):
        swarm.read_experts(Options(model=str(tiny), num_threads=1), [1, 8], 8)


def made_trace() -> RoutingTrace:
    """Two layers, the first dense; 5 experts, top 2; passes of 1, 2, 1 and 2 tokens."""
    chosen = np.array([[0, 1], [0, 1], [0, 1], [2, 3], [0, 1], [1, 4]], np.int16)
    ids = np.stack([np.full_like(chosen, -1), chosen], axis=1)
    return RoutingTrace("made", 5, ids, np.array([0, 1, 3, 4, 6]))


def test_a_step_reads_the_union_of_what_its_tokens_chose() -> None:
    trace = made_trace()
    assert swarm.measured_union(trace, 1) == 2
    assert swarm.measured_union(trace, 2) == (2 + 3) / 2  # {0, 1} and {0, 1, 4}


def test_the_prediction_draws_tokens_that_were_alone() -> None:
    trace = made_trace()
    alone = np.array([[0], [1], [2], [3]])  # {0, 1} three times and {2, 3}: two of them are 2 or 4 experts, as often
    assert swarm.predicted_union(trace, alone, 1) == 2
    assert abs(swarm.predicted_union(trace, alone, 2) - 3) < 0.2
    assert swarm.predicted_union(trace, alone, 4) == 4
    same = replace(trace, ids=np.repeat(trace.ids[:1], 6, axis=0))
    assert swarm.predicted_union(same, alone, 3) == 2
