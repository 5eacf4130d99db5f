"""GGUF files as the source: one file or shards, kept and decoded rows, metadata types; and the check of what was
written."""

import importlib.util
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.interleaved import interleaved
from kimi_lite.quantize.check.verify import verify
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe, kept_recipe, with_overrides
from kimi_lite.quantize.source.gguf_model import open_gguf_model
from tests.checkpoints import make_checkpoint
from tests.gguf.gguf_bytes import text
from tests.native.types.ik_oracle import interleave

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A BF16 GGUF made from a folder, which lies beside it."""
    place = tmp_path_factory.mktemp("source")
    make_checkpoint(place / "hf", "kimi")
    convert(place / "hf", place / "source.gguf", "bf16")
    return place / "source.gguf"


def test_a_gguf_and_its_folder_give_the_same_file(source, tmp_path):
    """Through BF16, which holds the folder's weights exactly: recipes then agree bit for bit."""
    recipe = with_overrides(find_recipe("tq1_0"), ["ffn_down_exps=tq2_0"])
    convert(source, tmp_path / "a.gguf", recipe)
    convert(source.parent / "hf", tmp_path / "b.gguf", recipe)
    a, b = (GGUFStore.open(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert {view.layout.name for view in a.tensors.values()} == {"F32", "Q8_0", "TQ1_0", "TQ2_0"}
    assert a.tensors.keys() == b.tensors.keys()
    for name, view in a.tensors.items():
        assert np.array_equal(view.data, b.tensors[name].data), name


def test_metadata_goes_over_with_its_types(source, tmp_path):
    convert(source, tmp_path / "out.gguf", find_recipe("q8_0"), split_bytes=10**6)
    first = next(tmp_path.glob("out-00001-of-*.gguf"))
    before, after = GGUFStore.open(source).values, GGUFStore.open(first).values
    changed = {"general.file_type", "general.quantization_version", "split.no", "split.count", "split.tensors.count"}
    assert {*before} - changed == {*after} - changed
    for key in {*before} - changed:
        assert before[key][1:] == after[key][1:], key
        assert np.array_equal(before[key].value, after[key].value), key
    assert after["general.file_type"].value == 7
    again = convert(first, tmp_path / "again.gguf", find_recipe("q8_0"))
    assert not [key for key in GGUFStore.open(again.path).values if key.startswith("split.")]
    assert (
        GGUFStore.open(source).values["tokenizer.ggml.tokens"].value
        == GGUFReader(source).fields["tokenizer.ggml.tokens"].contents()
    )


def test_shards_as_the_source_and_kept_rows(source, tmp_path):
    shards = convert(source, tmp_path / "s.gguf", "q8_0", split_bytes=10**6).paths
    assert len(shards) > 2
    joined = convert(shards[0], tmp_path / "joined.gguf", "q8_0")
    direct = convert(source, tmp_path / "direct.gguf", "q8_0")
    assert joined.path.read_bytes() == direct.path.read_bytes()
    assert not joined.notes
    assert not any(joined.errors.values())


def test_what_is_quantized_twice_is_said(source, tmp_path):
    convert(source, tmp_path / "a.gguf", "q8_0")
    report = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", find_recipe("tq1_0"))
    assert [note for note in report.notes if "quantized in the source already (q8_0)" in note]


def test_verify_measures_every_weight(source, tmp_path):
    out = convert(source, tmp_path / "out.gguf", find_recipe("tq1_0"), split_bytes=10**6).path
    found = verify(source, out)
    exact, store = GGUFStore.open(source), GGUFStore.open(out)
    for name in ("blk.1.ffn_up_exps.weight", "output.weight", "output_norm.weight"):
        a, b = (
            dequantize(view.data.reshape(-1, view.data.shape[-1]), view.layout.name).astype(np.float64)
            for view in (exact.tensors[name], store.tensors[name])
        )
        assert found.errors[name] == pytest.approx(np.sqrt(((a - b) ** 2).sum() / (a**2).sum()), rel=1e-4)
    assert found.num_bytes == store.total_bytes
    assert "all checksums equal" in found.summary


def test_verify_finds_a_flipped_bit_and_a_missing_log(source, tmp_path):
    out = convert(source, tmp_path / "out.gguf", find_recipe("tq1_0")).path
    content = bytearray(out.read_bytes())
    content[-100] ^= 4
    out.write_bytes(content)
    with pytest.raises(KimiLiteError, match="has SHA-256"):
        verify(source, out)
    (tmp_path / "out.quantize.jsonl").unlink()
    with pytest.raises(KimiLiteError, match="the log that"):
        verify(source, out)


def test_as_a_user_types_it(source, tmp_path):
    def quantize(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "quantize", str(source), *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    out = tmp_path / "out.gguf"
    table = quantize(out, "--recipe", "tq1_0", "--tensor-type", "ffn_down_exps=tq2_0", "--dry-run")
    assert table.returncode == 0, table.stderr
    assert "bf16 -> tq1_0+tq2_0" in table.stderr
    assert not [*tmp_path.iterdir()]
    done = quantize(out, "--recipe", "tq1_0", "--split-max-size", "1M", "--verify")
    assert done.returncode == 0, done.stderr
    assert "all checksums equal" in done.stderr
    assert len([*tmp_path.glob("out-*.gguf")]) > 2
    both = quantize(out, "--recipe", "tq1_0", "--type", "q8_0")
    assert both.returncode == 2
    assert "exclude each other" in both.stderr


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the ggml extra")
@pytest.mark.parametrize("recipe", ["tq1_0", "iq1_m", "q4_k", "mixed"])
def test_llama_cpp_computes_what_we_compute(source, tmp_path, recipe):
    """The shards load in llama.cpp, and its distribution for every token is our runtime's."""
    from tests.model.runner import mean_divergence
    from tests.model.test_parity_llama_cpp import llama_logits

    chosen = find_recipe("tq1_0" if recipe == "mixed" else recipe)
    if recipe == "mixed":
        chosen = with_overrides(
            chosen, ["ffn_down_exps=q3_k", "ffn_up_exps=tq2_0", "attn_output=q5_0", "token_embd=q4_k"]
        )
    out = convert(source, tmp_path / "out.gguf", chosen, split_bytes=10**6).path
    ids = np.random.default_rng(0).integers(3, 480, 64)
    theirs = llama_logits(out, ids)
    ours, before = (_logits(path, ids) for path in (out, source))
    assert (
        mean_divergence(ours, theirs) < 0.03
    )  # both round activations, each in its way; a few tokens change an expert
    assert mean_divergence(before, theirs) > (0.0 if recipe == "q4_k" else 0.1)


def _logits(path: Path, ids: np.ndarray) -> np.ndarray:
    from tests.model.runner import Runner

    with Runner(path, kv_dtype="f16") as runner:
        return runner.prefill(ids)


def with_interleaved_experts(path: Path, out: Path) -> int:
    """A copy whose Q8_0 experts are Q8_0_R8; returns how many tensors that are."""
    kind, data, store = interleaved()[208], bytearray(path.read_bytes()), GGUFStore.open(path)
    experts = [view for view in store.tensors.values() if "_exps" in view.name and view.layout is kind.base]
    for view in experts:
        stated = text(view.name) + struct.pack(f"<I{len(view.shape)}Q", len(view.shape), *view.shape[::-1])
        [at] = [match.end() for match in re.finditer(re.escape(stated), data)]
        data[at : at + 4] = struct.pack("<I", kind.ggml_id)
        rows = view.data.reshape(-1, view.data.shape[-1])
        data[view.start : view.start + view.num_bytes] = interleave(kind, rows).tobytes()
    out.write_bytes(data)
    return len(experts)


def test_interleaved_rows_come_in_order(source, tmp_path):
    """Refused where a model is run, with the command that writes its rows in order, every tensor in its type."""
    plain, turned, again = (tmp_path / name for name in ("plain.gguf", "turned.gguf", "again.gguf"))
    convert(source, plain, with_overrides(find_recipe("q8_0"), ["attn_output=tq1_0"]))
    assert with_interleaved_experts(plain, turned) == 6
    with pytest.raises(KimiLiteError, match=r"Q8_0_R8.*rows interleaved by 8") as refusal:
        GGUFStore.open(turned)
    assert "kimi-lite quantize" in refusal.value.hint
    convert(turned, again, kept_recipe(open_gguf_model(turned)))
    before, after = GGUFStore.open(plain).tensors, GGUFStore.open(again).tensors
    assert before.keys() == after.keys()
    for name, view in before.items():
        assert view.layout is after[name].layout and np.array_equal(view.data, after[name].data), name
    assert not GGUFStore.open(turned, has_interleaved=True).tensors.keys() ^ before.keys()
