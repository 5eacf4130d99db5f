"""Random blocks: any bytes are valid, and values and scales are about as often negative as positive."""

from kimi_lite.native.types.random_blocks import Maker
from kimi_lite.native.types.two_tables.layout import LAYOUTS

MAKERS = {layout.name: Maker() for layout in LAYOUTS}
