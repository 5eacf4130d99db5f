"""Random points and signs."""

from kimi_lite.native.types.random_blocks import Maker

MAKERS = {
    "IQ3_XXS": Maker(),
    "IQ3_S": Maker(),
}
