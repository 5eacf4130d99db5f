"""Encodes float rows on the device: weights that take fewer bytes in VRAM than in the file.

Q8_0 has the bytes of ggml's reference quantizer. The K types search their scales as ggml's reference does
(ggml-quants.c, quantize_row_q6_K_ref and quantize_row_q4_K_ref): several candidate scales for each group, of each the
best least-squares fit to the codes that it gives, errors weighted by the weights themselves. Errors are within two per
cent of ggml's, bytes are not the same.
"""

import torch

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.layouts import BY_NAME

_Q8_0, _LARGEST_Q8_0 = BY_NAME["Q8_0"], 127 * 65504
_F16_MOST = 65504.0


def encode(values: torch.Tensor, target: str, name: str) -> torch.Tensor:
    """float32 (rows, k) -> uint8 (rows, row_bytes) of Q8_0, Q6_K, Q4_K, BF16 or F32; `name`: of the tensor, for the
    sentence. Raises KimiLiteError for a weight that the type cannot hold."""
    if target in ("BF16", "F32"):
        return values.to(torch.bfloat16 if target == "BF16" else torch.float32).contiguous().view(torch.uint8)
    return {"Q8_0": quantize_q8_0, "Q6_K": quantize_q6_k, "Q4_K": quantize_q4_k}[target](values, name)


def quantize_q8_0(values: torch.Tensor, name: str) -> torch.Tensor:
    """(rows, k) float32 -> uint8 (rows, k / 32 * 34), the bytes of llama.cpp's reference quantizer. Raises
    KimiLiteError."""
    blocks = values.reshape(-1, _Q8_0.block_size)  # (B, 32)
    scale = blocks.abs().amax(dim=1) / 127
    stored = _float16(scale, "Q8_0", name, _LARGEST_Q8_0)
    inverse = _inverse(scale)
    scaled = blocks * inverse[:, None]
    whole = scaled.trunc()
    codes = whole + (2 * (scaled - whole)).trunc()  # rounded half away from zero
    packed = torch.empty((len(blocks), _Q8_0.block_bytes), dtype=torch.uint8, device=values.device)
    packed[:, :2] = _bytes_of(stored)
    packed[:, 2:] = codes.to(torch.int8).view(torch.uint8)
    return packed.view(len(values), -1)


def quantize_q6_k(values: torch.Tensor, name: str) -> torch.Tensor:
    """(rows, k) float32, k in whole 256s -> uint8 (rows, k / 256 * 210): codes -32 .. 31, an int8 scale for every 16,
    one float16 for all. Raises KimiLiteError."""
    groups = values.reshape(-1, 16, 16)  # (B, groups, 16)
    scales = _symmetric_scales(groups, 32)  # (B, groups)
    largest = scales.gather(1, scales.abs().argmax(dim=1, keepdim=True))[:, 0]
    unit = _float16(largest / -128, "Q6_K", name, _F16_MOST * 128 * 32)
    steps = (scales * _inverse(unit.float())[:, None]).round().clamp(-128, 127)
    codes = _codes(groups, steps * unit.float()[:, None], 0, -32, 31) + 32
    halves = codes.to(torch.int32).view(-1, 2, 4, 32)  # (B, halves of 128, quarters, 32)
    low, high = halves & 15, halves >> 4
    ql = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], dim=2)  # (B, 2, 64)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6  # (B, 2, 32)
    parts = (ql.flatten(1), qh.flatten(1), steps.to(torch.int8).view(torch.uint8), _bytes_of(unit))
    return torch.cat([part.to(torch.uint8) for part in parts], dim=1).view(len(values), -1)


