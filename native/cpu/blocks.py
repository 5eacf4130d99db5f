"""The three things a GGUF type must be able to do on the CPU, one more that makes prompts faster, and who does them.

`native/types/*/cpu.py` implement them, a short section a type; `dot.py` and `panel.py` build the kernels from them. The
functions are chosen while a kernel compiles, by the literal type name it is compiled for.

Products, by the activations that are multiplied (`Layout.product`):
- "float": F32, F16, BF16 rows times float32 activations. `load16(name, address)` gives 16 weights.
- "block32": blocks of 32, 64 or 128 weights times int8 activations with a scale per 32.
- "block256": super-blocks of 256 times int8 activations with a scale per 256 (ggml's Q8_K).
"""

from collections.abc import Callable
from typing import NamedTuple

from numba import types
from numba.extending import overload

from kimi_lite.native.cpu.compiler import IN_ORDER
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.simd import load_f16, load_f32
from kimi_lite.native.types.families import parts
from kimi_lite.native.types.layout import F16


def activation_kind(name: str) -> int:
    """The int8 form of the activations that a type multiplies: 32, 256, or 0 for float32."""
    return {"float": 0, "block32": 32, "block256": 256}[BY_NAME[name].product]


_IMPLEMENTATIONS: dict[tuple[str, str], Callable] = {}


def implements(function: Callable, *names: str) -> Callable:
    """Registers the decorated function as `function` for the types `names`."""

    def register(implementation: Callable) -> Callable:
        for name in names:
            _IMPLEMENTATIONS[function.__name__, name] = implementation
        return implementation

    return register


def is_implemented(name: str) -> bool:
    """Whether the CPU's kernels know the type."""
    product = {"float": (), "block32": ("dot8x32", "unpack"), "block256": ("dot256", "unpack")}[BY_NAME[name].product]
    parts("cpu")
    return all((function, name) in _IMPLEMENTATIONS for function in product or ("load16",))


def chosen_by_name(function: Callable) -> Callable:
    """Makes `function(name, ...)` callable from kernels: it becomes what a type registered for the literal `name`."""

    @overload(function, strict=False, jit_options={"fastmath": IN_ORDER, "forceinline": True})
    def choose(name, *args):
        if not isinstance(name, types.StringLiteral):
            return None
        parts("cpu")  # they register themselves when they are imported
        return _IMPLEMENTATIONS[function.__name__, name.literal_value]

    return function


def row_scale(name, row):
    """The float32 that multiplies all weights of the row at this address; 1 where the type has none."""


@overload(row_scale, strict=False)
def _choose_row_scale(name, row):
    if not isinstance(name, types.StringLiteral):
        return None
    kind = BY_NAME[name.literal_value].row_scale
    if not kind:
        return lambda name, row: types.float32(1)
    return (lambda name, row: load_f16(row)) if kind == F16 else (lambda name, row: load_f32(row))


@chosen_by_name
def load16(name, address):
    """float: the 16 weights at `address` as f32x16."""


@chosen_by_name
def dot8x32(name, blocks, x, x_scales, sums16, sums32):
    """block32: 256 weights, in consecutive blocks, times 256 int8.

    x: address of the int8; x_scales, sums32: addresses of 8 float32, the scales and sums of each 32 of them; sums16: of
    16 float32. Returns f32x16 whose lanes add up to the result.
    """


@chosen_by_name
def dot256(name, block, x, sums16, sums32, minus16):
    """block256: one super-block times 256 int8, without the activation's scale.

    x: address of the int8; sums16, sums32: addresses of the float32 sums of each 16 and 32 of them; minus16: of
    minus the sums of 16 as int16. Returns f32x16 whose lanes add up to the result.
    """


@chosen_by_name
def unpack(name, block, codes, scales, minima):
    """Writes one block in the common form, weight = code * scale - minimum.

    codes: address for the int8 codes in natural order, 0..127, or -128..127 for a signed type; scales, minima:
    addresses for one float32 a group.
    """


class Digits(NamedTuple):
    """How `digits` writes a block256 type: weight = d * (low + (high << shift)) - dmin * minimum of its 16.

    `shift`: 0 where `low` says all; then it is signed if `is_signed`. Else `low` is unsigned, and `high` signed if
    `is_signed`. `minima`: "none", "nibbles" (at most 15) or "bytes".
    """

    shift: int
    is_signed: bool
    minima: str = "none"


_DIGITS: dict[str, Digits] = {}


def has_digits(*names: str, shift: int, is_signed: bool, minima: str = "none") -> Callable:
    """Registers the decorated function as `digits` for the types `names`."""
    for name in names:
        _DIGITS[name] = Digits(shift, is_signed, minima)
    return implements(digits, *names)


def digits_of(name: str) -> Digits | None:
    """Of a type; None if it has no such form."""
    parts("cpu")
    return _DIGITS.get(name)


@chosen_by_name
def digits(name, block, low, high, minima, factors):
    """Writes one super-block as whole numbers and one factor, for matrix tiles.

    low, high: addresses for 256 bytes each in natural order; factors: for d, and 64 bytes behind it dmin, both float32;
    minima: for 64 bytes, the minima of 16 weights each and zeros, nibbles behind 16 times themselves. What the type's
    `Digits` says it has not is left alone.
    """
