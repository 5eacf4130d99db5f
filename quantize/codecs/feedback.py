"""Codes chosen for the layer's output and not for its weights: error feedback and descent, where inputs X of a matrix
are known.

The squared error of a row's products is r H r with r the error of its weights and H = X^T X. Two steps for each row:
- Feedback (GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304): columns are coded in order, and what coding one loses is
  made good by those after it, by the Cholesky factor of H's inverse. A block's scale is the best of five after a trial
  of its codes.
- Descent (as QuantEase, arXiv 2309.01885): each code is set again to the best one given all others, each scale to its
  optimum, for two rounds; every step lowers r H r.

Types that ggml encodes (K, IQ) have blocks whose scales and codes only its encoder chooses: they get feedback from
block to block. A block is encoded with what its columns' errors cost, and the columns after it take over what it
loses; then every row's blocks are encoded once more, each given all others, where that lowers r H r.

What few inputs say of pairs of columns is noise, so X^T X is damped: it shrinks towards its diagonal, the more the
fewer rows X has (after Ledoit and Wolf 2004). How strongly is tried on inputs that were kept out
(`quantize.calibrate.strength`). The bytes are of the same format.
"""

from dataclasses import dataclass

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.native.cpu.activations import aligned_zeros
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import BY_NAME, Layout
from kimi_lite.quantize.codecs import encode
from kimi_lite.quantize.codecs.fit import fit_scales
from kimi_lite.quantize.codecs.lanes import LANES, descend, feed
from kimi_lite.quantize.codecs.ternary import pack_tq1_0
from kimi_lite.quantize.codecs.two_bits import pack_q2_0, pack_tq2_0

