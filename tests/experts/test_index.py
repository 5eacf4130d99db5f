"""One index and one store: wherever an expert's bytes are looked up, they are those that the tensors hold."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.sizes import store_sizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.memory import aligned_memory
from kimi_lite.experts.ram import RamSlots
from kimi_lite.experts.reader import ExpertReader
from kimi_lite.experts.store import ExpertStore
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.experts import layer_experts
from kimi_lite.native.cpu.matrix import DATA, NUM_ROWS, ROW_BYTES, K
from tests.tiny import write_tiny_gguf

TYPES = ("F32", "F16", "Q8_0", "Q4_0", "TQ2_0", "Q4_K")
MODELS = st.fixed_dictionaries(
    {
        "types": st.fixed_dictionaries(
            {
                "gate_exps": st.sampled_from(TYPES),
                "up_exps": st.sampled_from(TYPES),
                "down_exps": st.sampled_from(TYPES),
            }
        ),
        "num_layers": st.integers(2, 3),
        "num_dense_layers": st.integers(0, 1),
        "num_experts": st.sampled_from([4, 8]),
        "expert_feed_forward_size": st.sampled_from([256, 512]),
        "is_gate_up_fused": st.booleans(),
        "max_tensors_per_shard": st.sampled_from([None, 7]),
    }
)


def parts_of(store, config, layer, expert):
    """Gate, up and down of an expert from the tensors themselves."""
    width, prefix = config.expert_feed_forward_size, f"blk.{layer}.ffn_"
    down = store.tensors[f"{prefix}down_exps.weight"].data[expert]
    if fused := store.tensors.get(f"{prefix}gate_up_exps.weight"):
        return fused.data[expert, :width], fused.data[expert, width:], down
    return (*(store.tensors[f"{prefix}{name}_exps.weight"].data[expert] for name in ("gate", "up")), down)


@settings(max_examples=12, deadline=None)
@given(model=MODELS, seed=st.integers(0, 99))
def test_all_who_look_an_expert_up_find_its_bytes(model, seed, tmp_path_factory):
    """The CPU's table, the file as the readers take it, the slots in VRAM with their offsets, and the slots in RAM."""
    model = {key: value for key, value in model.items() if value is not None}
    path = write_tiny_gguf(tmp_path_factory.mktemp("index") / "tiny.gguf", np.random.default_rng(seed), **model)
    store = GGUFStore.open(path)
    config = ModelConfig.from_metadata(store.metadata)
    index = ExpertIndex.find(store, config)
    assert list(index.layers) == list(range(config.num_dense_layers, config.num_layers))
    assert index.routed_bytes == sum(t.num_bytes for name, t in store.tensors.items() if "_exps" in name)
    assert index.vram_slot_bytes == store_sizes(store, config).slot_bytes
    tables = {layer: layer_experts(store, config, layer)[0].table for layer in index.layers}
    rng, reader = np.random.default_rng(seed), ExpertReader(index.shards, 1)
    slots = RamSlots(index, tables, index.ram_bytes, config.num_experts_used)
    stores = ExpertStore(index), ExpertStore(index, slots)
    try:
        for layer in index.layers:
            expert = int(rng.integers(config.num_experts))
            want, found = parts_of(store, config, layer, expert), index.layers[layer]
            for part, matrix, row in zip(want, found.matrices, tables[layer][expert], strict=True):
                assert (matrix.num_rows, matrix.row_bytes) == part.shape
                assert (row[NUM_ROWS // 8], row[ROW_BYTES // 8], row[K // 8]) == (*part.shape, matrix.k)
                assert ctypes.string_at(int(row[DATA // 8]), part.nbytes) == part.tobytes()
                assert matrix.offset % 256 == 0 and matrix.end <= found.vram_slot_bytes <= index.vram_slot_bytes
            memory = aligned_memory(found.ram_slot_bytes)
            for part, (run, target) in zip(want, found.reads(expert, memory), strict=True):
                assert reader.read(run, target).tobytes() == part.tobytes()
                assert run.inside(target).tobytes() == part.tobytes()
            piece = aligned_memory(index.piece_bytes)
            for number, part in enumerate(want):
                for each in stores:
                    assert each.read_part(layer, expert, number, piece).tobytes() == part.tobytes()
            read = [each.read(layer, expert) for each in stores]  # mapped, and past the page cache
            with slots.request(layer, np.array([expert])) as request:
                assert request.take() == [expert]
            read.append(stores[1].read(layer, expert))  # from its slot in RAM
            for part, matrix in zip(want, found.matrices, strict=True):
                assert {slot[matrix.offset : matrix.end].tobytes() for slot in read} == {part.tobytes()}
        assert (stores[0].num_file_reads, stores[0].num_ram_reads) == (2 * len(tables), 0)
        assert (stores[1].num_file_reads, stores[1].num_ram_reads) == (2 * len(tables), len(tables))
        num_bytes = sum(found.expert_bytes for found in index.layers.values())
        assert (stores[0].file_bytes, stores[0].ram_bytes) == (2 * num_bytes, 0)
        assert (stores[1].file_bytes, stores[1].ram_bytes) == (2 * num_bytes, num_bytes)
    finally:
        reader.close()
        for each in stores:
            each.close()


@pytest.mark.parametrize("is_gate_up_fused", [False, True])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0", "F16"])
def test_the_plan_counts_slots_as_they_are(type_name, is_gate_up_fused, tmp_path):
    """Also where a matrix ends between two borders of 256 bytes."""
    sizes = {"hidden_size": 64, "expert_feed_forward_size": 32, "types": {"_exps": type_name}}
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", np.random.default_rng(0), is_gate_up_fused=is_gate_up_fused, num_layers=2, **sizes
    )
    store = GGUFStore.open(path)
    config = ModelConfig.from_metadata(store.metadata)
    assert store_sizes(store, config).slot_bytes == ExpertIndex.find(store, config).vram_slot_bytes


def test_a_disk_that_fails_is_a_sentence_that_names_the_file(tmp_path):
    """Also to whoever brings experts to the GPU; and the file is the one that failed, not the layer's first."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), max_tensors_per_shard=1)
    store = GGUFStore.open(path)
    config = ModelConfig.from_metadata(store.metadata)
    index = ExpertIndex.find(store, config)
    layer = next(n for n, each in index.layers.items() if len({m.shard for m in each.matrices}) > 1)
    down = index.layers[layer].down
    tables = {number: layer_experts(store, config, number)[0].table for number in index.layers}
    slots = RamSlots(index, tables, index.ram_bytes, config.num_experts_used)
    try:
        slots.reader._files[down.shard]._num_bytes = 1 << 40
        slots.reader._files[down.shard]._read_some = lambda place, offset: 0
        for read in (
            lambda: ExpertStore(index, slots).read(layer, 3),
            lambda: slots.request(layer, np.array([3])).take(),
        ):
            with pytest.raises(KimiLiteError, match=rf"{down.shard.name}: expert 3 of layer {layer} could not be read"):
                read()
    finally:
        slots.close()


def test_a_model_without_experts_has_an_empty_index(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0), num_dense_layers=3)
    store = GGUFStore.open(path)
    index = ExpertIndex.find(store, ModelConfig.from_metadata(store.metadata))
    assert (index.layers, index.shards, index.vram_slot_bytes, index.routed_bytes) == ({}, (), 0, 0)
