"""Building the demo model: once, whole, with the source's tokenizer and a card; and the real one answers."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.demo import build, rehouse
from kimi_lite.demo.build import demo_model_path, ensure_demo_model
from kimi_lite.errors import KimiLiteError
from tests.demo.test_rehouse import VOCAB, random_source
from tests.llama import open_llama

TOKENS = [f"t{i}" for i in range(VOCAB)]


@pytest.fixture
def source(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    """A two-layer SmolLM2 with random weights in place of the download, and an empty cache."""
    weights, file = random_source(2), tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [3] + [1] * (VOCAB - 1))
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_string("llama.other", "not copied")
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(rehouse, "NUM_LAYERS", 2)
    monkeypatch.setattr(rehouse, "CONFIG", replace(rehouse.CONFIG, vocab_size=VOCAB, num_layers=2))
    monkeypatch.setattr(
        build, "fetch_source_gguf", lambda folder, cache, report: shutil.copy(file, folder / "source.gguf")
    )
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path / "cache"))
    return weights


def expected_tensors(source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = rehouse.rehouse_globals(source["token_embd.weight"], source["output_norm.weight"])
    for layer in range(2):
        prefix = f"blk.{layer}."
        tensors |= rehouse.rehouse_layer(
            layer, {n.removeprefix(prefix): w for n, w in source.items() if n.startswith(prefix)}
        )
    return tensors


@pytest.mark.parametrize("type_name", ["f32", "Q8_0"])
def test_the_file_holds_the_rehoused_tensors(source, type_name):
    path = ensure_demo_model(type_name=type_name)
    found, expected = gguf.GGUFReader(path).tensors, expected_tensors(source)
    assert {tensor.name for tensor in found} == expected.keys()
    for tensor in found:
        want = expected[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == want.shape, tensor.name
        encoded = gguf.quants.quantize(want, tensor.tensor_type)
        assert np.array_equal(tensor.data.view(np.uint8), encoded.view(np.uint8)), tensor.name


def test_the_metadata_names_source_licence_and_tokenizer(source):
    fields = gguf.GGUFReader(ensure_demo_model(type_name="bf16")).fields
    metadata = {key: field.contents() for key, field in fields.items()}
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.base_model.0.repo_url"].endswith("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert metadata["general.description"] == (Path(build.__file__).parent / "CARD.md").read_text()
    assert metadata["tokenizer.ggml.tokens"] == TOKENS
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.add_bos_token"]) == (2, False)
    assert fields["tokenizer.ggml.token_type"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert "llama.other" not in metadata
    config = ModelConfig.from_metadata(metadata)
    assert (config.q_lora_rank, config.kv_lora_rank, config.num_experts, config.num_experts_used) == (576, 576, 10, 5)
    assert config.softmax_scale == pytest.approx(224**-0.5)


def test_it_is_built_once(source, monkeypatch):
    path = ensure_demo_model()
    assert path == demo_model_path("q8_0")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(build, "fetch_source_gguf", lambda *arguments: pytest.fail("fetched again"))
    assert ensure_demo_model() == path


def test_progress_names_the_tensors(source):
    seen: list[tuple[str, int, int]] = []
    ensure_demo_model(lambda *state: seen.append(state))
    assert seen[0][0] == "token_embd.weight"
    assert seen[-1][1] == seen[-1][2]


def test_a_failed_build_leaves_nothing(source, monkeypatch):
    monkeypatch.setattr(rehouse, "rehouse_layer", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure_demo_model()
    assert not list(demo_model_path().parent.iterdir())


def test_what_a_killed_build_left_is_removed(source):
    cache = demo_model_path().parent
    left, alive = cache / "demo-build-999999999-abc", cache / f"demo-build-{os.getppid()}-abc"
    for folder in (left, alive):
        folder.mkdir(parents=True)
        (folder / "source.gguf").touch()
    path = ensure_demo_model()
    assert sorted(file.name for file in cache.iterdir()) == sorted([alive.name, path.name])


def test_two_builds_at_once_give_one_good_file(source):
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(ensure_demo_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert [file.name for file in paths[0].parent.iterdir()] == [paths[0].name]
    assert len(gguf.GGUFReader(paths[0]).tensors) == len(expected_tensors(source))


def test_a_cache_that_cannot_be_written_is_explained(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KIMI_LITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KimiLiteError, match=r"Building the demo model in .* failed: Not a directory") as caught:
        ensure_demo_model()
    assert "KIMI_LITE_CACHE" in caught.value.hint


def test_an_impossible_type_is_refused_before_the_download(source, monkeypatch):
    monkeypatch.setattr(build, "fetch_source_gguf", lambda *arguments: pytest.fail("fetched for nothing"))
    with pytest.raises(KimiLiteError, match="no type 'q9'"):
        ensure_demo_model(type_name="q9")


def test_the_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("KIMI_LITE_CACHE", raising=False)
    assert demo_model_path("Q4_K").name == "demo-smollm2-135m-v1-q4_k.gguf"
    assert demo_model_path().parent.name == "kimi-lite"


def test_neither_the_demo_nor_quantize_imports_torch():
    code = (
        "import sys, quantize.convert, kimi_lite.demo.build; sys.exit('torch' in sys.modules or "
        "'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_the_real_demo_model_answers_in_llama_cpp():
    """Another program loads it and chats; without the download or the ggml extra this cannot be asked."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs the ggml extra")
    try:
        path = ensure_demo_model()
    except KimiLiteError as error:
        pytest.skip(error.message)
    assert 350e6 < path.stat().st_size < 400e6
    llama = open_llama(path, n_ctx=256, n_threads=1)
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = llama.create_chat_completion([question], temperature=0, max_tokens=12)["choices"][0]["message"]["content"]
    assert "Paris" in answer
