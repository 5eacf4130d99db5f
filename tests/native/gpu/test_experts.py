"""Experts in slots on the GPU, against the oracle: few choices and many, absent ones, mixed types."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from kimi_lite.native.gpu.experts import GROUPED_CHOICES, ExpertMatrix, expert_choices
from kimi_lite.native.gpu.grouped import Groups
from kimi_lite.native.isa import sum_order
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference import Expert, experts
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import random_rows
from tests.native import exact
from tests.native.gpu.tensors import back, on


class Form(NamedTuple):
    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


class Slots(NamedTuple):
    data: np.ndarray  # uint8 (slots, slot_bytes)
    form: Form
    experts: list[Expert]


def matrices_of(slots: Slots, number: int) -> list[exact.Weights]:
    """Gate, up and down of the expert in a slot."""
    data = slots.data[number]
    return [
        exact.Weights(m.layout_name, data[m.offset : m.offset + m.num_rows * m.row_bytes].reshape(m.num_rows, -1))
        for m in slots.form
    ]


def slots_of(types: tuple[str, str, str], num_slots: int, hidden: int, width: int) -> Slots:
    """Random experts as files hold them, each matrix on a border of 256 bytes."""
    rng = np.random.default_rng(20)
    shapes, matrices, offset = ((width, hidden), (width, hidden), (hidden, width)), [], 0
    for name, (num_rows, k) in zip(types, shapes, strict=True):
        row_bytes = BY_NAME[name].row_bytes(k)
        matrices.append(ExpertMatrix(name, offset, num_rows, k, row_bytes))
        offset = -(-(offset + num_rows * row_bytes) // 256) * 256
    data = np.full((num_slots, offset), 0xAB, np.uint8)
    plain = []
    for slot in data:
        for m in matrices:
            rows = random_rows(BY_NAME[m.layout_name], m.num_rows, m.k, m.k**-0.5, rng)
            slot[m.offset : m.offset + rows.size] = rows.reshape(-1)
            plain.append(dequantize(rows, m.layout_name))
    return Slots(data, Form(*matrices), [Expert(*plain[i : i + 3]) for i in range(0, len(plain), 3)])


def _rows(slots: Slots, x: np.ndarray, chosen: np.ndarray, tokens: np.ndarray, device) -> np.ndarray:
    """The rows of choices that have a slot; those of absent ones must stay as they were."""
    out = torch.full((len(chosen), x.shape[1]), 7.0, device=device)
    choices = on(device, chosen.astype(np.int32)), on(device, tokens.astype(np.int32))
    rows = back(expert_choices(on(device, x), on(device, slots.data), slots.form, *choices, out=out))
    assert (rows[chosen < 0] == 7).all()
    return rows[chosen >= 0]


def _check_exact(slots: Slots, x: np.ndarray, chosen: np.ndarray, tokens: np.ndarray, device) -> None:
    have, is_present = _rows(slots, x, chosen, tokens, device), chosen >= 0
    for row, slot, token in zip(have, chosen[is_present], tokens[is_present], strict=True):
        want = exact.expert(x[token : token + 1], *matrices_of(slots, slot), *sum_order())
        assert np.array_equal(row, want[0])


@pytest.mark.parametrize(("types", "size"), [
    (("TQ1_0", "IQ4_NL", "Q8_0"), (256, 32)),
])  # fmt: skip
def test_few_choices(types, size, device):
    slots = slots_of(types, 2, *size)
    x = np.random.default_rng(21).standard_normal((2, size[0])).astype(np.float32)
    _check_exact(slots, x, np.array([1, -1]), np.array([1, 0]), device)


def test_types_may_differ(device):
    """As recipes have it: down in more bits; MXFP4's blocks begin at odd addresses."""
    slots = slots_of(("Q4_0", "MXFP4", "F16"), 2, 32, 32)
    x = np.random.default_rng(22).standard_normal((1, 32)).astype(np.float32)
    _check_exact(slots, x, np.array([1, 0]), np.array([0, 0]), device)


@pytest.mark.parametrize(("types", "size"), [
    (("Q8_0", "Q8_0", "Q8_0"), (64, 96)), (("TQ1_0", "TQ1_0", "Q4_0"), (256, 64)), (("IQ4_NL", "Q1_0", "BF16"), (128,
    32)),
])  # fmt: skip
def test_many_choices(types, size, device):
    """Grouped: some experts in several blocks, some in none, some choices absent. Three roundings to bfloat16."""
    rng = np.random.default_rng(23)
    slots = slots_of(types, 4, *size)
    x = rng.standard_normal((20, size[0])).astype(np.float32)
    num_choices = GROUPED_CHOICES + 8
    chosen = rng.choice([-1, 0, 2, 2, 2, 3], num_choices)
    tokens = rng.integers(0, 20, num_choices)
    have, is_present = _rows(slots, x, chosen, tokens, device), chosen >= 0
    ids = chosen[is_present][:, None]
    expected = experts(x[tokens[is_present]], slots.experts, ids, np.ones(ids.shape))
    error = np.abs(have - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert error.max() < 3e-2, error


@pytest.mark.parametrize("is_exact", [False, True])
def test_few_experts_of_a_long_prompt(is_exact, device):
    """Fewer choices than tokens: the rows that they name are taken out first, with the same result."""
    rng = np.random.default_rng(25)
    slots = slots_of(("Q8_0", "Q8_0", "Q8_0"), 3, 64, 32)
    x = rng.standard_normal((60, 64)).astype(np.float32)
    num_choices = 5 if is_exact else GROUPED_CHOICES
    chosen = rng.choice([-1, 0, 2], num_choices).astype(np.int32)
    tokens = rng.integers(0, num_choices, num_choices).astype(np.int32)
    where = (on(device, slots.data), slots.form, on(device, chosen), on(device, tokens))
    long, short = (expert_choices(on(device, rows), *where, is_exact=is_exact) for rows in (x, x[:num_choices]))
    assert (chosen >= 0).any() and torch.equal(long[on(device, chosen >= 0)], short[on(device, chosen >= 0)])


def test_no_choices(device):
    slots = slots_of(("Q8_0", "Q8_0", "Q8_0"), 1, 32, 32)
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert expert_choices(torch.ones((1, 32), device=device), on(device, slots.data), slots.form, none, none).shape == (
        0,
        32,
    )


def test_groups_cover_every_choice_once(device):
    rng = np.random.default_rng(24)
    for num_choices, num_slots in ((1, 1), (40, 3), (70, 90)):
        chosen = rng.integers(-1, num_slots, num_choices).astype(np.int32)
        groups = Groups(on(device, chosen), num_slots, block_choices=16)
        order = groups.order.cpu().numpy()
        found = []
        for slot, first, end in zip(groups.slot_of_block, groups.first_of_block, groups.end_of_block, strict=True):
            if slot >= 0:
                assert 0 < end - first <= 16 and (chosen[order[first:end]] == slot.item()).all()
                found += order[first:end].tolist()
        assert sorted(found) == np.flatnonzero(chosen >= 0).tolist()
