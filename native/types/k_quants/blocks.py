"""Random super-blocks with minima that belong to their scales."""

import numpy as np

from kimi_lite.native.types.random_blocks import Maker


def _equal_nibbles(blocks: np.ndarray, rng: np.random.Generator) -> None:
    blocks["scales"] = (blocks["scales"] & 15) * 17


def _equal_six_bits(blocks: np.ndarray, rng: np.random.Generator) -> None:
    scales = blocks["scales"]  # eight scales and eight minima
    scales[:, 4:8] = scales[:, :4]
    scales[:, 8:] = (scales[:, 8:] & 15) * 17


MAKERS = {
    "Q2_K": Maker(_equal_nibbles, minimum=("dmin", 1.5)),
    "Q3_K": Maker(),
    "Q4_K": Maker(_equal_six_bits, minimum=("dmin", 7.5)),
    "Q5_K": Maker(_equal_six_bits, minimum=("dmin", 15.5)),
    "Q6_K": Maker(),
}
