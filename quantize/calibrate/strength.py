"""How strongly a matrix's X^T X shrinks towards its diagonal, and whether feedback helps at all: tried on inputs that
were kept out.

Few inputs say little of pairs of columns, and feedback that believes them makes the products of other text worse. So a
fifth of the text's chunks is kept out, some rows of the matrix are coded by what the others say, once for each
strength, once by the importance of the columns alone and once without either, and what loses least on the inputs kept
out is taken, then with all inputs.
"""

from dataclasses import dataclass

import numpy as np

from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.codecs.feedback import Coding, Curvature
from kimi_lite.quantize.codecs.importance import fill_unknown

STRENGTHS = (1.0, 4.0, 16.0)  # of the damping, the usual one first: it is taken where nothing was kept out
IMPORTANCE, ALIKE = float("inf"), -1.0  # no feedback: columns weighed by their inputs alone, or not even that
_HELD_OUT = 0.2  # of the chunks
_LEAST_HELD_OUT = 16  # inputs; fewer say nothing
NUM_TRIED_ROWS = 48  # of a matrix


@dataclass(slots=True)
class Gram:
    """X^T X, float64 sums of float32 products, over `num_inputs` rows."""

    products: np.ndarray  # (k, k)
    num_inputs: int = 0

    def add(self, values: np.ndarray) -> None:
        self.products += values.T @ values
        self.num_inputs += len(values)

    def coding(self, strength: float) -> Coding:
        """How rows are coded by these inputs. Raises KimiLiteError where they are infinite."""
        is_fed_back = strength not in (IMPORTANCE, ALIKE)
        curvature = Curvature.of(self.products, self.num_inputs, strength) if is_fed_back else None
        if curvature:
            return Coding(curvature=curvature)
        if strength == ALIKE or not self.num_inputs:
            return Coding(importance=np.ones(len(self.products), np.float32))
        return Coding(importance=fill_unknown((self.products.diagonal() / self.num_inputs).astype(np.float32)))


class Seen:
    """The inputs of a matrix, or of matrices that share them: those that it may be fitted to, and those kept out. What
    is made of them is kept for the next matrix."""

    def __init__(self, size: int) -> None:
        self.fitted, self.held_out = Gram(np.zeros((size, size))), Gram(np.zeros((size, size)))
        self._codings: dict[tuple[float, bool], Coding] = {}

    @property
    def num_inputs(self) -> int:
        return self.fitted.num_inputs + self.held_out.num_inputs

    def add(self, values: np.ndarray, is_held_out: bool) -> None:
        """values: float32 (rows, k)."""
        (self.held_out if is_held_out else self.fitted).add(values)

    def coding(self, strength: float, is_whole: bool = True) -> Coding:
        """By all inputs, or by those alone that may be fitted to."""
        key = (strength, is_whole)
        if key not in self._codings:
            self._codings[key] = (self._whole() if is_whole else self.fitted).coding(strength)
        return self._codings[key]

    def _whole(self) -> Gram:
        return Gram(self.fitted.products + self.held_out.products, self.num_inputs)


def held_out_chunks(num_chunks: int) -> list[bool]:
    """Which chunks are kept out: none of fewer than four."""
    num_held_out = max(1, round(_HELD_OUT * num_chunks)) if num_chunks >= 4 else 0
    chosen = np.random.default_rng(0).permutation(num_chunks)[:num_held_out]
    return [index in chosen for index in range(num_chunks)]


def choose_strength(layout: Layout, rows: np.ndarray, seen: Seen) -> float:
    """The strength for a matrix of which these are some rows, float32 (R, k): one of STRENGTHS, IMPORTANCE or ALIKE."""
    if seen.held_out.num_inputs < _LEAST_HELD_OUT or not seen.fitted.num_inputs:
        return STRENGTHS[0]
    held_out = seen.held_out.products.astype(np.float32)

    def loss(strength: float) -> float:
        error = dequantize(seen.coding(strength, is_whole=False).encode(layout, rows), layout.name) - rows
        return float(np.vdot(error @ held_out, error))

    return min((*STRENGTHS, IMPORTANCE, ALIKE), key=loss)
