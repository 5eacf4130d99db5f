"""One section per GGUF type: how a block is multiplied and how it is unpacked. See `native.cpu.blocks`."""

from kimi_lite.native.cpu.types import (
    blocks_of_32,
    few_bits,
    floats,
    iq1,
    iq2,
    iq3,
    k_quants,
    k_quants_low,
    tables,
    ternary,
)

__all__ = ["blocks_of_32", "few_bits", "floats", "iq1", "iq2", "iq3", "k_quants", "k_quants_low", "tables", "ternary"]
