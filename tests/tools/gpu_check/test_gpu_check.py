"""`tools.gpu_check` without a GPU: no failure stops it, all stages run on the stand-in, what it needs is carried."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton exists on Linux alone")

from kimi_lite.tools.gpu_check import prepare, report, stage
from kimi_lite.tools.gpu_check.__main__ import GROUPS
from kimi_lite.tools.gpu_check.settings import Settings

_ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.gpu_check", "--stand-in", *arguments]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_a_stage_that_fails_stops_no_other(tmp_path):
    """An error, a hang and a crash, each in a stage of its own; the others are done, and all of it is told."""
    faults = {"machine": "error", "graphs": "hang", "kernels": "crash"}
    stages = f"--stages={','.join((*faults, 'compile', 'launchers'))}"
    result = run("--out", str(tmp_path), "--minutes=0.3", stages, *(f"--fail={k}={v}" for k, v in faults.items()))
    assert result.returncode == 1, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    ends = {line["stage"]: line["value"] for line in lines if line["name"] == "stage"}
    assert ends["machine"] == "failed" and ends["kernels"] == "died of signal 6" and "stopped after" in ends["graphs"]
    assert ends["compile"] == ends["launchers"] == "done"
    assert any("an error on request" in line.get("log", "") for line in lines)
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["tool"] == "gpu_check" and not last["ok"] and last["results"] == lines
    for name, end in ends.items():
        assert f"| {name} | {end} |" in result.stdout


def test_no_time_is_left(tmp_path):
    result = run("--out", str(tmp_path), "--minutes=0.01", "--stages=compile,launchers")
    assert result.stdout.count("| skipped |") == 2 and result.returncode == 1, result.stdout


def test_an_unknown_stage(tmp_path):
    result = run("--out", str(tmp_path), "--stages=nothing")
    assert result.returncode != 0 and "there are compile, copies" in result.stderr


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_check")
    return Settings(out=folder, scratch=folder, is_stand_in=True, expert_layers=1)


def results_of(name: str, settings: Settings, capfd: pytest.CaptureFixture) -> dict[str, dict]:
    """What the stage tells, by name."""
    capfd.readouterr()
    stage.run(name, settings)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in map(json.loads, lines)}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets kernels
@pytest.mark.parametrize("name", [name for name in stage.STAGES if name != "machine"])
def test_every_stage_on_the_stand_in(name, settings, capfd):
    found = results_of(name, settings, capfd)
    assert found and all(line["ok"] for line in found.values()), found
    wanted = {result for _, place, result in report.NUMBERS if place == name}
    assert {each for each in wanted if "512" not in each and "8192" not in each} <= found.keys(), "the table has gaps"


def test_the_machine(settings, capfd, monkeypatch):
    monkeypatch.setattr("kimi_lite.tools.gpu_check.machine._ram_read", lambda: None)
    found = results_of("machine", settings, capfd)
    assert "torch" in found["versions"]["value"] and found["usable"]["ok"] and found["gpu"]["value"] == "a stand-in"


def test_every_stage_has_a_place_and_a_limit():
    known = [each.name for group in GROUPS for each in group]
    assert sorted(known) == sorted(stage.STAGES)
    assert sum(max(each.limit_s for each in group) for group in GROUPS) <= 8 * 60


def test_settings_travel(settings):
    assert Settings.from_json(settings.to_json()) == settings
    other = replace(settings, types=("TQ1_0",), fault="hang", shard=2, num_shards=3)
    assert Settings.from_json(other.to_json()) == other


def test_a_wrong_kernel_is_seen(settings, capfd, monkeypatch):
    """One that leaves out a row, one that raises."""
    from kimi_lite.tools.gpu_check import kernels

    def first_row_again(x, data, name, k):
        y = kernels.torch.from_numpy(kernels.decoded(data.numpy(), name)).double()
        y = (x.double() @ y.T).float()
        y[:, 3] = y[:, 2]
        return y

    def refuse(*_):
        raise RuntimeError("LLVM ERROR: Illegal shared layout")

    monkeypatch.setattr(kernels, "linear", first_row_again)
    monkeypatch.setattr(kernels, "dequantize", refuse)
    wanted = ("linear Q8_0 T=1", "dequantize Q8_0", "router, ties")
    cases = kernels.cases
    monkeypatch.setattr(kernels, "cases", lambda *sizes: (each for each in cases(*sizes) if each.name in wanted))
    found = results_of("kernels", settings, capfd)
    assert {name for name, line in found.items() if not line["ok"]} == {*wanted[:2], "worst"}
    assert "Illegal shared layout" in found["dequantize Q8_0"]["value"] and found["compared"]["value"] == 3


def test_a_result_that_is_wrong_is_in_the_table():
    wrong = [{"stage": "hits", "name": f"case {i}", "value": 0.5, "unit": "", "ok": False} for i in range(12)]
    lines = [
        *wrong,
        {"stage": "hits", "name": "stage", "value": "12 wrong", "unit": "", "ok": False, "s": 1.0, "log": ""},
    ]
    table = "\n".join(report.table(lines))
    assert "wrong: hits case 0: 0.5" in table and "and 4 more" in table and "| hits | 12 wrong | 1.0 |" in table
    assert not json.loads(report.as_json(lines))["ok"]


def test_what_is_carried(tmp_path, monkeypatch):
    """Compiled for the machine's Triton and GPU into the folder, wheels for its Python."""
    called = []

    def record(command, env=None, check=False):
        called.append((command[2:], (env or {}).get("TRITON_CACHE_DIR")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(prepare.subprocess, "run", record)
    assert prepare.prepare(tmp_path, "3.6.0", "90", "3.12", "tq1_0") == 0
    (compiled, cache), (fetched, _) = called
    assert compiled == ["kimi_lite.tools.kernels.compile", "--arch", "90", "--triton", "3.6.0", "--types", "tq1_0"]
    assert cache == str(tmp_path / "triton-cache") and Path(cache).is_dir()
    assert (
        "--python-version=3.12" in fetched
        and "--only-binary=:all:" in fetched
        and {"gguf", "platformdirs", "nvidia-ml-py"} <= set(fetched)
    )
    assert not {"torch", "numba", "triton"} & set(fetched)


def test_wheels_of_what_is_missing_alone(tmp_path, monkeypatch):
    from kimi_lite.tools.gpu_check import __main__ as check

    names = ("numpy-9.9.9-cp312.whl", "nowhere_found-1.0-py3-none-any.whl", "markdown_it_py-4.3.0-py3-none-any.whl")
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in check._missing(tmp_path)] == ["nowhere_found-1.0-py3-none-any.whl"]
    called = []
    monkeypatch.setattr(check.subprocess, "run", lambda command, check: called.append(command))
    check._install(check._missing(tmp_path), tmp_path / "site")
    assert len(called) == 1 and called[0][-1].endswith("nowhere_found-1.0-py3-none-any.whl")
    assert "--no-deps" in called[0] and str(tmp_path / "site") in called[0]


def test_begins_where_nothing_is_installed(tmp_path):
    """The script itself imports the standard library alone: `-S` hides all packages from it, not from its stages."""
    code = (
        "import sys; sys.argv = ['gpu_check', '--stand-in', '--out', sys.argv[1], '--stages=compile']\n"
        "import tools.gpu_check.__main__ as check; check.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path)], cwd=_ROOT, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0 and "== compile: done" in result.stdout, result.stderr
