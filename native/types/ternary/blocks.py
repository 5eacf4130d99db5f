"""Random ternary digits: not every byte is five of them."""

from itertools import product

import numpy as np

from kimi_lite.native.types.random_blocks import Maker


def _digits_of_three(blocks: np.ndarray, rng: np.random.Generator) -> None:
    """Five digits a byte, then four: the byte is the smallest above 256/243 of the number."""
    blocks["qs"] = -(-rng.integers(0, 243, (len(blocks), 48)) * 256 // 243)
    blocks["qh"] = -(-rng.integers(0, 81, (len(blocks), 4)) * 3 * 256 // 243)


def _three_codes(blocks: np.ndarray, rng: np.random.Generator) -> None:
    """The code 3 is never written."""
    found = np.array([a | b << 2 | c << 4 | d << 6 for a, b, c, d in product(range(3), repeat=4)], np.uint8)
    blocks["qs"] = found[rng.integers(0, 81, (len(blocks), 64))]


MAKERS = {
    "TQ1_0": Maker(_digits_of_three),
    "TQ2_0": Maker(_three_codes),
}
