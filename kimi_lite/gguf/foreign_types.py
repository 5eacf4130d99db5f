"""Tensor types of other programs that are not read here: named where a file has them, with what to get instead.

Numbers: the `gguf` package for llama.cpp's own; ik_llama.cpp's header of ggml; the forks' headers, as of November 2026.
Two numbers mean different types in different forks.
"""

from typing import NamedTuple

from kimi_lite.native.layouts import LAYOUTS
from kimi_lite.native.types.interleaved import interleaved


class ForeignType(NamedTuple):
    """`origin`: which program has it, empty for llama.cpp; `instead`: what to download or do."""

    name: str
    origin: str
    instead: str


_IK = "a type of ik_llama.cpp"
_UNSLOTH = "a type of Unsloth's fork of llama.cpp"
_PRISM = "a type of PrismML's fork of llama.cpp, in blocks of 128 weights"
_LARGER = (
    "Get a quant that llama.cpp itself reads: UD-TQ1_0 or IQ1_S are the next larger; kimi-lite pull OWNER/REPO lists "
    "them with their sizes."
)
_MAINLINE = (
    "Get a quant that llama.cpp itself reads (IQ1_M, UD-TQ1_0, IQ2_XXS, Q2_K, Q4_0): kimi-lite pull OWNER/REPO lists "
    "them; or make one of the checkpoint: kimi-lite quantize FOLDER OUT.gguf"
)
_Q2_0 = (
    "Get the file in llama.cpp's own Q2_0 (type 42, blocks of 64), or make it of the checkpoint: "
    "kimi-lite quantize FOLDER OUT.gguf --recipe q2_0"
)
_IN_ORDER = "Write its rows in order, which loses nothing: kimi-lite quantize FILE.gguf OUT.gguf"
_FORKS = {
    64: ForeignType("IQ1_XS", _UNSLOTH, _LARGER),
    65: ForeignType("IQ1_XXS", _UNSLOTH, _LARGER),
    66: ForeignType("IQ1_XXXS", _UNSLOTH, _LARGER),
    142: ForeignType("PQ2_0 or IQ2_TN", f"{_PRISM}, or a retired one of ik_llama.cpp", _Q2_0),
    143: ForeignType("PTQ1_0 or IQ1_TN", f"{_PRISM}, or a retired one of ik_llama.cpp", _Q2_0),
}
_IK_NAMES = {
    **dict(zip((36, 133, 134, 135, 151, 335), ("I2_S", "Q6_0", "IQ1_BN", "IQ2_BN", "Q8_KV", "IQ2_BN_R4"), strict=True)),
}
_IK_RANGE = range(97, 411)
_INTERLEAVED = 200  # what ik adds to the number of a type whose rows are interleaved


def foreign_type(ggml_id: int) -> ForeignType | None:
    """None for a number that no program is known to use."""
    if ggml_id in _FORKS:
        return _FORKS[ggml_id]
    if ggml_id in _IK_NAMES:
        return ForeignType(_IK_NAMES[ggml_id], _IK, _MAINLINE)
    if ggml_id in interleaved():
        kind = interleaved()[ggml_id]
        return ForeignType(kind.name, f"{_IK} with rows interleaved by {kind.num_rows}", _IN_ORDER)
    if ggml_id in _IK_RANGE:
        base = _IK_NAMES.get(ggml_id - _INTERLEAVED) or _own_name(ggml_id - _INTERLEAVED)
        name = f"{base} with interleaved rows" if base and ggml_id > _INTERLEAVED else "without a name here"
        return ForeignType(name, _IK, _MAINLINE)
    name = _own_name(ggml_id)
    return ForeignType(name, "", _MAINLINE) if name else None


def _own_name(ggml_id: int) -> str:
    if ggml_id in LAYOUTS:
        return LAYOUTS[ggml_id].name
    from gguf.constants import GGMLQuantizationType  # only needed to name a type in an error

    return next((kind.name for kind in GGMLQuantizationType if kind == ggml_id), "")
