"""The numpy oracle of every kernel: slow, obvious, always kept.

Sums are float64, so what differs from a kernel is the kernel's float32 rounding. Weights come as plain matrices
(`reference_types.dequantize`); what kernels do to activations on purpose (int8 codes) is done here too, by `kind`: 0
for float32, 32 or 256 for int8 with a scale per so many values (`native.cpu.activations`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kimi_lite.native.latent_rows import GROUP_VALUES, row_bytes

SMALLEST_PEAK = np.float32(1e-36)  # a group of activations below that counts as zeros


class QuantizedActivations(NamedTuple):
    """int8 codes (T, K) and float32 scales (T, K / kind): value = code * scale."""

    codes: np.ndarray
    scales: np.ndarray


def quantize_activations(x: np.ndarray, kind: int) -> QuantizedActivations:
    """float32 (T, K) -> int8 with one scale per `kind` (32 or 256) values: code = round to even of x * 127 / max|x|.

    ggml's Q8_0 and Q8_K (ggml-quants.c), but: a group whose largest value is below SMALLEST_PEAK is zeros, and one with
    an infinity or a NaN has the scale NaN, so that every product with it is NaN.
    """
    assert x.dtype == np.float32 and x.shape[1] % kind == 0, (x.dtype, x.shape, kind)
    groups = x.reshape(len(x), -1, kind)
    peak = np.abs(groups).max(axis=2, keepdims=True)  # NaN where a value is NaN
    is_finite, is_zero = np.isfinite(peak), peak < SMALLEST_PEAK
    inverse = np.float32(127) / np.where(is_finite & ~is_zero, peak, np.float32(np.inf))
    scaled = np.where(is_finite, groups, np.float32(0)) * inverse
    scales = np.where(is_finite, np.where(is_zero, np.float32(0), peak / np.float32(127)), np.float32(np.nan))
    return QuantizedActivations(np.rint(scaled).astype(np.int8).reshape(x.shape), scales[..., 0])


def seen_activations(x: np.ndarray, kind: int) -> np.ndarray:
    """float32 (T, K) -> float64 (T, K): the values that a product of this kind multiplies."""
    if kind == 0:
        return x.astype(np.float64)
    codes, scales = quantize_activations(x, kind)
    return codes * np.repeat(scales.astype(np.float64), kind, axis=1)


def linear(weights: np.ndarray, x: np.ndarray, kind: int) -> np.ndarray:
    """weights float32 (N, K), x float32 (T, K) -> float64 (T, N): the oracle of `rows`, `panel` with `gemm`,
    `linear_op`."""
    return seen_activations(x, kind) @ weights.astype(np.float64).T


def quantize_latents(x: np.ndarray) -> np.ndarray:
    """float32 (..., latent) -> uint8 rows of the q8 cache (`native.latent_rows`): int8 codes, then a float16 scale per
    32.

    scale = max|x| / 127 of its group, rounded to float16; code = x / scale, rounded to even. A group with an infinity
    or a NaN has the scale NaN and no codes; one too small for float16 has the scale 0.
    """
    latent = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -latent % GROUP_VALUES)])
    groups = padded.reshape(*x.shape[:-1], -1, GROUP_VALUES)
    peak = np.abs(groups).max(-1, keepdims=True)  # NaN where a value is NaN
    is_finite = np.isfinite(peak)
    with np.errstate(over="ignore"):
        scales = np.where(is_finite, peak / np.float32(127), np.float32(np.nan)).astype(np.float16)
    is_used = is_finite & (scales > 0)
    divisor = np.where(is_used, scales.astype(np.float32), np.float32(1))
    codes = np.rint(np.clip(np.where(is_used, groups, np.float32(0)) / divisor, -127, 127)).astype(np.int8)
    codes = np.ascontiguousarray(codes.reshape(padded.shape)[..., :latent])
    return np.concatenate([codes.view(np.uint8), np.ascontiguousarray(scales[..., 0]).view(np.uint8)], axis=-1)


def dequantize_latents(rows: np.ndarray) -> np.ndarray:
    """uint8 rows of the q8 cache -> float32 (..., latent)."""
    latent = next(n for n in range(rows.shape[-1] // 16 * 16, 0, -16) if row_bytes("q8", n) == rows.shape[-1])
    codes = np.ascontiguousarray(rows[..., :latent]).view(np.int8).astype(np.float32)
    scales = np.ascontiguousarray(rows[..., latent:]).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # 0 * infinity
        return codes * np.repeat(scales, GROUP_VALUES, axis=-1)[..., :latent]


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (Hendrycks & Gimpel 2016)."""
    with np.errstate(over="ignore"):  # e^-x is infinite where the result is nothing
        return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x (T, K), weight (K,) -> float64 (T, K): x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotate_pairs(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (..., R), cos and sin (..., R / 2): pair (x[2i], x[2i + 1]) turned by angle i (RoFormer; GGUF's "normal"
    order)."""
    a, b = x[..., 0::2].astype(np.float64), x[..., 1::2].astype(np.float64)
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


class Expert(NamedTuple):
    """float32 gate and up (F, D), down (N, F)."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


def experts(
    x: np.ndarray, chosen: Sequence[Expert], ids: np.ndarray, weights: np.ndarray, kinds: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """x float32 (T, D), ids int (T, K), weights (T, K) -> float64 (T, N): sum of weight * down(silu(gate x) * up x).

    kinds: of the activations that gate and up multiply, and of those that down multiplies. Shared experts are ids that
    every token has, with weight 1. (DeepSeekMoE, arXiv 2401.06066; SwiGLU, arXiv 2002.05202.)
    """
    out = np.zeros((len(x), len(chosen[0].down)))
    for token in range(len(x)):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate, up, down = chosen[expert]
            row = x[token : token + 1]
            hidden = silu(linear(gate, row, kinds[0])) * linear(up, row, kinds[0])  # (1, F)
            out[token] += weight * linear(down, hidden.astype(np.float32), kinds[1])[0]
    return out


def route(
    logits: np.ndarray,
    bias: np.ndarray | None,
    top_k: int,
    groups: tuple[int, int] = (1, 1),
    is_sigmoid: bool = True,
    is_normalized: bool = True,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """logits float32 (T, E) -> ids int (T, top_k), best first, and float32 weights. groups: (number, how many are
    kept).

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and DeepSeek-V2 (arXiv 2405.04434, section 2.2.2). The bias steers the
    choice and not the weights; a group counts by its two best experts with a bias, by its best without. Of equals the
    lower number wins; NaN and infinity come first with the weight NaN, so that they are seen (a bias of -infinity is no
    error).
    """
    logits = np.where(np.isfinite(logits), logits.astype(np.float32), np.float32(np.nan))
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-logits)) if is_sigmoid else softmax(logits)
    choice = scores if bias is None else scores + bias  # (T, E)
    scores = np.where(choice < np.inf, scores, np.float32(np.nan))
    ids = np.empty((len(logits), top_k), np.int32)
    for token, row in enumerate(choice):
        by_group = row.reshape(groups[0], -1)
        best_last = np.sort(by_group, axis=1)  # NaN sorts last
        value = best_last[:, -1] if bias is None else best_last[:, -2:].sum(axis=1)
        kept = _best_first(value)[: groups[1]]
        is_kept = np.isin(np.arange(len(row)) // by_group.shape[1], kept)
        ids[token] = [e for e in _best_first(row) if is_kept[e]][:top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    if is_normalized:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    return ids, weights * np.float32(scale)


def _best_first(values: np.ndarray) -> np.ndarray:
    """Indices in descending order, NaN before all, equals by index."""
    return np.argsort(np.where(np.isnan(values), -np.inf, -values), kind="stable")


class LatentAttention(NamedTuple):
    """One sequence's inputs of multi-head latent attention.

    q float32 (T, H, nope + rope), the rope part rotated; latents (P, kv_lora + rope), as the cache holds them: normed
    latent and rotated shared key; positions int (T,): token t sees latents 0..positions[t]. k_b float32 (H, kv_lora,
    nope), v_b float32 (H, V, kv_lora). `scale` multiplies the scores.
    """

    q: np.ndarray
    latents: np.ndarray
    positions: np.ndarray
    k_b: np.ndarray
    v_b: np.ndarray
    scale: float


def expanded_attention(inputs: LatentAttention) -> np.ndarray:
    """float64 (T, H, V), as the architecture defines it: keys and values of every head made from the latents.

    DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """
    q, latents, positions, k_b, v_b, scale = inputs
    kv_lora, nope = k_b.shape[1:]
    c_kv, k_rope = latents[:, :kv_lora].astype(np.float64), latents[:, kv_lora:].astype(np.float64)
    out = np.empty((len(q), len(k_b), v_b.shape[1]))
    for head in range(len(k_b)):
        keys, values = c_kv @ k_b[head], c_kv @ v_b[head].T.astype(np.float64)  # (P, nope), (P, V)
        scores = (q[:, head, :nope] @ keys.T + q[:, head, nope:] @ k_rope.T) * scale  # (T, P)
        out[:, head] = _causal_softmax(scores, positions) @ values
    return out


def absorbed_attention(inputs: LatentAttention, kinds: tuple[int, int] = (0, 0)) -> np.ndarray:
    """float64 (T, H, V), the same with W_UK moved to the query and W_UV behind the sum: all heads read the one latent.

    kinds: of the activations that k_b and v_b multiply.
    """
    q, latents, positions, k_b, v_b, scale = inputs
    kv_lora, nope = k_b.shape[1:]
    out = np.empty((len(q), len(k_b), v_b.shape[1]))
    for head in range(len(k_b)):
        q_latent = linear(k_b[head], np.ascontiguousarray(q[:, head, :nope]), kinds[0])  # (T, kv_lora)
        scores = np.concatenate([q_latent, q[:, head, nope:]], axis=1) @ latents.T.astype(np.float64) * scale  # (T, P)
        context = _causal_softmax(scores, positions) @ latents[:, :kv_lora].astype(np.float64)  # (T, kv_lora)
        out[:, head] = linear(v_b[head], context.astype(np.float32), kinds[1])
    return out


def _causal_softmax(scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
    is_visible = np.arange(scores.shape[1]) <= positions[:, None]  # (T, P)
    return softmax(np.where(is_visible, scores, -np.inf))
