"""The three things a GGUF type must be able to do, and the registry of the types that can.

`native/cpu/types/*.py` implement them, a short section a type; `dot.py` and `panel.py` build the kernels from them. The
functions are chosen while a kernel compiles, by the literal type name it is compiled for.

Families, by the activations they multiply:
- "float": F32, F16, BF16 rows times float32 activations. `load16(name, address)` gives 16 weights.
- "block32": blocks of 32 weights times int8 activations with a scale per 32.
- "block256": super-blocks of 256 times int8 activations with a scale per 256 (ggml's Q8_K).
"""

from collections.abc import Callable
from typing import NamedTuple

from numba import types
from numba.extending import overload


class Format(NamedTuple):
    """How kernels treat a type: its family; `group`, the weights that share a scale (1 for floats); signed codes or not."""

    family: str
    group: int
    is_signed: bool = False


FORMATS: dict[str, Format] = {
    "F32": Format("float", 1),
    "F16": Format("float", 1),
    "BF16": Format("float", 1),
    "Q8_0": Format("block32", 32, is_signed=True),
    "Q4_0": Format("block32", 32),
    "Q4_K": Format("block256", 32),
    "Q6_K": Format("block256", 16),
    "TQ1_0": Format("block256", 32),
    "TQ2_0": Format("block256", 32),
}


def activation_kind(name: str) -> int:
    """The int8 form of the activations that a type multiplies: 32, 256, or 0 for float32."""
    return {"float": 0, "block32": 32, "block256": 256}[FORMATS[name].family]


_IMPLEMENTATIONS: dict[tuple[str, str], Callable] = {}


def implements(function: Callable, *names: str) -> Callable:
    """Registers the decorated function as `function` for the types `names`."""

    def register(implementation: Callable) -> Callable:
        for name in names:
            _IMPLEMENTATIONS[function.__name__, name] = implementation
        return implementation

    return register


def _chosen_by_name(function: Callable) -> Callable:
    @overload(function, strict=False, jit_options={"fastmath": {"nsz", "contract"}})
    def choose(name, *args):
        if not isinstance(name, types.StringLiteral):
            return None
        return _IMPLEMENTATIONS[function.__name__, name.literal_value]

    return function


@_chosen_by_name
def load16(name, address):
    """float: the 16 weights at `address` as f32x16."""


@_chosen_by_name
def dot32(name, block, x, x_scale, x_sum, acc, correction):
    """block32: one block times 32 int8.

    x: address of the int8; x_scale: their float32 scale; x_sum: float32 sum of the int8; acc: f32x8 whose lanes add up
    to the result; correction: float32 to add to that. Returns the new (acc, correction).
    """


@_chosen_by_name
def dot256(name, block, x, sums16, sums32):
    """block256: one super-block times 256 int8, without the activation's scale.

    x: address of the int8; sums16, sums32: addresses of the float32 sums of each 16 and 32 of them. Returns f32x16 whose
    lanes add up to the result. Called for several rows in a row, so that the compiler keeps x in registers.
    """


@_chosen_by_name
def unpack(name, block, codes, scales, minima):
    """Writes one block in the common form, weight = code * scale - minimum.

    codes: address for the int8 codes in natural order, 0..127, or -128..127 for a signed type; scales, minima: addresses
    for one float32 a group.
    """
