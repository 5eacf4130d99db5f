"""What the reference decoders of several families share. B: blocks."""

from collections.abc import Callable

import numpy as np


def column(field: np.ndarray) -> np.ndarray:
    """(B,) or (B, G) -> float32 (B, 1) or (B, G, 1), to multiply groups of weights with."""
    return field.astype(np.float32)[..., None]


def bits(field: np.ndarray, shifts: list[int], mask: int) -> np.ndarray:
    """(B, n) bytes -> (B, len(shifts), n) codes."""
    return (field[:, None, :] >> np.array(shifts, field.dtype)[None, :, None]) & mask


def nibbles(qs: np.ndarray) -> np.ndarray:
    """(B, n) bytes -> (B, 2n) codes: the low nibbles, then the high ones."""
    return bits(qs, [0, 4], 15).reshape(len(qs), -1)


def two_bits(qs: np.ndarray) -> np.ndarray:
    """(B, 64) bytes -> (B, 256) codes: per 32 bytes, four times 32 codes."""
    return bits(qs.reshape(-1, 32), [0, 2, 4, 6], 3).reshape(len(qs), 256)


def grouped(codes: np.ndarray, group: int) -> np.ndarray:
    return codes.reshape(len(codes), -1, group).astype(np.float32)


def flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def signs_of(masks: np.ndarray) -> np.ndarray:
    """(B, n) sign bytes -> (B, 8 n) of +1 and -1."""
    return 1 - 2 * np.unpackbits(masks.astype(np.uint8), axis=1, bitorder="little").astype(np.float32)


def even_signs(seven: np.ndarray) -> np.ndarray:
    """(B, n) of 7 bits -> (B, 8 n) of +1 and -1; the eighth bit makes the number of minus signs even."""
    ones = np.unpackbits(seven.astype(np.uint8)[..., None], axis=2, bitorder="little")  # (B, n, 8)
    parity = ones.sum(axis=2, dtype=np.uint8) & 1
    return signs_of(seven | (parity << 7))


def signed(values: np.ndarray, signs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(B, 256) book values times signs times a scale per group (B, G)."""
    turned = flat(values) * signs
    return flat(grouped(turned, 256 // scale.shape[1]) * scale[..., None])


def in_words(words: np.ndarray, scale_of: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """uint32 (B, 8) of four 7-bit signs and a 4-bit scale -> signs (B, 256), factors (B, 8)."""
    seven = (words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & 127
    return even_signs(flat(seven)), scale_of((words >> 28).astype(np.float32))
