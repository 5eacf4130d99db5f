"""The bytes that a plan reserves for the CPU's buffers against the arrays that a loaded model really makes."""

from dataclasses import replace

import numpy as np
import pytest

from kimi_lite.arch.known import K2_5, K2_5_TOWER
from kimi_lite.arch.moonvit import read_vision_file
from kimi_lite.arch.sizes import sizes_of
from kimi_lite.arch.tensors import open_model, tensor_shapes
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.cpu.transformer import Transformer
from kimi_lite.model.hybrid.attention import heads_at_a_time
from kimi_lite.model.vision.cpu import CpuTower, _Item
from kimi_lite.model.vision.patches import Grid, Patches
from kimi_lite.model.vision.weights import VisionWeights
from kimi_lite.native.amx import has_amx
from kimi_lite.native.gpu.pieces import DECODED_WEIGHTS
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.options import Options
from kimi_lite.plan.workspace import (
    PROMPT_CHUNKS,
    STREAM_EXPERTS,
    cpu_work_bytes,
    gpu_work_bytes,
    tile_pack_bytes,
    vision_work_bytes,
)
from kimi_lite.tools.make.vision import write_tower
from tests.tiny import write_tiny_gguf

SHAPES = [
    {},
    {"hidden_size": 1024, "expert_feed_forward_size": 512, "num_layers": 2},
    {"num_experts": 64, "num_experts_used": 8, "expert_feed_forward_size": 256},
    {"num_heads": 16, "kv_lora_rank": 512, "hidden_size": 512},
    {"feed_forward_size": 4096, "q_lora_rank": 0},
]


def array_bytes(thing: object, seen: set[int]) -> int:
    """Of all numpy arrays that are reached from an object of ours, each once; views count as what they look into."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, np.ndarray):
        owner = thing
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if owner is not thing:
            return array_bytes(owner, seen)
        return thing.nbytes if thing.flags.owndata else 0  # what is mapped from the file is no buffer
    if isinstance(thing, dict):
        return sum(array_bytes(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple, set)):
        return sum(array_bytes(value, seen) for value in thing)
    if not type(thing).__module__.startswith("kimi_lite"):
        return 0
    slots = {name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())}
    names = {*getattr(thing, "__dict__", {}), *slots}
    return sum(array_bytes(getattr(thing, name, None), seen) for name in names)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_buffers_are_what_was_planned(tmp_path, shape, num_threads):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), types={"_exps": "Q8_0"}, **shape)
    store, config = open_model(path)
    kv = KVCache(config.num_layers, config.kv_latent_size, 2)
    model = Transformer(store, config, kv, Options(num_threads=num_threads))
    try:
        held = [model._layers.buffers, model._layers.run, model._head.run, model._head.x, model._head.logits]
        made = array_bytes(held, set())
        planned = cpu_work_bytes(config, num_threads)
        print(shape, num_threads, made, planned, planned / made)
    finally:
        model.close()
        store.close()
    if not has_amx():
        planned -= tile_pack_bytes(config)
    assert made <= planned <= 1.35 * made


@pytest.mark.parametrize("type_name", ["f32", "q8_0"])
def test_an_image_takes_what_was_planned(tmp_path, type_name, monkeypatch):
    """Buffers of an item of the most patches, by the arrays that are made for it."""
    sizes = replace(K2_5_TOWER, hidden=64, feed_forward=96, heads=4, layers=1, height=8, width=8, text_hidden=64)
    write_tower(tmp_path / "mmproj.gguf", sizes, type_name)
    monkeypatch.setattr(CpuTower, "_compile", lambda self, report: None)  # nothing is computed here
    store = GGUFStore.open(tmp_path / "mmproj.gguf")
    file, tower = read_vision_file(store), None
    side = int(sizes.max_patches**0.5)
    patches = Patches(np.zeros((side * side, 3, sizes.patch, sizes.patch), np.uint8), Grid(1, side, side))
    try:
        tower = CpuTower(VisionWeights(store, file), file, num_threads=1)
        made = array_bytes(vars(_Item(tower, patches)), set()) + patches.pixels.nbytes
    finally:
        if tower:
            tower.close()
    planned = vision_work_bytes(sizes, is_on_gpu=False)
    assert made <= planned and (type_name != "f32" or planned <= 1.4 * made), (made, planned)


@pytest.mark.parametrize("context_length", [64, 8192, 32_768, 262_144])
@pytest.mark.parametrize("chunk", PROMPT_CHUNKS)
def test_a_chunk_attends_to_the_whole_context(chunk, context_length):
    """Work memory on a GPU holds what is alive at a time: the expanded heads that `model.hybrid.attention` makes, the
    residual stream, queries and results; or a row for every chosen expert; and a piece of a decoded matrix."""
    c = K2_5
    sizes = sizes_of(c, ((name, shape, BY_NAME["Q8_0"]) for name, shape in tensor_shapes(c).items()))
    heads = heads_at_a_time(c, context_length, 2)
    keys_and_values = heads * context_length * (192 + 192) * 2
    attending = keys_and_values + chunk * (4 * c.hidden_size + 64 * (192 * 8 + 128 * 2))
    choosing = chunk * (4 * c.hidden_size + 8 * 4 * c.hidden_size)
    found = gpu_work_bytes(sizes, chunk, context_length)
    assert found >= max(attending, choosing) + 2 * DECODED_WEIGHTS + 2 * STREAM_EXPERTS * sizes.slot_bytes
    assert found <= 1.9 * (max(attending, choosing) + 2 * DECODED_WEIGHTS + 2 * STREAM_EXPERTS * sizes.slot_bytes)
