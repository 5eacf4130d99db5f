"""The whole path with a real (tiny, random) model file: store, tokenizer, cache, kernels, sampler, command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.engine import loader
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.session import Session
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options
from kimi_lite.plan.types import KV
from tests.tiny import write_tiny_gguf

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", np.random.default_rng(0))


def open_engine(path: Path, max_step_tokens: int = 512) -> Engine:
    engine = load(path, Options(context_length=512, num_threads=2, kv_dtype="f32"))
    engine.scheduler.max_step_tokens = max_step_tokens
    return engine


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 256, length).tolist())


def answer(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {request.id: [] for request in requests}
    for token in engine.generate(requests):
        ids[token.request_id] += [] if token.id is None else [token.id]
    return ids


def test_chunks_batches_and_restored_prefixes_give_the_same_tokens(model_path: Path) -> None:
    requests = [Request(str(i), prompt_of(70) + prompt_of(40 * i + 1, seed=i), GREEDY) for i in range(3)]
    engine = open_engine(model_path)
    together = answer(engine, *requests)
    again = answer(engine, *requests)
    chunked = answer(open_engine(model_path, max_step_tokens=9), *requests)
    alone = {}
    for request in requests:
        alone |= answer(open_engine(model_path), request)
    assert together == again == chunked == alone


def test_cancelled_in_the_middle_the_next_answer_is_right(model_path: Path) -> None:
    engine, request = open_engine(model_path), Request("a", prompt_of(300), GREEDY)
    forward, num_asked = engine.model.forward, 0

    def should_stop_once() -> bool:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 3:
            engine.cancel("a")
        return num_asked == 3

    engine.model.forward = lambda batch, should_stop: forward(batch, should_stop_once)
    assert answer(engine, request) == {"a": []}
    engine.model.forward = forward
    expected = answer(open_engine(model_path), Request("b", prompt_of(300), GREEDY))
    assert answer(engine, Request("b", prompt_of(300), GREEDY)) == expected


def test_a_conversation_reuses_its_cache(model_path: Path) -> None:
    engine = load(model_path, Options(context_length=512))
    session = Session(engine, settings=AnswerSettings(False, sampling=SamplingParams(max_tokens=10, seed=1)))
    first = list(session.ask("hello"))[-1].stats
    second = list(session.ask("more"))[-1].stats
    assert second.cached_tokens >= first.prompt_tokens
    assert len(session.messages) == 4


def test_run_on_a_real_file(model_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kimi_lite",
        "run",
        "-m",
        str(model_path),
        "-c",
        "512",
        "-n",
        "20",
        "--seed",
        "3",
        "--json",
    ]
    runs = [
        subprocess.run([*command, "hello"], cwd=ROOT, capture_output=True, text=True, timeout=120) for _ in range(2)
    ]
    first, second = (json.loads(done.stdout) for done in runs)
    assert first["ids"] == second["ids"]
    assert len(first["ids"]) <= 20
    assert first["model"] == "tiny"
    assert "Traceback" not in runs[0].stderr


def test_runtime_needs_no_torch(model_path: Path) -> None:
    code = (
        "import sys; from kimi_lite.engine.loader import load; from kimi_lite.engine.session import Session;"
        "from kimi_lite.options import Options;"
        f"list(Session(load({str(model_path)!r}, Options(context_length=128))).ask('hi'));"
        "print([m for m in ('torch', 'transformers', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_model_is_a_sentence_not_a_traceback() -> None:
    command = [sys.executable, "-m", "kimi_lite", "run", "-m", "/no/such/model.gguf", "hi"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "/no/such/model.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_context_is_what_model_and_memory_allow(model_path: Path) -> None:
    for asked, have in ((None, 4096), (0, 4096), (1000, 1000)):
        with load(model_path, Options(context_length=asked, num_threads=1)) as engine:
            assert engine.context_length == have
    with pytest.raises(KimiLiteError, match=r"--kv-dtype is 'q4'; it must be one of f16"):
        Options(kv_dtype="q4")
    with pytest.raises(KimiLiteError, match=r"5,000 tokens is wanted; the model is made for 4,096"):
        load(model_path, Options(context_length=5000))
    with pytest.raises(KimiLiteError, match=r"RAM are needed .*; --ram allows 0"):
        load(model_path, Options(ram_bytes=10 << 20))


def test_the_cache_serves_as_many_sequences_as_asked(model_path: Path) -> None:
    with load(model_path, Options(context_length=1000, num_sequences=3, num_threads=1)) as engine:
        assert engine.context_length == 1000 and engine.kv.num_pages == 3 * 16
        assert engine.plan.part_bytes("RAM", KV) == engine.kv.storage.nbytes


def test_what_the_plan_says_is_allocated(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan, and other allocations: nothing decides again after it."""
    made = loader.plan_load

    def other_plan(*arguments):
        plan = made(*arguments)
        few = plan.ram_expert_bytes // 2
        return replace(
            plan,
            context_length=640,
            num_cache_pages=25,
            num_threads=2,
            ram_expert_bytes=few,
            disk_expert_bytes=plan.ram_expert_bytes - few,
        )

    monkeypatch.setattr(loader, "plan_load", other_plan)
    with load(model_path, Options(num_threads=1)) as engine:
        assert (engine.context_length, engine.kv.num_pages, engine.model.team.num_threads) == (640, 25, 2)
        slots = engine.counters()["expert_slots"]
        assert 0 < slots * engine.plan.sizes.slot_bytes <= 1.01 * engine.plan.ram_expert_bytes
