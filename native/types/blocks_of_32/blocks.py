"""Random blocks of 32."""

from kimi_lite.native.types.random_blocks import Maker

MAKERS = {
    "Q8_0": Maker(),
    "Q4_0": Maker(is_lopsided=True),
    "Q4_1": Maker(minimum=("m", -7.5)),
    "Q5_0": Maker(is_lopsided=True),
    "Q5_1": Maker(minimum=("m", -15.5)),
}
