"""Random points; in IQ1_M the bits of d are the top nibbles of the four scale words."""

import numpy as np

from kimi_lite.native.types.random_blocks import Maker


def _set_nibbles(blocks: np.ndarray, d: np.ndarray) -> None:
    nibbles = (d.view(np.uint16)[..., None] >> np.array([0, 4, 8, 12], np.uint16)) & 15
    blocks["scales"] = (blocks["scales"] & 0x0FFF) | (nibbles << 12)


MAKERS = {
    "IQ1_S": Maker(),
    "IQ1_M": Maker(set_scale=_set_nibbles),
}
