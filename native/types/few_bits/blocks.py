"""Random blocks of one- and two-bit codes."""

from kimi_lite.native.types.random_blocks import Maker

MAKERS = {
    "Q1_0": Maker(),
    "Q2_0": Maker(is_lopsided=True),
    "LITE2_128": Maker(is_lopsided=True),
}
