"""Files without `output.weight`: the embedding makes the logits, as in llama.cpp."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.arch.tensors import open_model
from kimi_lite.engine.loader import load
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.options import Options
from tests.model.hybrid.runner import HybridRunner
from tests.model.runner import Runner, relative_errors
from tests.tiny import TinyConfig, _add_key, model_metadata, tiny_tensors, write_tiny_gguf
from tests.tiny_tokenizer import tokenizer_metadata

IDS = np.random.default_rng(1).integers(0, 256, 20)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tied") / "tied.gguf", np.random.default_rng(2), is_tied=True)


@pytest.fixture(scope="module")
def copied(tied: Path) -> Path:
    """The same model, with the embedding a second time under the head's name."""
    config = TinyConfig(is_tied=True)
    writer = gguf.GGUFWriter(tied.with_name("copied.gguf"), "deepseek2")
    for key, value in (model_metadata(config) | tokenizer_metadata(config.vocab_size)).items():
        if value is not None and key != "general.architecture":
            _add_key(writer, key, value)
    tensors = tiny_tensors(config, np.random.default_rng(2))
    for name, values in (tensors | {"output.weight": tensors["token_embd.weight"]}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tied.with_name("copied.gguf")


@pytest.mark.parametrize("kind", [Runner, HybridRunner])
def test_the_logits_are_those_of_a_copy(tied: Path, copied: Path, kind: type[Runner]) -> None:
    with kind(tied) as have, kind(copied) as want:
        assert np.array_equal(have.prefill(IDS), want.prefill(IDS))
        assert np.array_equal(have.decode(IDS[:4], len(IDS)), want.decode(IDS[:4], len(IDS)))


def test_the_logits_are_llama_cpps(tied: Path) -> None:
    parity = pytest.importorskip("tests.model.test_parity_llama_cpp", exc_type=ImportError)
    with Runner(tied) as runner:
        errors = relative_errors(runner.prefill(IDS), parity.llama_logits(tied, IDS))
    assert errors.max() < 5e-3  # with other weights a token may choose another expert: llama.cpp's cache is f16


def test_it_is_opened_planned_and_run(tied: Path, copied: Path) -> None:
    store, config = open_model(tied)
    sizes = store_sizes(store, config)
    other = store_sizes(GGUFStore.open(copied), ModelConfig.from_metadata(store.metadata))
    assert sizes.dense_bytes == other.dense_bytes, "the embedding is read whole for every token"
    assert sizes.gpu_dense_bytes == other.gpu_dense_bytes
    assert (sizes.total_bytes, sizes.embedding_bytes) == (store.total_bytes, 0)
    with load(tied, Options(context_length=256, num_threads=1)) as engine:
        assert engine.plan.sizes == sizes
