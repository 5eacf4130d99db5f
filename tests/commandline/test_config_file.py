"""The configuration file: defaults for flags, behind the command line and the environment; mistakes in it are
sentences."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kimi_lite.apps import opening
from kimi_lite.apps.folders import state_folder
from kimi_lite.cli import app
from kimi_lite.commandline.config_file import config_path, read_settings
from kimi_lite.commandline.flags import resolve
from kimi_lite.engine.engine import Engine
from kimi_lite.errors import KimiLiteError
from tests.apps.fake_main import open_fake


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Engines are fake; the list holds those that were opened."""
    engines: list[Engine] = []
    monkeypatch.setattr(opening, "load", lambda *arguments: engines.append(open_fake(*arguments)) or engines[-1])
    return engines


def configure(text: str) -> None:
    Path(os.environ["KIMI_LITE_CONFIG"]).write_text(text)


def invoke(*arguments: str, stdin: str = "", **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, env=environment)


def test_a_configured_model_and_settings_need_no_flags(opened: list[Engine]) -> None:
    configure('model = "~/mine.gguf"\nctx = "1K"\nthink = false\nmax-tokens = 3\n')
    result = invoke("run", "hi")
    assert opened[0].opened_with[0] == Path("~/mine.gguf").expanduser()
    assert opened[0].context_length == 1024
    assert "demo" not in result.stderr
    assert "about it" not in result.stderr
    assert "gen 3 tok" in result.stderr
    assert "thinking off" in invoke("chat", stdin="hi\n").stderr


def test_flags_go_before_the_environment_and_that_before_the_file(opened: list[Engine]) -> None:
    configure('model = "file.gguf"\nctx = 512\nthreads = 2\n')
    invoke("run", "hi", "-c", "2K", KIMI_LITE_CTX="1K", KIMI_LITE_MODEL="environment.gguf")
    path, load = opened[0].opened_with
    assert (path, load.context_length, load.num_threads) == (Path("environment.gguf"), 2048, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modl = 'x'", "sets 'modl', which is not an option. Did you mean model?"),
        ("model = ", "cannot be read"),
        ("[model]\npath = 'x'", "sets 'model' to a dict"),
        ("model = 2026-01-01", "sets 'model' to a date"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(KimiLiteError, match=r"bad\.toml") as error:
        read_settings(tmp_path / "bad.toml")
    assert message in str(error.value)


def test_values_are_as_on_the_command_line(tmp_path: Path) -> None:
    configure('ctx = 4096\ntemp = 0.5\nthink = true\nmodel = "a b"\n')
    options = resolve("run", {})
    assert (options.context_length, options.temperature, options.is_thinking, options.model) == (4096, 0.5, True, "a b")
    assert read_settings(tmp_path / "none.toml") == {}


def test_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KIMI_LITE_STATE")
    monkeypatch.delenv("KIMI_LITE_CONFIG")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "c"))
    assert state_folder() == tmp_path / "s" / "kimi-lite"
    assert config_path() == tmp_path / "c" / "kimi-lite" / "config.toml"


def test_continue_and_session_contradict_each_other() -> None:
    result = invoke("chat", "-m", "x", "--continue", "--session", "a")
    assert isinstance(result.exception, KimiLiteError)
    assert "both given" in str(result.exception)
