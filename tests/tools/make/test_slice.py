"""Slices of K2.5: its metadata and shapes, the types that were asked for, and logits that stay finite in llama.cpp."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, slice_of
from kimi_lite.arch.tensors import check_tensors
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.text.template import ChatTemplate
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.tools.make.slice import make_slice
from kimi_lite.tools.make.slice_tokenizer import MIN_VOCAB_SIZE
from tests.llama import open_llama
from tests.model.family import family_metadata

TINY = replace(
    K2_5, num_layers=3, num_experts=8, vocab_size=640, hidden_size=256, feed_forward_size=512,
    expert_feed_forward_size=256,
    num_heads=4, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=64,
)  # fmt: skip


def write(path, dims=TINY, seed=0, **types):
    return make_slice(path, dims, {"*": types.pop("every", "q8_0")} | types, seed)


def test_full_size_metadata_is_k25s():
    """Everything that K2.5's own metadata says, up to the name."""
    ours, real = slice_of(K2_5, 1, 60, 384, 163_840), ModelConfig.from_metadata(family_metadata("K2.5"))
    assert {f: getattr(ours, f) for f in ours.__slots__ if f != "name"} == {
        f: getattr(real, f) for f in real.__slots__ if f != "name"
    }


@pytest.mark.parametrize("name", BY_NAME)
def test_store_and_config_accept_every_type(tmp_path, name):
    report = write(tmp_path / "slice.gguf", every=name)
    store = GGUFStore.open(tmp_path / "slice.gguf")
    check_tensors(store, ModelConfig.from_metadata(store.metadata))
    matrices = [view for view in store.tensors.values() if view.name.endswith("_exps.weight")]
    assert {view.layout.name for view in matrices} == {name}
    assert sum(report.tensors_by_type.values()) == len(store.tensors)
    assert report.num_bytes == (tmp_path / "slice.gguf").stat().st_size


def test_types_by_pattern_and_the_rows_that_do_not_fit(tmp_path):
    patterns = {"blk.*.attn_*": "q4_k", "blk.*.ffn_gate_exps": "iq1_m", "blk.2.ffn_*_exps": "tq2_0", "output": "q6_k"}
    report = make_slice(tmp_path / "slice.gguf", TINY, patterns)
    store = GGUFStore.open(tmp_path / "slice.gguf")
    types = {name: view.layout.name for name, view in store.tensors.items()}
    assert types["blk.0.attn_q_a.weight"] == types["blk.2.attn_output.weight"] == "Q4_K"
    assert (
        types["blk.0.attn_q_a_norm.weight"]
        == types["blk.1.ffn_gate_inp.weight"]
        == types["blk.1.exp_probs_b.bias"]
        == "F32"
    )
    assert (types["blk.1.ffn_gate_exps.weight"], types["blk.2.ffn_gate_exps.weight"]) == ("IQ1_M", "TQ2_0")
    assert (types["blk.1.ffn_up_exps.weight"], types["output.weight"], types["token_embd.weight"]) == (
        "Q8_0",
        "Q6_K",
        "Q8_0",
    )
    assert types["blk.0.attn_k_b.weight"] == "Q8_0"  # rows of 32 are no whole block of 256
    assert len(report.notes) == 3 and "blk.1.attn_k_b" in report.notes[1]


def test_large_tensors_repeat_their_tile_without_equal_neighbours(tmp_path):
    """A tensor of more than a tile: all rows are valid, experts differ, norms are near one."""
    dims = replace(
        TINY, num_layers=1, num_dense_layers=0, num_experts=16, hidden_size=1024, expert_feed_forward_size=2048
    )
    write(tmp_path / "slice.gguf", dims)
    store = GGUFStore.open(tmp_path / "slice.gguf")
    experts = store.tensors["blk.0.ffn_up_exps.weight"]
    blocks = np.ascontiguousarray(experts.data).view(experts.layout.dtype)
    weights = blocks["qs"].astype(np.float32) * blocks["d"].astype(np.float32)[..., None]  # (E, N, blocks, 32)
    assert experts.num_bytes > 30e6
    assert weights.std() == pytest.approx(1024**-0.5, rel=0.02)
    starts = {expert.tobytes() for expert in experts.data[:, :16]}
    assert len(starts) == 16
    norm = store.tensors["blk.0.attn_norm.weight"].data.view(np.float32)
    assert norm.mean() == pytest.approx(1, abs=0.02) and norm.std() == pytest.approx(0.1, rel=0.2)


