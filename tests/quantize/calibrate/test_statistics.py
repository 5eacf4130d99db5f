"""`kimi-lite imatrix`: the file that it writes, read by our reader and by gguf's, and what it refuses."""

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.calibrate.imatrix import read_imatrix
from kimi_lite.quantize.calibrate.statistics import collect_importance, cut_text, open_walk
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """(model, text, importance matrix) of a tiny model with the chunks of 64 tokens of a text."""
    folder = tmp_path_factory.mktemp("imatrix")
    model = write_tiny_gguf(folder / "model.gguf", np.random.default_rng(0), num_layers=2, expert_feed_forward_size=256)
    text = folder / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 300))))
    lines = collect_importance(model, text, folder / "imatrix.gguf", 4, 64)
    assert "from 4 chunks of 64 tokens" in lines[0]
    return model, text, folder / "imatrix.gguf"


def test_the_file_is_llama_cpps(collected):
    """Keys, names, shapes and counts by gguf's own reader."""
    model, _, path = collected
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix" and fields["imatrix.datasets"] == ["text.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (4, 64)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = {name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")}
    assert {f"{name}.counts" for name in weights} | {f"{name}.in_sum2" for name in weights} == set(tensors)
    store = GGUFStore.open(model)
    matrices = {name for name in store.tensors if name.endswith(".weight") and len(store.tensor(name).shape) > 1}
    assert weights == matrices - {"token_embd.weight"}
    for name in weights:
        *leading, _, columns = store.tensor(name).shape
        assert tensors[f"{name}.in_sum2"].size == columns * int(np.prod(leading)), name
    chosen = tensors["blk.1.ffn_up_exps.weight.counts"]
    assert chosen.shape == (8, 1) and chosen.sum() == 4 * 64 * 2
    assert (chosen == tensors["blk.1.ffn_down_exps.weight.counts"]).all()
    assert tensors["blk.1.attn_k_b.weight.counts"].tolist() == [[4 * 64]]  # one for all heads
    assert tensors["output.weight.counts"].tolist() == [[4 * 64]]


def test_means_are_those_of_the_inputs(collected):
    model, text, path = collected
    importance = read_imatrix(path)
    walk, tokenizer = open_walk(model)
    chunks = cut_text(text.read_text(), tokenizer, walk.metadata, text, 64, 4)
    seen: dict[str, list[np.ndarray]] = {}

    def keep(inputs) -> None:
        """The inputs of the whole matrix, or of one expert or head."""
        values = inputs.values if inputs.rows is None else inputs.values[inputs.rows]
        if inputs.starts is not None:
            one = 5 % (len(inputs.starts) - 1)
            values = values[inputs.starts[one] : inputs.starts[one + 1]]
        for name in inputs.weights:
            seen.setdefault(name, []).append(values.copy())

    for _ in walk.layers(chunks, keep):
        pass
    walk.close()
    store = GGUFStore.open(model)
    for name, pieces in seen.items():
        vectors = importance.find(name, store.tensor(name).shape)
        want = np.square(np.concatenate(pieces), dtype=np.float64).mean(axis=0)
        assert np.allclose(vectors[5 % len(vectors)], want, rtol=1e-5), name


def test_our_quantizer_reads_it(collected, tmp_path):
    model, _, path = collected
    settings = Settings(model, tmp_path / "out.gguf", "tq1_0", None, (), path, "45G", False)
    lines = run(settings, lambda name, done, total: None, False, False)
    assert any("TQ1_0" in line for line in lines)


def test_what_it_refuses(collected, tmp_path):
    model, text, path = collected
    with pytest.raises(KimiLiteError, match="exists"):
        collect_importance(model, text, path)
    with pytest.raises(KimiLiteError, match="one chunk of 512 needs"):
        collect_importance(model, text, tmp_path / "a.gguf")
    with pytest.raises(KimiLiteError, match="From 2 to 512 are possible"):
        collect_importance(model, text, tmp_path / "a.gguf", chunk_tokens=1000)
    (tmp_path / "binary").write_bytes(b"caf\xe9")
    with pytest.raises(KimiLiteError, match="is not UTF-8"):
        collect_importance(model, tmp_path / "binary", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_the_command(collected, tmp_path):
    model, text, _ = collected
    flags = ["imatrix", "-m", str(model), "-f", str(text), "-o", str(tmp_path / "i.gguf"), "-c", "64", "--chunks", "1"]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert read_imatrix(tmp_path / "i.gguf").vectors
