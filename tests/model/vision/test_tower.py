"""The tower beside transformers on random checkpoints, files as llama.cpp's converter makes them, what is refused."""

from contextlib import closing

import gguf
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kimi_lite.arch.moonvit import ROW_ORDER_KEY
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.vision.patches import EncodingStopped, Grid, Patches
from kimi_lite.model.vision.tower import VisionTower
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.mmproj import write_mmproj
from tests.model.vision.checkpoint import TEXT_HIDDEN, features, random_patches, write_checkpoint
from tests.quantize.source import moonvit

LIMIT = 1e-5  # of float32 weights; the sums have other orders
IMAGES = [
    Grid(1, 2 * h, 2 * w)
    for h, w in (
        *((1, 1), (1, 9), (9, 1), (4, 4), (3, 5), (8, 8), (13, 2), (2, 31), (10, 12)),
        *((1, 2), (5, 3), (7, 7), (6, 11), (11, 6), (20, 3), (16, 9), (9, 16), (1, 40), (32, 32)),
    )
]
CHUNKS = [Grid(t, 2 * h, 2 * w) for t in (2, 3, 4) for h, w in ((1, 1), (4, 4), (2, 7), (6, 3))]


def error(have: np.ndarray, want: np.ndarray) -> float:
    assert have.shape == want.shape, (have.shape, want.shape)
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("k25"))


@pytest.fixture(scope="module")
def tower(folder):
    path = write_mmproj(folder, folder / "mmproj.gguf", "f32").path
    with closing(VisionTower.open(path, hidden_size=TEXT_HIDDEN, num_threads=2)) as tower:
        yield tower


@pytest.mark.parametrize("grid", IMAGES + CHUNKS, ids=lambda grid: "x".join(map(str, grid)))
def test_equals_transformers(tower, grid):
    patches = random_patches(grid)
    assert error(tower.encode(patches), features([patches])[0]) < LIMIT


@settings(max_examples=6, deadline=None, phases=(Phase.generate,), derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
def test_items_do_not_see_each_other(tower, shapes):
    """Several items, images and chunks, of any size: each is what transformers makes of it within a batch of all."""
    items = [random_patches(Grid(t, 2 * h, 2 * w), seed) for seed, (t, h, w) in enumerate(shapes)]
    for item, want in zip(items, features(items), strict=True):
        assert error(tower.encode(item), want) < LIMIT


def test_more_than_one_chunk_of_rows(tower):
    patches = random_patches(Grid(1, 44, 58))  # 2,552 patches: three chunks, the last one no whole tile
    assert error(tower.encode(patches), features([patches])[0]) < LIMIT


@pytest.mark.parametrize(("hidden", "heads"), [(48, 1), (64, 4), (144, 2), (96, 6)])
def test_other_heads(tmp_path, hidden, heads):
    """Heads of 48, 16, 72 and 16 values: with and without a rest beyond whole registers."""
    folder = write_checkpoint(tmp_path, hidden=hidden, heads=heads)
    patches = random_patches(Grid(1, 6, 10))
    with closing(VisionTower.open(write_mmproj(folder, tmp_path / "m.gguf", "f32").path, num_threads=1)) as tower:
        assert error(tower.encode(patches), features([patches], hidden=hidden, heads=heads)[0]) < LIMIT


@pytest.mark.parametrize(("type_name", "limit"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 3e-2)])
def test_other_types(folder, type_name, limit):
    """As far from float32 weights as roundings to 11, 8 and 8 bits, of activations too for Q8_0."""
    path = write_mmproj(folder, folder / f"{type_name}.gguf", type_name).path
    patches = random_patches(Grid(2, 8, 10))
    with closing(VisionTower.open(path, num_threads=2)) as tower:
        assert 0 < error(tower.encode(patches), features([patches])[0]) < limit


@pytest.fixture(scope="module")
def vl_file(tmp_path_factory):
    """Kimi-VL's tower as our converter writes it, and its checkpoint's weights."""
    folder, weights = tmp_path_factory.mktemp("vl"), moonvit.make_weights("kimi_vl", np.random.default_rng(0))
    moonvit.write_folder(folder, "kimi_vl", weights)
    return write_mmproj(folder, folder / "mmproj.gguf", "f32").path, weights


def square_image() -> tuple[np.ndarray, Patches]:
    """As large as the table of positions, and its patches."""
    side = moonvit.GRID
    image = np.random.default_rng(2).integers(0, 256, (14 * side, 14 * side, 3), dtype=np.uint8)
    pixels = image.reshape(side, 14, side, 14, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 14, 14)
    return image, Patches(np.ascontiguousarray(pixels), Grid(1, side, side))


def test_kimi_vl(vl_file):
    """Within what separates the exact GELU from the one by tanh that the numpy tower has in its projector."""
    path, weights = vl_file
    image, patches = square_image()
    with closing(VisionTower.open(path, num_threads=2)) as tower:
        assert error(tower.encode(patches), moonvit.encode_image("kimi_vl", weights, image)) < 5e-4


