"""Which families of types there are, and the parts of each, imported when they are asked for."""

from importlib import import_module
from types import ModuleType

FAMILIES = (
    "floats",
    "blocks_of_32",
    "few_bits",
    "sixteen_values",
    "k_quants",
    "ternary",
    "iq1",
    "iq2",
    "iq3",
    "trellis",
    "two_tables",
)
PARTS = ("layout", "reference", "cpu", "gpu", "gpu_exact", "blocks")


def parts(name: str) -> list[ModuleType]:
    """The module `name` (one of PARTS) of every family."""
    assert name in PARTS, name
    return [import_module(f"{__package__}.{family}.{name}") for family in FAMILIES]
