"""llama.cpp's importance files, both formats, and what a conversion does with them."""

import struct

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.recipe import OWN_TYPES
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.calibrate.imatrix import read_imatrix
from kimi_lite.quantize.codecs import encode
from kimi_lite.quantize.codecs.importance import fill_unknown
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.recipe.choose import find_recipe
from tests.checkpoints import make_checkpoint

EXPERTS = "blk.1.ffn_up_exps.weight"


def write_gguf_imatrix(path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dat_bytes(entries: dict[str, tuple[int, np.ndarray]]) -> bytes:
    content = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        content += values.astype("<f4").tobytes()
    return content + struct.pack("<ii", 2, 4) + b"text"


def test_gguf_vectors_by_expert(tmp_path):
    sums = np.random.default_rng(0).gamma(1.0, size=(4, 64)).astype(np.float32)
    counts = np.array([3, 0, 7, 1])
    write_gguf_imatrix(
        tmp_path / "i.gguf", {EXPERTS: sums, "output.weight": sums[:1]}, {EXPERTS: counts, "output.weight": counts[:1]}
    )
    importance = read_imatrix(tmp_path / "i.gguf")
    found = importance.find(EXPERTS, (4, 32, 64))
    assert np.allclose(found[[0, 2, 3]], sums[[0, 2, 3]] / counts[[0, 2, 3], None])
    assert (found[1] == 1).all()  # no token chose it
    assert [*importance.notes({EXPERTS: (4, 32, 64), "output.weight": (512, 64)})] == [
        f"{tmp_path / 'i.gguf'} does not say anything about 1 of 4 matrices ({EXPERTS}): all their columns count alike"
    ]
    assert np.allclose(importance.find("output.weight", (512, 64)), sums[:1] / 3)
    assert importance.find("token_embd.weight", (512, 64)) is None
    assert importance.find("output.weight", (4, 32, 64)).shape == (4, 64)
    with pytest.raises(KimiLiteError, match="of another model: need 8 x 64 values"):
        importance.find(EXPERTS, (8, 32, 64))


def test_dat_vectors(tmp_path):
    values = np.random.default_rng(1).gamma(1.0, size=128).astype(np.float32)
    (tmp_path / "i.dat").write_bytes(dat_bytes({EXPERTS: (5, values), "never.weight": (0, values)}))
    importance = read_imatrix(tmp_path / "i.dat")
    assert np.allclose(importance.find(EXPERTS, (2, 32, 64)), values.reshape(2, 64) / 5)
    assert (importance.find("never.weight", (2, 32, 64)) == 1).all()


@pytest.mark.parametrize("cut", [2, 9, 40, 200])
def test_a_cut_dat_is_refused(tmp_path, cut):
    whole = dat_bytes({EXPERTS: (5, np.ones(128, np.float32))})
    (tmp_path / "i.dat").write_bytes(whole[:cut])
    with pytest.raises(KimiLiteError, match="no importance matrix"):
        read_imatrix(tmp_path / "i.dat")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("a text that is no importance matrix at all")
    with pytest.raises(KimiLiteError, match="no importance matrix"):
        read_imatrix(tmp_path / "text")
    with pytest.raises(KimiLiteError, match="There is no file"):
        read_imatrix(tmp_path / "missing")
    (tmp_path / "nan.dat").write_bytes(dat_bytes({EXPERTS: (5, np.full(8, np.nan))}))
    with pytest.raises(KimiLiteError, match="no mean squares"):
        read_imatrix(tmp_path / "nan.dat")


GAPS = st.sampled_from([0.0, -0.0, -1.0, np.nan, np.inf, -np.inf])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_is_no_mean_square_is_unknown(data):
    """Zeros, negative values, NaN and infinity anywhere: what comes out is finite, above zero, keeps what was known,
    and gives unknown columns the mean of the known ones."""
    num, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    known = np.array(data.draw(st.lists(st.booleans(), min_size=num * columns, max_size=num * columns)))
    values = np.array([data.draw(st.floats(1e-6, 1e6) if is_known else GAPS) for is_known in known], np.float32)
    values, known = values.reshape(num, columns), known.reshape(num, columns)
    filled = fill_unknown(values)
    assert filled.dtype == np.float32 and np.isfinite(filled).all() and (filled > 0).all()
    assert np.array_equal(filled[known], values[known])
    for row, there, was in zip(filled, known, values, strict=True):
        assert np.allclose(row[~there], was[there].mean(dtype=np.float64) if there.any() else 1.0)
    assert np.array_equal(fill_unknown(values[0]), filled[0])


@pytest.mark.parametrize("type_name", ["TQ1_0", "TQ2_0", "Q2_0", "Q2_K", "Q4_K", "IQ2_XXS", "IQ1_S", "IQ4_XS"])
@pytest.mark.parametrize("gap", [0.0, np.nan, -1.0])
def test_no_type_ruins_what_the_text_did_not_reach(type_name, gap):
    """A row of importance without a known value, and a block without one, cost no more than without a matrix."""
    if type_name not in OWN_TYPES:
        pytest.importorskip("llama_cpp", reason="needs the ggml extra", exc_type=ImportError)
    rng, layout = np.random.default_rng(0), BY_NAME[type_name]
    rows = rng.standard_normal((16, 512), np.float32)

    def error(importance: np.ndarray, columns: slice) -> float:
        decoded = dequantize(encode(layout, rows, importance.astype(np.float32)), type_name)
        return float(np.linalg.norm((decoded - rows)[:, columns]) / np.linalg.norm(rows[:, columns]))

    flat = error(np.ones(512), slice(None))
    assert error(np.full(512, gap), slice(None)) == pytest.approx(flat)
    assert error(np.concatenate([np.ones(256), np.full(256, gap)]), slice(256, None)) < 1.15 * flat


def test_what_cannot_be_used_is_said(tmp_path):
    values = np.ones((2, 64), np.float32)
    values[0, :3] = (0, -1, np.nan)
    (tmp_path / "i.dat").write_bytes(dat_bytes({EXPERTS: (5, values)}))
    importance = read_imatrix(tmp_path / "i.dat")
    notes = [*importance.notes({EXPERTS: (2, 32, 64), "output.weight": (512, 64)})]
    assert len(notes) == 2
    assert "has nothing for 1 tensors (output.weight)" in notes[0]
    assert f"no numbers for some columns of 1 tensors ({EXPERTS})" in notes[1]
    assert "is not used" in next(importance.notes({}))


def test_a_conversion_weighs_each_expert_with_its_own_vector(tmp_path):
    make_checkpoint(tmp_path / "hf", "kimi")
    rng = np.random.default_rng(2)
    vectors = rng.gamma(0.2, size=(8, 256)).astype(np.float32)
    write_gguf_imatrix(tmp_path / "i.gguf", {EXPERTS: vectors}, {EXPERTS: np.ones(8)})
    recipe = find_recipe("tq2_0", has_importance=True)
    convert(tmp_path / "hf", tmp_path / "f32.gguf", "f32")
    convert(tmp_path / "hf", tmp_path / "flat.gguf", recipe)
    convert(tmp_path / "hf", tmp_path / "weighted.gguf", recipe, importance=read_imatrix(tmp_path / "i.gguf"))
    exact, flat, weighted = (
        dequantize(view.data.reshape(-1, view.data.shape[-1]), view.layout.name).reshape(8, 256, 256)
        for view in (GGUFStore.open(tmp_path / f"{name}.gguf").tensors[EXPERTS] for name in ("f32", "flat", "weighted"))
    )
    weighted_errors, flat_errors = (((have - exact) ** 2 * vectors[:, None]).sum((1, 2)) for have in (weighted, flat))
    assert (weighted_errors < 0.97 * flat_errors).all()
    other = "blk.2.ffn_up_exps.weight"
    files = [GGUFStore.open(tmp_path / f"{name}.gguf").tensors[other].data for name in ("flat", "weighted")]
    assert np.array_equal(*files)


def test_a_tensor_that_the_matrix_lacks_is_found_first(tmp_path):
    pytest.importorskip("llama_cpp", reason="needs the ggml extra", exc_type=ImportError)
    make_checkpoint(tmp_path / "hf", "kimi")
    write_gguf_imatrix(tmp_path / "i.gguf", {EXPERTS: np.ones((8, 256))}, {EXPERTS: np.ones(8)})
    with pytest.raises(KimiLiteError, match=r"blk\.1\.ffn_gate_exps\.weight: IQ1_S needs an importance matrix"):
        convert(
            tmp_path / "hf",
            tmp_path / "out.gguf",
            find_recipe("iq1_s", True),
            importance=read_imatrix(tmp_path / "i.gguf"),
        )
    assert not [*tmp_path.glob("out*")]
