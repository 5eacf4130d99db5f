"""Latents written to pages, and attention over them, against the oracle."""

import numpy as np
import pytest
import torch

from kimi_lite.native import reference
from kimi_lite.native.gpu.mla import mla_decode, num_splits_for, write_latent
from kimi_lite.native.latent_rows import row_bytes
from tests.native.gpu.tensors import back, on, seen

RANK, ROPE = 64, 16


def _attend(q: np.ndarray, rows: np.ndarray, scale: float) -> np.ndarray:
    """q (H, R + P), rows (positions, R + P) -> (H, R)."""
    return reference.softmax(q.astype(np.float64) @ rows.T * scale) @ rows[:, :RANK]


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2),
])  # fmt: skip
def test_decode(dtype, tolerance, device):
    """Pages out of order, lengths that end anywhere (within a page, at its end, after one position, nowhere), 20
    heads."""
    rng = np.random.default_rng(17)
    lengths = np.array([150, 64, 1, 0], np.int32)
    storage = on(device, rng.standard_normal((9, 64, RANK + ROPE)).astype(np.float32), dtype)
    table = np.stack([rng.permutation(9)[:4] for _ in lengths]).astype(np.int32)
    q = rng.standard_normal((4, 20, RANK + ROPE)).astype(np.float32)
    storage[table[2, 0], 1:] = float("nan")  # what lies beyond a sequence must not matter
    actual = mla_decode(
        on(device, q[:, :, :RANK]),
        on(device, q)[:, :, RANK:],
        storage,
        on(device, table),
        on(device, lengths),
        0.2,
        num_splits=4,
    )
    values = seen(storage).astype(np.float64)
    for token, length in enumerate(lengths[:3]):
        rows = values[table[token]].reshape(-1, RANK + ROPE)[:length]
        np.testing.assert_allclose(back(actual[token]), _attend(q[token], rows, 0.2), atol=tolerance)
    assert (back(actual[3]) == 0).all()


def test_sizes_need_not_be_powers_of_two(device):
    """The demo model has 576 and 192."""
    rng = np.random.default_rng(27)
    storage = on(device, rng.standard_normal((1, 64, 72)).astype(np.float32))
    q = rng.standard_normal((1, 3, 72)).astype(np.float32)
    table, lengths = on(device, np.zeros((1, 1), np.int32)), on(device, np.array([40], np.int32))
    actual = back(mla_decode(on(device, q)[:, :, :48], on(device, q)[:, :, 48:], storage, table, lengths, 0.2))
    rows = seen(storage)[0, :40].astype(np.float64)
    weights = reference.softmax(q[0].astype(np.float64) @ rows.T * 0.2)
    np.testing.assert_allclose(actual[0], weights @ rows[:, :48], atol=2e-6)


def test_splits_do_not_change_the_answer(device):
    rng = np.random.default_rng(18)
    storage = on(device, rng.standard_normal((5, 64, RANK + ROPE)).astype(np.float32))
    q = on(device, 3 * rng.standard_normal((1, 4, RANK + ROPE)).astype(np.float32))
    table, lengths = on(device, np.array([[4, 0, 2, 1, 3]], np.int32)), on(device, np.array([300], np.int32))
    answers = [
        mla_decode(q[:, :, :RANK].contiguous(), q[:, :, RANK:], storage, table, lengths, 0.3, num_splits=splits)
        for splits in (1, 16)
    ]
    np.testing.assert_allclose(back(answers[0]), back(answers[1]), atol=3e-6)


def test_a_bad_latent_is_seen(device):
    storage = torch.zeros((2, 64, RANK + ROPE), device=device)
    storage[1, 3, 5] = float("nan")
    table, lengths = on(device, np.array([[1], [0]], np.int32)), on(device, np.array([10, 10], np.int32))
    q = torch.ones((2, 4, RANK + ROPE), device=device)
    actual = back(mla_decode(q[:, :, :RANK], q[:, :, RANK:], storage, table, lengths, 1.0))
    assert np.isnan(actual[0]).all() and (actual[1] == 0).all()


def test_number_of_splits_follows_from_shapes():
    assert num_splits_for(1, 64, 32768) == 32 and num_splits_for(64, 64, 32768) == 1
    assert num_splits_for(1, 64, 64) == 1 and num_splits_for(1, 16, 1 << 18) == 64


