"""Every command that a README shows is run here: as it stands where that takes no model, else on a tiny one."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.apps.swarm.journal import Journal
from kimi_lite.apps.swarm.runs import RunStore
from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from tests.apps.swarm.plausible import Run
from tests.tiny import write_tiny_gguf

ROOT = Path(__file__).parents[1]
_PLACES = ("*/README.md", "tools/*/README.md", "kimi_lite/apps/**/README.md")
READMES = [ROOT / "README.md", *(path for place in _PLACES for path in sorted(ROOT.glob(place)))]


def commands(path: Path) -> list[str]:
    """Lines of shell blocks and indented `kimi-lite` lines, without their remarks."""
    text = path.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if re.match(r"    (kimi-lite|python -m) ", line)]
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.strip()]


def spans(path: Path) -> list[str]:
    """Commands inside sentences."""
    text = path.read_text(encoding="utf-8").replace("\n", " ")
    return [span for span in re.findall(r"`([^`]+)`", text) if re.match(r"(kimi-lite|python -m) ", span)]


ALL = sorted({line for path in READMES for line in commands(path)})
SHOWN = [line for line in ALL if "kimi-lite" in line and ".venv" not in line]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with what the commands name, all of it tiny."""
    rng = np.random.default_rng(0)
    write_tiny_gguf(tmp_path / "tiny.gguf", rng)
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "kimi-k2.5-tq1_0.gguf")
    (tmp_path / "corpus").mkdir()
    for text in ("text.txt", "corpus/calibration.txt"):
        (tmp_path / text).write_text("It is a truth universally acknowledged. " * 200)
    monkeypatch.setenv("KIMI_LITE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("KIMI_LITE_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kimi_lite(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kimi_lite", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment, timeout=250, check=False
    )


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def in_this_process(*arguments: str) -> Done:
    """What a child would do, without its second of imports: for commands that read no pipe and end by themselves."""
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, KimiLiteError):
        return Done(2, result.stdout, f"{result.stderr}{result.exception}")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def test_the_face_shows_the_commands_that_there_are():
    shown = " ".join(commands(ROOT / "README.md"))
    listed = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {"chat", "run", "serve", "plan", "doctor", "quantize", "imatrix", "bench"} <= listed
    assert all(f"kimi-lite {name}" in shown for name in ("chat", "run", "serve", "plan", "doctor", "quantize", "bench"))
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_plan_and_doctor_as_shown(place):
    for line in [line for line in SHOWN if re.match(r"kimi-lite (plan|doctor)\b", line)]:
        done = in_this_process(*shlex.split(line)[1:], *(["--quick"] if "doctor" in line else []))
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (line, done.stderr)
        assert done.returncode == 0 or "doctor" in line, (line, done.stderr)


def test_chat_and_run_as_shown(place):
    piped = kimi_lite(
        "run", "-p", "Write a commit message for this.", "--json", "-m", "tiny.gguf", "-n", "4", stdin="a diff"
    )
    assert piped.returncode == 0 and json.loads(piped.stdout)["stats"]["prompt_tokens"] > 30, piped.stderr
    for line in [line for line in SHOWN if line.startswith("kimi-lite chat")]:
        arguments = shlex.split(line)[1:]
        if "--endpoint" in arguments:
            continue  # tests/apps/remote
        model = [] if "-m" in arguments else ["-m", "tiny.gguf"]
        done = kimi_lite(*arguments, *model, "-n", "4", stdin="Hello\n")
        assert done.returncode == 0, (line, done.stderr)


def test_quantize_imatrix_and_bench_as_shown(place):
    matrix = in_this_process(
        "imatrix", "-m", "tiny.gguf", "-f", "text.txt", "-o", "importance.gguf", "-c", "64", "--chunks", "1"
    )
    assert matrix.returncode == 0 and Path("importance.gguf").is_file(), matrix.stderr
    for line in [line for line in SHOWN if line.startswith("kimi-lite quantize")]:
        _, _, source, target, *rest = shlex.split(line)
        done = in_this_process("quantize", "tiny.gguf", f"out-{abs(hash(line))}.gguf", *rest)
        assert done.returncode == 0, (line, source, target, done.stderr)
    done = kimi_lite("bench", "-m", "tiny.gguf", "-p", "16", "-n", "4", "-r", "1", "-o", "json")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_views_of_a_swarm_as_shown(place):
    shown = [shlex.split(line)[1:] for line in SHOWN if re.match(r"kimi-lite swarm (list|show|delete)\b", line)]
    assert {words[1] for words in shown} == {"list", "show", "delete"}
    run = RunStore().create().rename(RunStore().folder / "2026-11-29_02-10-45")
    with Journal(run) as journal:
        for event in Run(2, 1).events():
            journal(event)
    for words in sorted(shown, key=lambda words: words[1] == "delete"):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
    assert {"run.html", "timeline.svg"} <= set(os.listdir()) and not run.exists()


def test_a_swarm_by_the_plan_that_is_shown(place):
    text = (ROOT / "kimi_lite/apps/swarm/README.md").read_text(encoding="utf-8")
    Path("plan.toml").write_text(
        next(block for block in re.findall(r"```toml\n(.*?)```", text, re.S) if "stages" in block)
    )
    line = next(line for line in SHOWN if line.startswith("kimi-lite swarm --plan"))
    done = kimi_lite(*shlex.split(line)[1:], "-m", "tiny.gguf", "-n", "4", "-c", "4096")
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr  # 2: it may say nothing at all
    assert "stage 1: 2 agents" in done.stderr and "stage 2: 1 agent" in done.stderr and "3 agents" in done.stderr


def test_serve_as_shown(place):
    pytest.importorskip("uvicorn", reason="needs the server extra")
    command = [
        sys.executable,
        "-m",
        "kimi_lite",
        "serve",
        "--parallel",
        "4",
        "-m",
        "tiny.gguf",
        "--port",
        "0",
        "-c",
        "256",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        address = next(line.split()[-1] for line in server.stderr if "listens on" in line)
        with urllib.request.urlopen(f"{address}/health", timeout=120) as response:
            assert json.load(response)["status"] == "ok"
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0


@cache
def help_of(command: str) -> str:
    return in_this_process(*command.split(), "--help").stdout


@pytest.mark.parametrize("span", sorted({span for path in READMES for span in [*spans(path), *commands(path)]}))
def test_what_sentences_name_is_there(span):
    """`python -m tools.X` is a module, and every flag of a `kimi-lite` command is one it has."""
    if (match := re.search(r"python -m (tools[\w.]*)", span)) and "NAME" not in span:
        place = ROOT.joinpath(*match[1].split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), span
    if match := re.match(r"(?:git diff \| )?kimi-lite ((?:swarm (?:resume|show|list|delete)\b)|\w+)(.*)", span):
        words = help_of(match[1])
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", match[2]):
            assert flag in words, (flag, span)
