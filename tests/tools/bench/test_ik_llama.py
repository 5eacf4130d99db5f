"""ik_llama.cpp in a process of its own: scripted where its wheel is absent, the wheel itself where it is installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench import bench, command
from kimi_lite.tools.bench.ik_llama import IkLlama
from kimi_lite.tools.bench.plan import BenchTest, Passages
from kimi_lite.tools.bench.roofline import Bandwidth
from tests.tiny import write_tiny_gguf

STAND_IN = Path(__file__).parent / "ik_stand_in"
SCHEMA = Path(bench.__file__).parents[1] / "data" / "bench.schema.json"


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN), prepend=":")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", np.random.default_rng(0))


def test_what_is_run_is_what_is_named(scripted, tmp_path):
    """The stand-in refuses positions that do not follow each other and more tokens than there are cells for."""
    passages = Passages(np.arange(5, 30, dtype=np.int32))
    other = IkLlama(tmp_path / "any.gguf", 1, 700, 3)
    for test in (BenchTest("pp", 600, 40), BenchTest("tg", 5, 40, 3), BenchTest("pp", 600, 40), BenchTest("tg", 4)):
        run = other.run(test, passages.prompts(test))
        assert run.num_tokens == test.total_tokens and run.seconds > 0 and run.waited_s >= 0
        assert len(run.gaps_s) == (test.num_tokens if test.kind == "tg" else 0)
    other.close()
    assert other.description == "ik_llama.cpp, wheel 0.0-scripted, AVX2 code"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refused.gguf", "ik_llama.cpp cannot load .*refused.gguf"),
        ("crash.gguf", r"ended while .* run the model .exit code 7.: ggml.c:12: GGML_ASSERT.false. failed"),
    ],
)
def test_errors_are_sentences(scripted, tmp_path, name, message):
    with pytest.raises(KimiLiteError, match=message):
        IkLlama(tmp_path / name, 1, 64).run(BenchTest("tg", 2), Passages(np.arange(9)).prompts(BenchTest("tg", 2)))


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch, tmp_path):
    (tmp_path / "ik_llama_cpp").mkdir()
    (tmp_path / "ik_llama_cpp" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with pytest.raises(KimiLiteError, match="cannot be imported") as caught:
        IkLlama(tmp_path / "any.gguf", 1, 64)
    assert "kimi-lite[ik]" in caught.value.hint


def test_the_table_says_which(scripted, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure_bandwidth", lambda team: Bandwidth(20.0, False, 0.0))
    library = tmp_path / "native-libllama.so"
    library.touch()
    flags = ["-m", tiny, "-p", "8", "-n", "4", "-r", "2", "-t", "1", "-npl", "1,2", "--random"]
    compared = ["--compare", "ik_llama", "--ik-library", library]
    done = CliRunner().invoke(command.app, [*map(str, flags), *map(str, compared)])
    assert done.exit_code == 0, done.output
    assert f"other  ik_llama.cpp, library {library}, AVX-512 VNNI code" in done.stdout
    assert "|   ik_llama.cpp |" in done.stdout and "our speed / ik_llama.cpp's" in done.stdout
    document = json.loads(done.stdout.strip().rpartition("\n")[2])
    pytest.importorskip("jsonschema", reason="the test extra brings it").validate(
        document, json.loads(SCHEMA.read_text())
    )
    assert document["others"] == {"ik_llama.cpp": f"ik_llama.cpp, library {library}, AVX-512 VNNI code"}
    assert {each["other"] for each in document["comparison"]} == {"ik_llama.cpp"}
    assert [each["test"] for each in document["comparison"]] == ["pp8", "tg4", "pp8 x2", "tg4 x2"]


def test_a_library_is_for_a_comparison(tiny, tmp_path):
    (tmp_path / "libllama.so").touch()
    with pytest.raises(KimiLiteError, match="--ik-library is for a comparison"):
        CliRunner().invoke(
            command.app, ["-m", str(tiny), "--ik-library", str(tmp_path / "libllama.so")], catch_exceptions=False
        )


@pytest.mark.skipif(importlib.util.find_spec("ik_llama_cpp") is None, reason="ik-llama-cpp-python is not installed")
def test_the_wheel_itself(tmp_path):
    heads = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    sizes = {"hidden_size": 512, "expert_feed_forward_size": 256, "num_layers": 4}  # it refuses smaller heads
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), **heads, **sizes)
    other = IkLlama(path, 1, 64, 2)
    test = BenchTest("tg", 3, 5, 2)
    assert len(other.run(test, Passages(np.arange(9)).prompts(test)).gaps_s) == 3
    other.close()


def test_programs_to_compare_with_have_names(tiny):
    with pytest.raises(KimiLiteError, match="does not know vllm"):
        CliRunner().invoke(command.app, ["-m", str(tiny), "--compare", "llama.cpp,vllm"], catch_exceptions=False)