_LARGEST_CODE = {"TQ1_0": 1, "TQ2_0": 2, "Q2_0": 2}  # codes run from -1
_PACK = {"TQ1_0": pack_tq1_0, "TQ2_0": pack_tq2_0, "Q2_0": pack_q2_0}
_BY_BLOCKS = frozenset(name for name, layout in BY_NAME.items() if layout.encoder == "ggml")
CODE_TYPES = frozenset(_LARGEST_CODE)  # with scales and codes that are chosen here
FEEDBACK_TYPES = CODE_TYPES | _BY_BLOCKS
_LEAST_COLUMNS = 64  # coded at once by ggml, whose smallest blocks have 32
_TRIED_SCALES = (1.0, 0.85, 0.92, 1.08, 1.16)  # times the best without feedback, which comes first
_NUM_ROUNDS = 2
_DAMPING, _DAMPING_BY_RANK = (
    0.1,
    0.5,
)  # of the diagonal; the second times columns / inputs: few inputs say little of pairs
_FLOOR = 0.01  # of the mean of the diagonal: columns without inputs


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """H of a matrix's inputs, damped, and the upper Cholesky factor of its inverse; float32 (k, k) both."""

    hessian: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, gram: np.ndarray, num_inputs: int, strength: float = 1.0) -> "Curvature | None":
        """From X^T X (k, k) of `num_inputs` rows; None where there is nothing to learn from. `strength`: times the
        usual damping."""
        mean = float(np.trace(gram)) / len(gram)
        if not num_inputs or mean <= 0:
            return None
        if not np.isfinite(mean):
            raise KimiLiteError(
                "The calibration text makes this layer's inputs infinite.", "Is the source model sound?"
            )
        hessian = gram.astype(np.float64) / mean
        diagonal = np.diag(hessian).copy()
        damping = strength * (_DAMPING + _DAMPING_BY_RANK * len(gram) / num_inputs)
        hessian[np.diag_indices_from(hessian)] += damping * diagonal + _FLOOR
        factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
        return cls(hessian.astype(np.float32), np.ascontiguousarray(factor, np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class Coding:
    """How the rows of a matrix are coded: with feedback where a curvature is known, else with errors weighed by the
    importance (k,) of their columns, else with all columns alike."""

    curvature: Curvature | None = None
    importance: np.ndarray | None = None

    def encode(self, layout: Layout, rows: np.ndarray) -> np.ndarray:
        """Float32 rows (R, k) to uint8 (R, row_bytes). Raises KimiLiteError as the codec does."""
        if self.curvature:
            return encode_with_feedback(layout, rows, self.curvature)
        return encode(layout, rows, self.importance)


def encode_with_feedback(layout: Layout, rows: np.ndarray, curvature: Curvature) -> np.ndarray:
    """Float32 rows (R, k) to uint8 (R, row_bytes). Raises KimiLiteError as the codec itself does."""
    if layout.name in _BY_BLOCKS:
        return _encode_by_blocks(layout, rows, curvature)
    num_rows, k = rows.shape
    assert k == len(curvature.hessian), (rows.shape, curvature.hessian.shape)
    columns = np.zeros((k, -(-num_rows // LANES) * LANES), np.float32)  # a row a lane
    columns[:, :num_rows] = rows.T
    codes, scales = _feed_errors(layout, columns, curvature.factor)
    for _ in range(_NUM_ROUNDS):
        _descend(layout, columns, codes, scales, curvature.hessian)
    if np.abs(scales).max(initial=0) >= 65520:
        raise KimiLiteError(f"A scale does not fit {layout.name}, whose largest is 65504.", "Choose BF16 or F32.")
    blocks = np.ascontiguousarray((codes[:, :num_rows].T + 1).astype(np.uint8)).reshape(-1, layout.block_size)
    return _PACK[layout.name](blocks, np.ascontiguousarray(scales[:, :num_rows].T).reshape(-1), num_rows)


def _encode_by_blocks(layout: Layout, rows: np.ndarray, curvature: Curvature) -> np.ndarray:
    hessian, factor = curvature.hessian, curvature.factor
    assert rows.shape[1] == len(hessian), (rows.shape, hessian.shape)
    size = max(layout.block_size, _LEAST_COLUMNS)
    starts = range(0, len(hessian), size)
    left, decoded = rows.astype(np.float32), np.empty_like(rows)
    encoded = np.empty((len(rows), layout.row_bytes(rows.shape[1])), np.uint8)
    for start in starts:
        block = slice(start, min(start + size, len(hessian)))
        part = factor[block, block]
        cost = np.linalg.inv(part.T @ part).diagonal()  # of an error, when all later columns make up for it
        codes = encode(layout, left[:, block], cost.astype(np.float32))
        encoded[:, layout.row_bytes(block.start) : layout.row_bytes(block.stop)] = codes
        decoded[:, block] = dequantize(codes, layout.name)
        if block.stop < len(hessian):
            lost = np.linalg.solve(part.T, (left[:, block] - decoded[:, block]).T).T
            left[:, block.stop :] -= lost @ factor[block, block.stop :]
    gradient = (decoded - rows) @ hessian  # (R, k), half of it
    for start in starts:
        block = slice(start, min(start + size, len(hessian)))
        part, before = hessian[block, block], decoded[:, block]
        best = before - np.linalg.solve(part, gradient[:, block].T).T  # of no codes: what the other blocks ask for
        codes = encode(layout, best, np.ascontiguousarray(part.diagonal()))
        step = dequantize(codes, layout.name) - before
        change = (step * (2 * gradient[:, block] + step @ part)).sum(axis=1)  # of r H r
        step[change >= 0] = 0
        encoded[change < 0, layout.row_bytes(block.start) : layout.row_bytes(block.stop)] = codes[change < 0]
        decoded[:, block] += step
        gradient += step @ hessian[block]
    return encoded


def _feed_errors(layout: Layout, columns: np.ndarray, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as float32 (k, R) and scales (blocks, R): block after block, the columns after it corrected."""
    left, size = columns.copy(), layout.block_size
    codes, scales = np.empty_like(left), np.empty((len(left) // size, left.shape[1]), np.float32)
    for start in range(0, len(left), size):
        stop = start + size
        part = factor[start:stop, start:stop]
        weights = 1 / np.square(np.diag(part))  # what an error costs after feedback
        block = np.ascontiguousarray(left[start:stop].T)
        first = fit_scales(block, (weights / weights.mean()).astype(np.float32)[None], _LARGEST_CODE[layout.name])
        codes[start:stop], scales[start // size], lost = _try_scales(layout, left[start:stop], part, first)
        if stop < len(left):
            left[stop:] -= factor[start:stop, stop:].T @ lost
    return codes, scales


def _try_scales(
    layout: Layout, block: np.ndarray, factor: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row of the block (size, R) the scale near `first` (R,) whose codes leave the least error: codes, scales,
    and the errors over the factor's diagonal."""
    size, num_rows = block.shape
    coefficients = np.ascontiguousarray(-factor.T)
    inverse_diagonal = np.ascontiguousarray(1 / np.diag(factor))
    best, least = np.zeros(num_rows, np.float32), np.full(num_rows, np.inf, np.float32)
    codes, lost, tried_codes, tried_lost = np.zeros((4, size, num_rows), np.float32)
    carry = aligned_zeros((size, LANES), np.float32)
    for ratio in _TRIED_SCALES:
        scales = (first * np.float32(ratio)).astype("<f2").astype(np.float32)
        inverses = _invert(scales)
        arrays = (block, coefficients, inverse_diagonal, scales, inverses, tried_codes, tried_lost, carry)
        feed(*(array.ctypes.data for array in arrays), size, num_rows, _LARGEST_CODE[layout.name])
        totals = np.einsum("ij,ij->j", tried_lost, tried_lost)
        better = totals < least
        best[better], least[better] = scales[better], totals[better]
        codes[:, better], lost[:, better] = tried_codes[:, better], tried_lost[:, better]
    return codes, best, lost


def _descend(layout: Layout, columns: np.ndarray, codes: np.ndarray, scales: np.ndarray, hessian: np.ndarray) -> None:
    """One round over all blocks, in place: each block's scale set to its optimum, then its codes one after another."""
    size = layout.block_size
    gradient = hessian @ (codes * np.repeat(scales, size, axis=0) - columns)  # (k, R), half of it
    carry = aligned_zeros((size, LANES), np.float32)
    for start in range(0, len(columns), size):
        stop, row = start + size, start // size
        block, part, before = codes[start:stop], hessian[start:stop, start:stop], scales[row].copy()
        old = block * before
        products = part @ block
        slope, curve = (np.einsum("ij,ij->j", block, each) for each in (gradient[start:stop], products))
        after = before - np.divide(slope, curve, out=np.zeros_like(slope), where=curve > 0)
        after = np.where(after * before > 0, after, before).astype("<f2").astype(np.float32)
        slopes = gradient[start:stop] + products * (after - before)
        part = np.ascontiguousarray(part)
        inverse_diagonal = np.ascontiguousarray(1 / np.diag(part))
        arrays = (slopes, part, inverse_diagonal, after, _invert(after), block, carry)
        descend(*(array.ctypes.data for array in arrays), *block.shape, _LARGEST_CODE[layout.name])
        scales[row] = after
        if stop < len(columns):
            gradient[stop:] += hessian[stop:, start:stop] @ (block * after - old)


def _invert(scales: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for a block of zeros."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
