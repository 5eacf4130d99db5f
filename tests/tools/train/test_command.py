"""The commands that the README shows, on a model of two layers; downloads are replaced by archives of the same form."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

from typer.testing import CliRunner

from kimi_lite.engine.scoring import TEXT
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe
from kimi_lite.tools.train.__main__ import app
from kimi_lite.tools.train.train import read_metrics

README = Path(__file__).parents[3] / "tools/train/README.md"


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.output


def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    for name in ("shakespeare", "calibration"):
        Path(f"corpus/{name}.txt").write_text(TEXT.read_text()[:20_000])
    small = {"new": ["--layers", "2", "--vocab", "512", "--experts", "2", "--top", "1"]}
    small["run"] = ["--steps", "2", "--batch", "1", "--length", "16", "-t", "1"]
    small["compare"] = ["--minutes", "0.0001", "--seeds", "1", "--batch", "1", "--length", "16", "-t", "1"]
    joined = re.sub(r"\\\n\s*", "", README.read_text())
    lines = re.findall(r"^python -m tools\.train (.*?)(?:\s+#.*)?$", joined, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"texts", "new", "run", "compare", "plot"}
    can_plot = find_spec("matplotlib") is not None  # pip install 'kimi-lite[tools]' brings it
    for line in lines:
        what, *rest = shlex.split(line)
        if what == "texts" or (
            what == "plot" and find_spec("matplotlib") is None
        ):  # test_texts; kimi-lite[tools] brings it
            continue
        if "demo.gguf" in rest:
            convert(tmp_path / "first/model", tmp_path / "demo.gguf", "q8_0")
            convert(tmp_path / "demo.gguf", tmp_path / "calibrated.gguf", find_recipe("tq1_0"))
        call(what, *rest, *small.get(what, []))
    assert len(list(read_metrics(Path("first")))) == 2
    assert not can_plot or "</svg>" in Path("first.svg").read_text()
    assert Path("lowbit/model.gguf").stat().st_size > 1e6


def test_what_cannot_be_is_said_in_a_sentence(tmp_path):
    for arguments, words in (
        (("run", str(tmp_path / "r"), str(tmp_path), "--optimizer", "sgd"), "--optimizer is 'sgd'"),
        (("run", str(tmp_path / "r"), str(tmp_path), "--trained", "norms"), "Choose one of all, experts"),
        (("run", str(tmp_path / "r"), str(tmp_path)), "has no config.json"),
        (("compare", str(tmp_path / "r"), str(tmp_path), "--try", "adam:0.1"), "--try is 'adam'"),
        (("compare", str(tmp_path / "r"), str(tmp_path), "--try", "adamw"), "Write it as muonclip:0.01"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and words in done.output, (arguments, done.output)
