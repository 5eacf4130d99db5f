"""GGUF metadata of a converted model: what the model is, its architecture's keys, and how it is quantized.

llama.cpp refuses a key of another type than it expects, so the types are part of the format. The architecture's keys
are `ModelConfig.metadata`.
"""

from gguf import LlamaFileType

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.metadata import Value, text, u32
from kimi_lite.native.layouts import Layout

_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
_FLOAT_TYPES = ("F32", "F16", "BF16")
# what another file says about itself and not about the model: its layout, its types, how they were chosen
FILE_KEYS = ("general.alignment", "general.file_type", "general.quantization_version", "split.", "quantize.")


def model_metadata(config: ModelConfig, layout: Layout) -> dict[str, Value]:
    """The `general.*` keys and the architecture's own."""
    keys = {
        "general.architecture": text(config.architecture),
        "general.type": text("model"),
        "general.name": text(config.name),
    }
    return keys | quantization_metadata(layout) | config.metadata()


def quantization_metadata(layout: Layout) -> dict[str, Value]:
    """The keys that say how a file of mostly `layout` is quantized."""
    keys = {"general.file_type": u32(_file_type(layout))}
    if layout.name not in _FLOAT_TYPES:
        keys["general.quantization_version"] = u32(_QUANTIZATION_VERSION)
    return keys


def _file_type(layout: Layout) -> int:
    """llama.cpp's number for "mostly this type"; its K types have sizes in their names, of which S means one type
    throughout."""
    if layout.name == "F32":
        return LlamaFileType.ALL_F32
    names = (f"MOSTLY_{layout.name}", f"MOSTLY_{layout.name}_S")
    known = [LlamaFileType[name] for name in names if name in LlamaFileType.__members__]
    return known[0] if known else LlamaFileType.GUESSED
