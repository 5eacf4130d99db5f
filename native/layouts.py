"""Every GGUF type by its number and by its name; `native.types` has a folder for each family."""

from kimi_lite.native.types.families import parts
from kimi_lite.native.types.layout import QK_K, Layout

__all__ = ["BY_NAME", "LAYOUTS", "QK_K", "Layout"]

BY_NAME: dict[str, Layout] = {layout.name: layout for part in parts("layout") for layout in part.LAYOUTS}
LAYOUTS: dict[int, Layout] = {layout.ggml_id: layout for layout in BY_NAME.values()}
