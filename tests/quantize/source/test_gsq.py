"""GSQ's checkpoints in both forms: recognised by all of their codes, kept without loss, read by what others wrote."""

import json
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.check.comparison import _exact_recipe
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe.choose import find_recipe, kept_recipe
from kimi_lite.quantize.source.repack import kept_type, repack_rows
from kimi_lite.quantize.source.stored import CodedWeight, unpack
from kimi_lite.tools.bench.llama import Llama
from tests.checkpoints import make_checkpoint
from tests.quantize.source.gsq_folder import GROUP, LEVELS, Stored, pack_words, write_gsq
from tests.quantize.source.raw import raw_tensor
from tests.tiny import write_tiny_gguf


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A small Kimi in bfloat16, of two layers."""
    folder = tmp_path_factory.mktemp("floats") / "hf"
    make_checkpoint(folder, "kimi", num_layers=2)
    return folder


def quantize(folder, out, **more):
    """`kimi-lite quantize FOLDER OUT`, without a recipe unless one is given."""
    given_ = {"recipe": None, "type_name": None, "tensor_types": (), "imatrix": None} | more
    return run(Settings(folder, out, split_size="45G", is_overwriting=False, **given_), lambda *_: None, False, False)


def decoded(path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and values of the routed experts, by decoders that are not ours: the `gguf` package's, and for Q2_0
    and our own type, which that lacks, their definition."""
    views = [view for name, view in GGUFStore.open(path).tensors.items() if "_exps" in name]
    kinds = {view.name: view.layout.name for view in views}
    return {
        v.name: (kinds[v.name], _decode(kinds[v.name], np.array(v.data).reshape(-1)).reshape(v.shape)) for v in views
    }


