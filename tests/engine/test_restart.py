"""A long prompt costs its prefill once: another engine finds it on disk and answers the same, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.cli import app
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.options import Options
from tests.tiny import write_tiny_gguf

SYSTEM = np.random.default_rng(1).integers(0, 256, 400).tolist()  # six whole pages and a tail of 16


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", np.random.default_rng(0))


def answer(engine: Engine, name: str, prompt: list[int]) -> tuple[list[int], list[np.ndarray], int]:
    """Ids, the logits of every step, and how many prompt tokens were cached."""
    forward, seen = engine.model.forward, []

    def watched(batch, should_stop=None):
        seen.append(forward(batch, should_stop))
        return seen[-1]

    engine.model.forward = watched
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens = list(engine.generate([Request(name, tuple(prompt), sampling)]))
    engine.model.forward = forward
    return [token.id for token in tokens if token.id is not None], seen, tokens[-1].stats.cached_tokens


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_a_restart_answers_as_if_it_had_never_ended(kv_dtype: str, model_path: Path, tmp_path: Path) -> None:
    options = Options(context_length=1024, num_threads=2, kv_dtype=kv_dtype)
    saving = replace(options, prefix_folder=tmp_path)
    question = [*SYSTEM[:390], *range(20)]
    with load(model_path, options) as engine:  # a process that goes on
        answer(engine, "a", SYSTEM)
        want = [answer(engine, name, prompt) for name, prompt in (("b", question), ("c", SYSTEM))]
    with load(model_path, saving) as engine:
        answer(engine, "a", SYSTEM)
    with load(model_path, saving) as engine:
        have = [answer(engine, name, prompt) for name, prompt in (("b", question), ("c", SYSTEM))]
        assert engine.counters()["prefix_pages_found"] == 7
    assert [cached for _, _, cached in have] == [cached for _, _, cached in want] == [390, 399]
    assert [ids for ids, _, _ in have] == [ids for ids, _, _ in want]
    for (_, logits, _), (_, want_logits, _) in zip(have, want, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(logits, want_logits, strict=True))


def test_another_dtype_or_model_finds_nothing(model_path: Path, tmp_path: Path) -> None:
    options = Options(context_length=512, num_threads=1, prefix_folder=tmp_path)
    with load(model_path, options) as engine:
        answer(engine, "a", SYSTEM)
    other = write_tiny_gguf(tmp_path / "other.gguf", np.random.default_rng(5))
    for path, kv_dtype in ((model_path, "q8"), (other, "f16")):
        with load(
            path, Options(context_length=512, num_threads=1, kv_dtype=kv_dtype, prefix_folder=tmp_path)
        ) as engine:
            assert answer(engine, "b", SYSTEM)[2] == 0


def test_the_command_line_keeps_prefixes_unless_told_not_to(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path / "cache"))
    document = tmp_path / "document.txt"
    document.write_text("All that is known about foxes. " * 15)
    command = ["run", "-m", str(model_path), "-c", "1024", "-n", "2", "--json", "-q", "-f", str(document)]

    def cached_tokens(*flags: str) -> int:
        done = CliRunner().invoke(app, [*command, *flags])
        return json.loads(done.stdout)["stats"]["cached_tokens"]

    assert cached_tokens("--no-prefix-cache") == 0
    assert not (tmp_path / "cache" / "prefixes").exists()
    assert [cached_tokens(), cached_tokens()][1] >= 256
    assert cached_tokens("--no-prefix-cache") == 0
