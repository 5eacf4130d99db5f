"""What model, cache and images say of themselves is in the server's log, as JSON where that is asked for."""

import json
import logging

import pytest

from kimi_lite.apps.server import log


@pytest.fixture(autouse=True)
def _loggers():
    """As they were."""
    loggers = [log.logger, logging.getLogger("kimi_lite")]
    before = [(each.handlers[:], each.propagate, each.level) for each in loggers]
    yield
    for each, (handlers, propagates, level) in zip(loggers, before, strict=True):
        each.handlers[:], each.propagate = handlers, propagates
        each.setLevel(level)


@pytest.mark.parametrize("part", ["model.hybrid.adaptive", "kv.host", "media.features"])
@pytest.mark.parametrize("is_json", [True, False])
def test_the_models_lines(is_json, part, capsys):
    answers = log.set_up("info", is_json)
    logging.getLogger(f"kimi_lite.{part}").warning("up to %d\x1b[2J a step", 4)
    answers.left_out(["search"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "\x1b" not in lines[0]
    if is_json:
        assert [json.loads(line)["message"] for line in lines][1] == "tools left out: search"
        assert json.loads(lines[0])["message"].startswith("up to 4") and "\x1b" not in json.loads(lines[0])["message"]
    else:
        assert "up to 4" in lines[0] and "tools left out" in lines[1]