def rewrite(path, target, change=lambda name, rows: rows, without=(), **keys):
    """The file again, by gguf-py: `change` of every tensor, without some keys and tensors, with others."""
    store, writer = GGUFStore.open(path), gguf.GGUFWriter(target, "clip")
    for key, value in store.metadata.items():
        if key in without or key in keys or key.startswith("general.architecture"):
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value.tolist() if isinstance(value, np.ndarray) else value)
    for key, value in keys.items():
        writer.add_string(key, value)
    for name, tensor in store.tensors.items():
        rows = dequantize(tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.layout.name).reshape(tensor.shape)
        if name not in without:
            writer.add_tensor(name, np.ascontiguousarray(change(name, rows)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_files_of_llama_cpp(vl_file, folder, tower, tmp_path):
    """Its converter leaves queries and keys of kimivl in turns, puts columns first in kimik25, and says neither."""
    path, weights = vl_file
    image, patches = square_image()

    def in_turns(name, rows):
        if "attn_q." not in name and "attn_k." not in name:
            return rows
        pairs = rows.reshape(moonvit.HEADS, 2, -1, 2, *rows.shape[1:])  # (head, axis, pair, of a pair, ...)
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    theirs = rewrite(path, tmp_path / "vl.gguf", in_turns, without=(ROW_ORDER_KEY,))
    with closing(VisionTower.open(theirs, num_threads=2)) as vl:
        assert error(vl.encode(patches), moonvit.encode_image("kimi_vl", weights, image)) < 5e-4
    theirs = rewrite(folder / "mmproj.gguf", tmp_path / "k25.gguf", without=(ROW_ORDER_KEY,))
    small = random_patches(Grid(2, 4, 6))
    with closing(VisionTower.open(theirs, num_threads=2)) as k25:
        assert np.array_equal(k25.encode(small), tower.encode(small))


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize(("type_name", "limit"), [("f32", LIMIT), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_on_a_gpu(folder, type_name, limit, stays, monkeypatch):
    """Torch on a CPU stands in for the GPU."""
    path = write_mmproj(folder, folder / f"gpu-{type_name}.gguf", type_name, is_overwriting=True).path
    monkeypatch.setattr("kimi_lite.model.vision.gpu._CHUNK_ROWS", 50)
    with closing(VisionTower.open(path, device="cpu:0", stays_on_device=stays)) as tower:
        for grid in (Grid(1, 8, 10), Grid(3, 4, 6)):
            patches = random_patches(grid)
            assert error(tower.encode(patches), features([patches])[0]) < limit


def test_kimi_vl_on_a_gpu(vl_file):
    path, weights = vl_file
    image, patches = square_image()
    with closing(VisionTower.open(path, device="cpu:0")) as tower:
        assert error(tower.encode(patches), moonvit.encode_image("kimi_vl", weights, image)) < 5e-4


def test_stops_and_goes_on(tower):
    patches = random_patches(Grid(1, 4, 4))
    want = tower.encode(patches)
    answers = iter([False, True])
    with pytest.raises(EncodingStopped):
        tower.encode(patches, should_stop=lambda: next(answers))
    assert np.array_equal(tower.encode(patches), want)


def test_progress_names_what_is_done(folder):
    seen = []
    with closing(VisionTower.open(folder / "mmproj.gguf", num_threads=1)) as tower:
        tower.encode(random_patches(Grid(1, 2, 2)), lambda *step: seen.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["reading the vision tower", "preparing the vision tower's kernels", "reading the image"]
    assert seen[-1] == ("reading the image", 2, 2)


def test_what_is_refused(folder, tmp_path):
    path = folder / "mmproj.gguf"

    def refuses(match, target=None, **options):
        with pytest.raises(KimiLiteError, match=match):
            VisionTower.open(target or path, **options)

    refuses(r"makes features of 64 values, and the model reads 7,168", hidden_size=7168)
    for name in ("v.blk.1.ffn_up.bias", "mm.2.weight", "v.position_embd.weight"):
        refuses(f"tensor '?{name}'? is missing", rewrite(path, tmp_path / "missing.gguf", without=(name,)))
    cut = rewrite(path, tmp_path / "cut.gguf", lambda name, rows: rows[:-1] if name == "mm.1.weight" else rows)
    refuses(r"mm.1.weight is \[383, 384\], and by the metadata must be \[384, 384\]", cut)
    other = rewrite(path, tmp_path / "other.gguf", **{"clip.projector_type": "gemma3"})
    refuses("vision file of another model", other)
    refuses("rope_row_order is 'backwards'", rewrite(path, tmp_path / "order.gguf", **{ROW_ORDER_KEY: "backwards"}))
    with pytest.raises(KimiLiteError, match="takes 4 frame"), closing(VisionTower.open(path)) as tower:
        tower.encode(random_patches(Grid(5, 2, 2)))
