"""A model's rows on memory nodes: in slots, in files, and what is said where they lie elsewhere."""

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.engine import warming
from kimi_lite.engine.planning import plan_load
from kimi_lite.experts import nodes, ram
from kimi_lite.experts.index import ExpertIndex
from kimi_lite.experts.ram import RamSlots
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.experts import layer_experts
from kimi_lite.native.cpu.matrix import DATA
from kimi_lite.native.cpu.nodes import ThreadGroup
from kimi_lite.options import Options
from tests.tiny import write_tiny_gguf

EVERY = frozenset({0, 1})
GROUPS = (ThreadGroup(0, 0, EVERY, 0, 1), ThreadGroup(2, 2, EVERY, 1, 3))  # a third of the rows, and two thirds
STEP = nodes.BAND_STEP


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[GGUFStore, ModelConfig, ExpertIndex]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    store = GGUFStore.open(write_tiny_gguf(path, np.random.default_rng(0), num_experts=8))
    config = ModelConfig.from_metadata(store.metadata)
    return store, config, ExpertIndex.find(store, config)


def third(num_rows: int) -> int:
    """Rows of the first group."""
    return -(-num_rows // STEP) // 3 * STEP


def test_slots_hold_each_nodes_rows(model: tuple) -> None:
    _, _, index = model
    for layer in index.layers.values():
        parts, at = nodes.slot_parts(layer, GROUPS), 0
        assert parts[0][0] == 0 and parts[-1][1] == layer.ram_slot_bytes
        for matrix in layer.matrices:
            middle = at + third(matrix.num_rows) * matrix.row_bytes
            end = at + matrix.run(0).target_bytes
            own = [part for part in parts if at <= part[0] < end]
            assert own == [part for part in ((at, middle, 0), (middle, end, 1)) if part[0] < part[1]]
            at = end


def test_files_hold_each_nodes_rows(model: tuple) -> None:
    """Every matrix whole and without overlap, every expert's by its own rows."""
    store, config, index = model
    parts = sorted([*nodes._expert_parts(index, GROUPS), *nodes._other_parts(store, config, GROUPS)])
    assert all(before[2] <= after[1] for before, after in pairwise(parts))
    matrices = [tensor for tensor in store.tensors.values() if tensor.data.ndim > 1]
    assert sum(stop - start for _, start, stop, _ in parts) == sum(tensor.num_bytes for tensor in matrices)
    owner = {start: number for _, start, _, number in parts}
    matrix = next(iter(index.layers.values())).down
    for expert in range(index.num_experts):
        first = matrix.start + expert * matrix.stride
        assert owner[first + third(matrix.num_rows) * matrix.row_bytes] == 1
        assert third(matrix.num_rows) == 0 or owner[first] == 0
    runs = nodes.file_runs(store, config, GROUPS)
    assert [(run.start, run.stop) for run in runs] == [(start, stop) for _, start, stop, _ in parts]


def test_slots_are_touched_by_their_nodes_and_hold_the_experts(model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    store, config, index = model
    touched = []
    monkeypatch.setattr(nodes, "touch", lambda spans, groups, page_bytes: touched.append((spans, groups)))
    monkeypatch.setattr(nodes, "locate", lambda addresses: np.zeros(len(addresses), np.int32) - 2)
    tables = {layer: layer_experts(store, config, layer)[0].table for layer in index.layers}
    slots = RamSlots(index, tables, None, config.num_experts_used, groups=GROUPS)
    try:
        slots.fill(None, lambda done, total: None)
        memories = [pool.memory for pool in slots._pools.values()]
        assert [(int(s.starts[0]), s.stop) for s, _ in touched] == [
            (m.ctypes.data, m.ctypes.data + m.nbytes) for m in memories
        ]
        assert slots.holds_all and all(groups == GROUPS for _, groups in touched)
        spans, layer = touched[0][0], next(iter(index.layers.values()))
        for expert in range(index.num_experts):
            address = int(tables[next(iter(index.layers))][expert, 2, DATA // 8])  # of down's first row
            middle = third(layer.down.num_rows) * layer.down.row_bytes
            found = spans.owners_at(address + np.array([middle + 5000, layer.down.num_bytes - 1]))
            assert found.tolist() == [1, 1] and (middle < 5000 or spans.owners_at(np.array([address + 1]))[0] == 0)
    finally:
        slots.close()


def test_without_nodes_memory_is_as_on_one(model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    store, config, index = model
    monkeypatch.setattr(ram, "place_slots", lambda *_: pytest.fail("nothing is placed"))
    tables = {layer: layer_experts(store, config, layer)[0].table for layer in index.layers}
    RamSlots(index, tables, None, config.num_experts_used).close()


def said(found: np.ndarray | OSError, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings where the kernel says this of ten pages, five of each group's."""

    def locate(addresses: np.ndarray) -> np.ndarray:
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(nodes, "locate", locate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nodes.check_pages(np.arange(10), np.repeat([0, 1], 5), GROUPS, "do something")
    return [str(each.message) for each in caught]


def test_pages_on_other_nodes_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.repeat([0, 2], 5)
    assert said(right, monkeypatch) == []
    assert said(np.where(np.arange(10) == 9, 0, right), monkeypatch) == []  # one of ten
    (warning,) = said(np.zeros(10), monkeypatch)
    assert "50% of the model's pages lie on other memory nodes" in warning and "do something" in warning
    assert said(np.full(10, -14), monkeypatch) == []  # none has memory yet


def test_a_container_without_the_right_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    (warning,) = said(PermissionError(1, "Operation not permitted"), monkeypatch)
    assert "move_pages is refused: Operation not permitted" in warning and "--cap-add SYS_NICE" in warning


@pytest.mark.parametrize(("policy", "is_placed"), [(0, True), (4, True), (3, False), (2, False), (None, True)])
def test_numactl_goes_before_us(policy: int | None, is_placed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def inherited() -> int:
        if policy is None:
            raise PermissionError
        return policy

    monkeypatch.setattr(nodes, "inherited_policy", inherited)
    assert nodes.placed_groups(GROUPS) == (GROUPS if is_placed else ())
    assert nodes.placed_groups(()) == ()


@pytest.mark.parametrize("is_divided", [True, False])
def test_files_are_warmed_by_rows_where_threads_are_divided(
    model: tuple, is_divided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config, _ = model
    given, checked = [], []
    monkeypatch.setattr(warming, "warm", lambda paths, *_, runs=(): given.append((list(paths), list(runs))) or 5)
    monkeypatch.setattr(warming, "check_files", lambda *_, **kinds: checked.append(kinds))
    monkeypatch.setattr(warming, "_reading_groups", lambda plan: GROUPS if is_divided else ())
    plan = plan_load(store, config, Options(context_length=64))
    assert warming.warm_model(store.path, plan, lambda done, total: None, lambda: False) == 5
    (paths, runs), wanted = given[0], nodes.file_runs(store, config, GROUPS) if is_divided else []
    assert paths == [Path(store.path)] and runs == wanted
    assert checked == ([{"has_experts": True, "has_others": True}] if is_divided else [])
    checked.clear()
    warming.check_warmed(
        store, config, replace(plan, situation=replace(plan.situation, limits=Options(loading="read")))
    )
    assert checked == ([{"has_experts": False, "has_others": True}] if is_divided else [])


def looked_at(model: tuple, monkeypatch: pytest.MonkeyPatch, cached_share: float, **kinds: bool) -> list[tuple]:
    """Arguments for `check_pages` where so much of the files is in the page cache."""
    store, config, _ = model
    asked = []
    monkeypatch.setattr(nodes, "check_pages", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(nodes, "are_cached", lambda parts: [i < cached_share * len(parts) for i in range(len(parts))])
    nodes.check_files(store, config, GROUPS, **kinds)
    return asked


def test_pages_of_a_mapped_file_are_looked_at(model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses within the mapping, with the group whose rows they are."""
    store, config, index = model
    ((addresses, owners, groups, _),) = looked_at(model, monkeypatch, 1.0)
    tensor = next(iter(store.tensors.values()))
    offsets = addresses - (tensor.data.ctypes.data - tensor.start)
    parts = [*nodes._expert_parts(index, GROUPS), *nodes._other_parts(store, config, GROUPS)]
    for offset, owner in zip(offsets.tolist(), owners.tolist(), strict=True):
        assert owner == next(part.group for part in parts if part.start <= offset < part.stop)
    assert groups == GROUPS and 100 < len(addresses) <= nodes._PAGES_LOOKED_AT
    ((experts, _, _, _),) = looked_at(model, monkeypatch, 1.0, has_others=False)
    ((others, _, _, _),) = looked_at(model, monkeypatch, 1.0, has_experts=False)
    assert sorted([*experts, *others]) == sorted(addresses)


def test_what_is_not_in_memory_is_not_looked_at(model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looked_at(model, monkeypatch, 0.1) == []
    assert looked_at(model, monkeypatch, 1.0, has_experts=False, has_others=False) == []  # slots, and a GPU
    ((addresses, _, _, _),) = looked_at(model, monkeypatch, 0.5)
    assert len(addresses) < len(looked_at(model, monkeypatch, 1.0)[0][0])


def test_the_page_cache_is_asked(model: tuple) -> None:
    store, _, index = model
    parts = list(nodes._expert_parts(index, GROUPS))[:20]
    for shard in store.shards:
        shard.read_bytes()
    found = nodes.are_cached(parts)
    assert len(found) == 20 and (all(found) or not any(found))  # a file system may not tell