def quantize_q4_k(values: torch.Tensor, name: str) -> torch.Tensor:
    """(rows, k) float32, k in whole 256s -> uint8 (rows, k / 256 * 144): codes 0 .. 15, a scale and a minimum of six
    bits for every 32, two float16 for all. Raises KimiLiteError."""
    groups = values.reshape(-1, 8, 32)  # (B, groups, 32)
    scales, minima = _scales_and_minima(groups, 15)  # (B, groups), minima as what is taken off
    units = [_float16(each.amax(dim=1) / 63, "Q4_K", name, _F16_MOST * 63) for each in (scales, minima)]
    steps = [
        (each * _inverse(unit.float())[:, None]).round().clamp(0, 63)
        for each, unit in zip((scales, minima), units, strict=True)
    ]
    scale, minimum = (step * unit.float()[:, None] for step, unit in zip(steps, units, strict=True))
    codes = _codes(groups, scale, minimum, 0, 15).to(torch.int32).view(-1, 4, 2, 32)
    s, m = (step.to(torch.int32) for step in steps)  # (B, 8)
    packed = [
        s[:, :4] | (s[:, 4:] >> 4) << 6,
        m[:, :4] | (m[:, 4:] >> 4) << 6,
        (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
    ]
    parts = (*map(_bytes_of, units), *packed, (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1))
    return torch.cat([part.to(torch.uint8) for part in parts], dim=1).view(len(values), -1)


def _symmetric_scales(groups: torch.Tensor, most: int) -> torch.Tensor:
    """(..., n) -> (...): scales for codes -most .. most - 1, the largest weight near the end that has one code more."""
    weight = groups * groups
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best = score = torch.zeros_like(largest[..., 0])
    for step in range(-9, 10):
        codes = (groups * _inverse(largest / -(most + 0.1 * step))).round().clamp(-most, most - 1)
        product, square = (weight * groups * codes).sum(-1), (weight * codes * codes).sum(-1)
        fit = product * _inverse(square)
        is_better = product * fit > score
        best, score = torch.where(is_better, fit, best), torch.where(is_better, product * fit, score)
    return best


def _scales_and_minima(groups: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., n) -> (...) twice: codes 0 .. most times the scale, less the minimum, which is not negative."""
    weight = (groups * groups).mean(-1, keepdim=True).sqrt() + groups.abs()
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1)
    span = (high - low).clamp(min=0)
    total, first = weight.sum(-1), (weight * groups).sum(-1)
    best_scale, best_low = span / most, low
    codes = _codes(groups, best_scale, -best_low, 0, most)
    error = _squares(groups, weight, codes, best_scale, best_low)
    for step in range(21):
        codes = _codes(groups, span / (most - 1 + 0.1 * step), -low, 0, most)
        c1, c2, xc = ((weight * each).sum(-1) for each in (codes, codes * codes, groups * codes))
        inverse = _inverse(total * c2 - c1 * c1)
        scale, new_low = (total * xc - first * c1) * inverse, (c2 * first - c1 * xc) * inverse
        scale = torch.where(new_low > 0, xc * _inverse(c2), scale)
        new_low = new_low.clamp(max=0)
        new_error = _squares(groups, weight, codes, scale, new_low)
        is_better = (new_error < error) & (scale > 0)
        best_scale, best_low = torch.where(is_better, scale, best_scale), torch.where(is_better, new_low, best_low)
        error = torch.where(is_better, new_error, error)
    return best_scale, -best_low


def _squares(
    groups: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor
) -> torch.Tensor:
    """Weighted squares of the errors of each group."""
    return (weight * (scale[..., None] * codes + low[..., None] - groups).square()).sum(-1)


def _codes(groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | int, low: int, high: int) -> torch.Tensor:
    """The nearest codes, as floats."""
    added = minimum[..., None] if isinstance(minimum, torch.Tensor) else minimum
    return ((groups + added) * _inverse(scale)[..., None]).round().clamp(low, high)


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / values; 0 for a group of zeros."""
    inverse = 1 / values
    return torch.where(torch.isfinite(inverse), inverse, 0)


def _float16(values: torch.Tensor, type_name: str, name: str, most: float) -> torch.Tensor:
    """Raises KimiLiteError where a block's scale is more than float16 holds."""
    stored = values.to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        problem = f"Tensor {name} has a weight that {type_name} cannot hold: its largest is {most:,.0f}"
        raise KimiLiteError(f"{problem}.", "The file is damaged, or needs --dense bf16.")
    return stored


def _bytes_of(values: torch.Tensor) -> torch.Tensor:
    """float16 (B,) -> uint8 (B, 2)."""
    return values.contiguous()[:, None].view(torch.uint8)
