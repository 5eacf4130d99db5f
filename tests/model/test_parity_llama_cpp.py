"""Our forward pass against llama.cpp on the very same GGUF files: the demo model, and a random Kimi with low-rank
queries."""

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.transformer import Transformer
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.options import Options
from kimi_lite.text.tokenizer import Tokenizer
from tests.model.runner import Runner, mean_divergence, perplexity

llama = pytest.importorskip(
    "llama_cpp.llama_cpp", reason="pip install 'kimi-lite[ggml]' brings llama.cpp", exc_type=ImportError
)

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. \
However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well \
fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other of their \
daughters. My dear Mr. Bennet, said his lady to him one day, have you heard that Netherfield Park is let at last? Mr. Bennet \
replied that he had not. But it is, returned she; for Mrs. Long has just been here, and she told me all about it. Mr. Bennet \
made no answer. Do you not want to know who has taken it? cried his wife impatiently. You want to tell me, and I have no \
objection to hearing it. This was invitation enough. Why, my dear, you must know, Mrs. Long says that Netherfield is taken by \
a young man of large fortune from the north of England; that he came down on Monday in a chaise and four to see the place."""  # noqa: E501


@llama.llama_log_callback
def ignore_log(level, text, data):
    """llama.cpp writes hundreds of lines otherwise."""


def llama_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """float32 (T, vocabulary) of one prompt, on two threads without the AMX buffers that MLA models trip over."""
    llama.llama_log_set(ignore_log, ctypes.c_void_p())
    model_params, params = llama.llama_model_default_params(), llama.llama_context_default_params()
    model_params.use_extra_bufts = False
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 512, 512, 2, 2
    model = llama.llama_model_load_from_file(str(path).encode(), model_params)
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = int(token), i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(ids))]
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.stack(rows)


def demo_file(type_name: str) -> Path:
    from kimi_lite.demo.build import ensure_demo_model
    from kimi_lite.errors import KimiLiteError

    try:
        return ensure_demo_model(type_name=type_name)
    except KimiLiteError as error:
        pytest.skip(f"the demo model cannot be built here: {error.message}")


def exact_logits(runner: Runner, ids: np.ndarray) -> np.ndarray:
    """The same weights with float32 activations and cache: what both programs approximate."""
    with Runner(runner.store.path, kv_dtype="f32") as exact:
        for name, tensor in runner.store.tensors.items():
            values = dequantize(tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.layout.name)
            data = values.view(np.uint8).reshape(*tensor.shape[:-1], -1)
            exact.store.tensors = {**exact.store.tensors, name: replace(tensor, layout=BY_NAME["F32"], data=data)}
        exact.transformer.close()
        exact.transformer = Transformer(exact.store, exact.config, exact.kv, Options(num_threads=2))
        return exact.prefill(ids)


@pytest.mark.parametrize("type_name", ["q8_0", "q4_k"])
def test_demo_model(type_name):
    """Same text, same file. Both programs round activations to 8 bits, each in its own way, and this small model
    amplifies that: llama.cpp is 7e-3 nats from float32 activations in Q8_0. Ours must be no further from them."""
    path = demo_file(type_name)
    ids = np.array(Tokenizer.from_metadata(GGUFStore.open(path).metadata).encode(TEXT)[:192])
    with Runner(path, kv_dtype="f16") as runner:
        ours, exact = runner.prefill(ids), exact_logits(runner, ids)
    theirs = llama_logits(path, ids)
    assert mean_divergence(ours, exact) < 1.15 * mean_divergence(theirs, exact)
    assert mean_divergence(ours, theirs) < mean_divergence(ours, exact) + mean_divergence(theirs, exact)
    assert perplexity(ours, ids) == pytest.approx(perplexity(exact, ids), rel=0.02)


@pytest.mark.parametrize(("type_name", "limit"), [("f32", 1e-5), ("q8_0", 2e-3)])
def test_random_model(type_name, limit, tmp_path):
    """K2.5's structure with random weights."""
    checkpoints = pytest.importorskip(
        "tests.checkpoints", reason="the test extra brings transformers", exc_type=ImportError
    )
    from kimi_lite.quantize.convert import convert

    checkpoints.make_checkpoint(tmp_path / "source", "kimi")
    convert(tmp_path / "source", tmp_path / "model.gguf", type_name)
    ids = np.random.default_rng(0).integers(0, checkpoints.VOCAB_SIZE, 128)
    with Runner(tmp_path / "model.gguf", kv_dtype="f32" if type_name == "f32" else "f16") as runner:
        ours = runner.prefill(ids)
    assert mean_divergence(ours, llama_logits(tmp_path / "model.gguf", ids)) < limit
