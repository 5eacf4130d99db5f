"""Which type each tensor gets. One rule for now: the chosen type wherever it fits, float32 where precision is nearly free.

The F32 list is llama.cpp's own (its converter and its quantizer never touch these), so files made here and there agree.
"""

from typing import NamedTuple

from native.layouts import BY_NAME, Layout

_FALLBACKS = ("Q8_0", "F16")  # tried in turn where a row is not a whole number of blocks


class Choice(NamedTuple):
    layout: Layout
    reason: str = ""  # why it is not the type asked for; empty where it is, or where F32 is the rule


def choose(name: str, shape: tuple[int, ...], wanted: Layout) -> Choice:
    """The type of tensor `name` (GGUF name) with `shape` (last axis is the row) when the user asks for `wanted`."""
    is_norm_or_router = name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    if len(shape) < 2 or is_norm_or_router or not name.endswith(".weight"):
        return Choice(BY_NAME["F32"])
    row = shape[-1]
    if row % wanted.block_size == 0:
        return Choice(wanted)
    for fallback in map(BY_NAME.__getitem__, _FALLBACKS):
        if row % fallback.block_size == 0:
            reason = (
                f"{name}: rows of {row} are not whole blocks of {wanted.block_size}, so {fallback.name} and not {wanted.name}"
            )
            return Choice(fallback, reason)
    raise AssertionError((name, shape, wanted.name))