@pytest.mark.parametrize(("rank", "rope"), [(64, 16), (96, 64)])
def test_decode_of_eight_bits(rank, rope, device):
    """Groups of 32 within the latent and within the key, and a key shorter than a group. float16 factors."""
    rng = np.random.default_rng(25)
    latents = rng.standard_normal((3 * 64, rank + rope)).astype(np.float32)
    rows = reference.quantize_latents(latents).reshape(3, 64, -1)
    q = rng.standard_normal((1, 5, rank + rope)).astype(np.float32)
    table, lengths = on(device, np.array([[2, 0]], np.int32)), on(device, np.array([100], np.int32))
    storage = on(device, rows)
    actual = back(mla_decode(on(device, q)[:, :, :rank], on(device, q)[:, :, rank:], storage, table, lengths, 0.2))
    seen_rows = reference.dequantize_latents(rows)[[2, 0]].reshape(-1, rank + rope)[:100].astype(np.float64)
    weights = reference.softmax(q[0].astype(np.float64) @ seen_rows.T * 0.2)
    np.testing.assert_allclose(actual[0], weights @ seen_rows[:, :rank], atol=2e-3)


@pytest.mark.parametrize(("rank", "rope"), [(64, 16), (96, 48)])
def test_write_latent_in_eight_bits(rank, rope, device):
    """The oracle's codes, but where the norm's last bit tips one over; a group with a NaN is a NaN, the others stay."""
    rng = np.random.default_rng(26)
    kv = rng.standard_normal((4, rank + rope)).astype(np.float32)
    kv[1, rank + 3] = np.nan
    kv[2, :32], kv[3] = 0, 0
    weight, angles = (
        rng.standard_normal(rank).astype(np.float32),
        rng.standard_normal((4, rope // 2)).astype(np.float32),
    )
    cos, sin = np.cos(angles), np.sin(angles)
    storage = torch.zeros((1, 64, row_bytes("q8", rank + rope)), dtype=torch.uint8, device=device)
    slots = on(device, np.array([9, 63, 0, 1], np.int64))
    write_latent(on(device, kv), on(device, weight), 1e-5, on(device, cos), on(device, sin), storage, slots)
    keys = reference.rotate_pairs(kv[:, rank:], cos, sin)
    exact = np.concatenate([reference.rms_norm(kv[:, :rank], weight, 1e-5), keys], axis=1).astype(np.float32)
    expected = reference.quantize_latents(exact)
    rows = storage[0].cpu().numpy()[[9, 63, 0, 1]]
    values, expected_values = reference.dequantize_latents(rows), reference.dequantize_latents(expected)
    np.testing.assert_allclose(values, expected_values, atol=0.03)
    assert (
        (rows == expected).mean() > 0.98 and np.isnan(values[1, rank:]).any() and not np.isnan(values[1, :rank]).any()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_latent(dtype, device):
    rng = np.random.default_rng(19)
    kv = rng.standard_normal((3, RANK + ROPE)).astype(np.float32)
    weight, angles = (
        rng.standard_normal(RANK).astype(np.float32),
        rng.standard_normal((3, ROPE // 2)).astype(np.float32),
    )
    storage = torch.full((2, 64, RANK + ROPE), 7.0, dtype=dtype, device=device)
    slots = on(device, np.array([70, -1, 3], np.int32))
    cos, sin = on(device, np.cos(angles)), on(device, np.sin(angles))
    write_latent(on(device, kv), on(device, weight), 1e-5, cos, sin, storage, slots)
    latent = reference.rms_norm(kv[:, :RANK], weight, 1e-5)
    expected = np.concatenate([latent, reference.rotate_pairs(kv[:, RANK:], np.cos(angles), np.sin(angles))], axis=1)
    rows = back(storage).reshape(-1, RANK + ROPE)
    np.testing.assert_allclose(
        rows[[70, 3]], expected[[0, 2]], rtol=1e-2 if dtype == torch.bfloat16 else 2e-6, atol=1e-6
    )
    assert (np.delete(rows, [70, 3], axis=0) == 7).all(), "padding was written"