def _decode(kind: str, data: np.ndarray) -> np.ndarray:
    if kind not in ("Q2_0", "LITE2_128"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    size = BY_NAME[kind].block_size
    blocks = data.reshape(-1, 2 + size // 4)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (B, 1)
    codes = np.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(len(blocks), size)
    return (codes.astype(np.float32) - 1) * scales


def require_kept(path, expected, kind) -> None:
    """Every expert of every layer stands for what the checkpoint's codes stand for, to the last bit."""
    found = decoded(path)
    assert found and {type_ for type_, _ in found.values()} == {kind}
    for name, (_, values) in found.items():
        layer, role = name.split(".")[1], name.split("_")[1]
        for e, matrix in enumerate(values):
            wanted = expected[f"model.layers.{layer}.mlp.experts.{e}.{role}_proj.weight"]
            assert np.array_equal(matrix, wanted), (name, e)


@pytest.mark.parametrize(
    ("form", "levels", "bits", "prefix", "zero_points", "kind"),
    [
        ("packed", "2-bit", 4, "language_model.", False, "Q2_0"),
        ("packed", "ternary", 4, "language_model.", False, "Q2_0"),
        ("packed", "3-bit", 4, "language_model.", False, "Q4_0"),
        ("packed", "3-bit", 3, "language_model.", False, "Q4_0"),
        ("packed", "2-bit", 2, "", False, "Q2_0"),
        ("packed", "2-bit", 8, "", False, "Q2_0"),
        ("humming", "2-bit", 2, "language_model.", True, "Q2_0"),
        ("humming", "2-bit", 2, "", False, "Q2_0"),
        ("humming", "3-bit", 3, "language_model.", True, "Q4_0"),
    ],
)
def test_both_forms_are_kept_without_loss(tmp_path, floats, form, levels, bits, prefix, zero_points, kind):
    expected = write_gsq(tmp_path / "gsq", floats, form, levels, bits, prefix, zero_points)
    lines = quantize(tmp_path / "gsq", tmp_path / "out.gguf")
    require_kept(tmp_path / "out.gguf", expected, kind)
    assert any(kind in line for line in lines) and not any("quantized in the source already" in line for line in lines)


@pytest.mark.parametrize(("form", "bits"), [("packed", 4), ("humming", 2)])
def test_our_own_type_keeps_them_in_fewer_bytes(tmp_path, floats, form, bits):
    """2.125 bits: each scale is there once. Where it is not asked for, files are what others read."""
    expected = write_gsq(tmp_path / "gsq", floats, form, "2-bit", bits)
    lines = quantize(tmp_path / "gsq", tmp_path / "out.gguf", recipe="lite2_128")
    require_kept(tmp_path / "out.gguf", expected, "LITE2_128")
    assert any("which only kimi-lite reads" in line for line in lines)
    assert not any("quantized in the source already" in line for line in lines)
    experts = [view for name, view in GGUFStore.open(tmp_path / "out.gguf").tensors.items() if "_exps" in name]
    assert 8 * sum(view.num_bytes for view in experts) == 2.125 * sum(np.prod(view.shape) for view in experts)


def test_our_own_type_is_refused_by_llama_cpp_by_its_number(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    sizes = {"num_layers": 2, "hidden_size": 256, "expert_feed_forward_size": 256, "num_experts": 2}
    path = write_tiny_gguf(tmp_path / "own.gguf", np.random.default_rng(0), types={"_exps": "LITE2_128"}, **sizes)
    said: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    llama_cpp.llama_log_set(keep, None)
    try:
        assert not llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)
    assert "invalid ggml type 20128" in "".join(said)
    with pytest.raises(KimiLiteError, match=r"llama\.cpp cannot load"):
        Llama(path, 1, 64)


def test_three_bits_are_not_kept_by_our_own_type(tmp_path, floats):
    write_gsq(tmp_path / "gsq", floats, levels="3-bit")
    lines = quantize(tmp_path / "gsq", tmp_path / "out.gguf", recipe="lite2_128")
    assert any("quantized in the source already (int4)" in line for line in lines)


def test_one_code_of_one_expert_decides(tmp_path, floats):
    """The last code of the last expert of one tensor needs a third bit: that tensor has another type, and it alone."""

    def change(name: str, stored: Stored) -> Stored:
        if name.endswith("layers.1.mlp.experts.7.down_proj.weight"):
            stored.codes[-1, -1] = 3
        return stored

    write_gsq(tmp_path / "gsq", floats, levels="2-bit", bits=4, change=change)
    model = open_model(tmp_path / "gsq")
    codes = {tensor.name: tensor.codes for tensor in model.tensors if tensor.codes}
    assert codes.pop("blk.1.ffn_down_exps.weight") == "Q4_0" and set(codes.values()) == {"Q2_0"}
    recipe = kept_recipe(model)
    assert recipe.experts.name == "Q2_0" and len(recipe.overrides) == 1
    report = convert(model, tmp_path / "out.gguf", recipe)
    assert report.tensors_by_type["Q4_0"] == 1 and all(
        error == 0 for name, error in report.errors.items() if "_exps" in name
    )


@pytest.mark.parametrize("scale", [3.1e-8, 1.7e-6, 7e4])
def test_a_scale_that_is_no_float16_is_refused_by_name_before_anything_is_written(tmp_path, floats, scale):
    def change(name: str, stored: Stored) -> Stored:
        if name.endswith("layers.1.mlp.experts.3.up_proj.weight"):
            stored.scales[5, 0] = np.float32(scale).view(np.uint32) >> 16
        return stored

    write_gsq(tmp_path / "gsq", floats, change=change)
    with pytest.raises(KimiLiteError, match=r"^blk\.1\.ffn_up_exps\.weight: .*scale") as caught:
        quantize(tmp_path / "gsq", tmp_path / "out.gguf")
    if scale < 1:
        assert "the largest error is" in caught.value.message
        assert "--tensor-type 'blk.1.ffn_up_exps.weight=bf16'" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"gsq"}
    quantize(tmp_path / "gsq", tmp_path / "out.gguf", tensor_types=("blk.1.ffn_up_exps=bf16",))


@pytest.mark.parametrize("exponent", [-17, -14, -3, 0, 15])
def test_scales_that_fit_are_exact(tmp_path, exponent):
    """8 significant bits from 2^-17 on, as float16 has them; both signs."""
    scales = np.array([[1.9921875 * 2.0**exponent, -(2.0**exponent)]], np.float32).view(np.uint32) >> 16
    codes = np.tile(np.arange(-2, 2), 64)[None]
    packed = raw_tensor(tmp_path, "p", "I32", pack_words(codes + 2, 2))
    weight = CodedWeight(packed, raw_tensor(tmp_path, "s", "BF16", scales.astype("<u2")), 2)
    expected = Stored(codes, scales.astype(np.uint16)).values
    assert np.array_equal(_decode("Q2_0", repack_rows(weight, "Q2_0", 0, 1).reshape(-1)).reshape(1, -1), expected)


@pytest.mark.parametrize("points", [(1,), (2,), (1, 2)])
def test_zero_points_of_one_and_two_are_kept_and_others_are_not(tmp_path, points):
    """With a zero point of 1 the codes are Q2_0's own: -1 to 2."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 4, (4, 256)), rng.choice(points, (4, 2)).astype("<f4")
    scales = rng.uniform(0.1, 1, (4, 2)).astype(np.float32).view(np.uint32) >> 16
    tensors = [
        raw_tensor(tmp_path, "p", "I32", pack_words(codes, 2)),
        raw_tensor(tmp_path, "s", "BF16", scales.astype("<u2")),
    ]
    weight = CodedWeight(*tensors, 2, raw_tensor(tmp_path, "z", "F32", zeros))
    expected = Stored(codes - np.repeat(zeros, GROUP, axis=1), scales.astype(np.uint16)).values
    assert kept_type([weight]) == "Q2_0" and np.array_equal(weight.read_rows(0, 4), expected)
    assert np.array_equal(_decode("Q2_0", repack_rows(weight, "Q2_0", 0, 4).reshape(-1)).reshape(4, -1), expected)
    other = CodedWeight(*tensors, 2, raw_tensor(tmp_path, "z2", "F32", zeros + np.float32(0.5)))
    assert kept_type([other]) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_words_are_unpacked_as_compressed_tensors_packs_them(bits, rows, words, seed):
    columns = 32 * words
    codes = np.random.default_rng(seed).integers(-(1 << bits - 1), 1 << bits - 1, (rows, columns)).astype(np.int8)
    packed = pack_to_int32(torch.from_numpy(codes), bits)
    unsigned = codes.astype(np.int16) + (1 << bits - 1)
    assert np.array_equal(unpack(packed.numpy(), bits), unsigned)
    assert np.array_equal(pack_words(unsigned, bits), packed.numpy())  # so the folders of these tests are right
    assert np.array_equal(unpack_from_int32(packed, bits, torch.Size(codes.shape)).numpy(), codes)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(LEVELS)), st.sampled_from([4, 5, 8]), st.integers(0, 2**32 - 1), st.data())
def test_levels_are_found_wherever_they_lie(tmp_path_factory, levels, bits, seed, data):
    """A matrix of a few levels with the outermost one at any place."""
    folder = tmp_path_factory.mktemp("levels")
    low, high = LEVELS[levels]
    codes = np.random.default_rng(seed).integers(max(low, -1), 1, (5, 256))
    place = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 255))
    codes[place] = data.draw(st.sampled_from([low, high]))
    packed = raw_tensor(folder, "p", "I32", pack_words(codes + (1 << bits - 1), bits))
    weight = CodedWeight(packed, raw_tensor(folder, "s", "F32", np.ones((5, 2), "<f4")), bits)
    fits = (codes.min() >= -2 and codes.max() <= 1) or (codes.min() >= -1 and codes.max() <= 2)
    kind = "Q2_0" if fits else "Q4_0"
    assert kept_type([weight]) == kind
    values = _decode(kind, repack_rows(weight, kind, 0, 5).reshape(-1)).reshape(5, -1)
    assert np.array_equal(values, codes)


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path, floats):
    write_gsq(tmp_path / "gsq", floats)
    quantize(tmp_path / "gsq", tmp_path / "whole.gguf")

    def stop(name, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    job = partial(convert, tmp_path / "gsq", tmp_path / "part.gguf", kept_recipe(open_model(tmp_path / "gsq")))
    with pytest.raises(KeyboardInterrupt):
        job(stop)
    job()
    assert (tmp_path / "part.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_another_type_is_made_of_the_values_and_says_so(tmp_path, floats):
    write_gsq(tmp_path / "gsq", floats, "humming", bits=2)
    report = convert(tmp_path / "gsq", tmp_path / "out.gguf", find_recipe("tq1_0"))
    assert [note for note in report.notes if "quantized in the source already (int2)" in note]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "uint1"}, r"quantized by quant_method 'humming'.*uint1"),
        ({"dtype": "fp4"}, "quantized by quant_method 'humming'.*fp4"),
        ({"has_zero_point": True, "is_fp_zero_point": False}, "quantized by quant_method 'humming'"),
        ({"group_size": 64}, r"is not 2-bit codes in groups of 64 along its rows"),
        ({"dtype": "uint3"}, r"is not 3-bit codes in groups of 128 along its rows"),
    ],
)
def test_what_a_configuration_says_must_fit_the_weights(tmp_path, floats, change, said):
    write_gsq(tmp_path / "gsq", floats, "humming", bits=2)
    config = json.loads((tmp_path / "gsq" / "config.json").read_text())
    quantization = config["text_config"]["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"] |= change
    quantization["dynamic"] = {}
    (tmp_path / "gsq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(KimiLiteError, match=said):
        open_model(tmp_path / "gsq")


def test_a_comparison_runs_the_codes_as_they_are(tmp_path, floats):
    write_gsq(tmp_path / "gsq", floats)
    recipe = _exact_recipe(open_model(tmp_path / "gsq"))
    assert (recipe.experts.name, recipe.rest.name) == ("Q2_0", "BF16")
