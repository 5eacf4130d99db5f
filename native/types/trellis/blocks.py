"""Any bytes are valid; the scale is their row's."""

from kimi_lite.native.types.random_blocks import Maker

MAKERS = {
    "IQ1_KT": Maker(),
    "IQ2_KT": Maker(),
    "IQ3_KT": Maker(),
    "IQ4_KT": Maker(),
}
