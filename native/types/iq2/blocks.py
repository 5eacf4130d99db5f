"""Random points and signs."""

from kimi_lite.native.types.random_blocks import Maker

MAKERS = {
    "IQ2_XXS": Maker(),
    "IQ2_XS": Maker(),
    "IQ2_S": Maker(),
}
