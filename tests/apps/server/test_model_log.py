"""What the model says of itself is in the server's log, as lines of JSON where those are asked for."""

import json
import logging

import pytest

from kimi_lite.apps.server import log


@pytest.fixture(autouse=True)
def _loggers():
    """As they were."""
    loggers = [log.logger, logging.getLogger("kimi_lite.model")]
    before = [(each.handlers[:], each.propagate, each.level) for each in loggers]
    yield
    for each, (handlers, propagates, level) in zip(loggers, before, strict=True):
        each.handlers[:], each.propagate = handlers, propagates
        each.setLevel(level)


@pytest.mark.parametrize("is_json", [True, False])
def test_the_models_lines(is_json, capsys):
    answers = log.set_up("info", is_json)
    logging.getLogger("kimi_lite.model.hybrid.adaptive").info("up to %d\x1b[2J a step", 4)
    answers.left_out(["search"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    if is_json:
        assert [json.loads(line)["message"] for line in lines][1] == "tools left out: search"
        assert json.loads(lines[0])["message"].startswith("up to 4") and "\x1b" not in json.loads(lines[0])["message"]
    else:
        assert "up to 4" in lines[0] and "tools left out" in lines[1]