def test_seeds(tmp_path):
    for path, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / path, seed=seed)
    first, again, other = ((tmp_path / path).read_bytes() for path in "abc")
    assert first == again and first != other


def test_tokenizer_and_kimis_template(tmp_path):
    write(tmp_path / "slice.gguf")
    metadata = GGUFStore.open(tmp_path / "slice.gguf").metadata
    tokenizer = Tokenizer.from_metadata(metadata)
    for text in ("Hello, world", "naïve\n日本 \x00"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special["<|im_end|>"] == 640 - 256 + 2
    assert (
        ChatTemplate.from_metadata(metadata, tokenizer).encode([{"role": "user", "content": "Hi"}]).starts_in_reasoning
    )


def test_full_vocabulary_has_k25s_control_ids():
    from kimi_lite.tools.make.slice_tokenizer import slice_tokenizer

    keys = slice_tokenizer(163_840)
    tokens = keys["tokenizer.ggml.tokens"].value
    assert tokens.index("<|im_end|>") == keys["tokenizer.ggml.eos_token_id"].value == 163_586
    assert (tokens.index("<think>"), tokens.index("[PAD]")) == (163_606, 163_839)


@pytest.mark.parametrize(
    ("dims", "types", "message"),
    [
        (slice_of(K2_5, 1, 25, 384, 163_840), {}, "26 layers"),
        (TINY, {"*": "q9_z"}, "no type 'q9_z'"),
        (slice_of(K2_5, 1, 1, 384, 100), {}, f"--vocab is 100, and the tokenizer has {MIN_VOCAB_SIZE}"),
    ],
)
def test_refusals(tmp_path, dims, types, message):
    with pytest.raises(KimiLiteError, match=message):
        make_slice(tmp_path / "slice.gguf", dims, types)
    assert not list(tmp_path.iterdir())


def test_too_few_experts():
    with pytest.raises(KimiLiteError, match="num_experts_used is 8, and must be at most num_experts, 4"):
        slice_of(K2_5, 1, 1, 4, 1024)


def test_command_line(tmp_path):
    """The flags reach the file, at K2.5's true dimensions; and a mistake is a sentence and exit code 2."""
    command = [sys.executable, "-m", "tools.make.slice", str(tmp_path / "slice.gguf")]
    sizes = ["--layers", "0+1", "--num-experts", "8", "--vocab", "640", "--attention", "tq2_0", "--shared", "tq1_0"]
    done = subprocess.run(
        [*command, *sizes, "--experts-down", "tq2_0", "--type", "blk.0.attn_q_b=q4_0"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    store = GGUFStore.open(tmp_path / "slice.gguf")
    experts = {part: store.tensors[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")}
    assert [view.layout.name for view in experts.values()] == ["TQ1_0", "TQ1_0", "TQ2_0"]
    assert (experts["up"].shape, experts["down"].shape) == ((8, 2048, 7168), (8, 7168, 2048))
    assert store.tensors["blk.0.attn_q_b.weight"].layout.name == "Q4_0"
    failed = subprocess.run([*command, "--layers", "three"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("Error: --layers is 'three'.")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the ggml extra")
@pytest.mark.parametrize("name", [name for name, layout in BY_NAME.items() if not (layout.is_ik or layout.is_own)])
def test_llama_cpp_loads_it_and_logits_are_finite(tmp_path, name):

    write(tmp_path / "slice.gguf", every=name)
    llama = open_llama(tmp_path / "slice.gguf", n_ctx=32, n_batch=32, logits_all=True)
    llama.eval([72, 101, 108, 108, 111, 300])
    logits = np.array(llama.scores[:6])
    llama.close()
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 5, logits.std()
    assert np.abs(np.diff(logits, axis=0)).max() > 0.1  # positions differ
