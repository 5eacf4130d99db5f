"""What `-m` may name: a path, nothing, or a model by name, in every command that opens one."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kimi_lite.apps.model_path import find_model
from kimi_lite.arch.known import KNOWN
from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options

NAMES = [*KNOWN, *(alias for known in KNOWN.values() for alias in known.aliases)]


@pytest.mark.parametrize("name", [*NAMES, "moonshotai/Kimi-K2.5", "deepseek-ai/DeepSeek-V2-Lite"])
def test_a_known_name_says_where_the_model_comes_from(name):
    with pytest.raises(KimiLiteError, match="G parameters; -m wants its file") as caught:
        find_model(Options(model=name))
    plan, download, quantize = caught.value.hint.splitlines()
    assert plan.startswith("1. kimi-lite plan -m ") and "GiB" in quantize
    assert ("kimi-lite pull " + (name if "/" in name else "OWNER/REPO")) in download


@pytest.mark.parametrize(
    "arguments",
    [["chat"], ["run", "hi"], ["bench"], ["doctor", "--quick"], ["imatrix", "-f", __file__]],
    ids=lambda arguments: arguments[0],
)
def test_every_command_says_so(arguments):
    done = CliRunner().invoke(app, [*arguments, "-m", "kimi-k2.5"])
    assert isinstance(done.exception, KimiLiteError) and "names Kimi K2.5" in done.exception.message


def test_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model(Options(model="~/x.gguf")) == tmp_path / "x.gguf"
    (tmp_path / "kimi-k2.5").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model(Options(model="kimi-k2.5")) == Path("kimi-k2.5")
    monkeypatch.setattr("kimi_lite.demo.build.ensure_demo_model", lambda on_progress: Path("demo.gguf"))
    assert find_model(Options()) == Path("demo.gguf")
