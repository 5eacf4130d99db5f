"""Rows that ik_llama.cpp interleaved, in order again (`native.types.interleaved`): what `kimi-lite quantize` reads."""

import numpy as np

from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.types.interleaved import Interleaved, sources


def rows_in_order(kind: Interleaved, units: np.ndarray, row_weights: int) -> np.ndarray:
    """uint8 (kind.num_rows * n, row_bytes), whole units as a file has them -> the rows, of the same shape."""
    size, count, base = kind.num_rows, len(units) // kind.num_rows, kind.base
    assert units.shape == (count * size, base.row_bytes(row_weights)), (kind.name, units.shape, row_weights)
    units = np.ascontiguousarray(units).reshape(count, -1)
    rows = np.empty((count, size, base.row_bytes(row_weights)), np.uint8)
    border, header_bytes = size * base.header_bytes, base.header_bytes
    rows[:, :, :header_bytes] = units[:, :border].reshape(count, size, header_bytes)
    _bring_back(units, border, *sources(kind), rows, header_bytes, base.block_bytes)
    return rows.reshape(count * size, -1)


@function("void(u1[:,::1], i8, i4[:,::1], i4[:,::1], u1[:,:,::1], i8, i8)")
def _bring_back(units, border, first, second, rows, header_bytes, block_bytes):
    """Every bit of the blocks of `rows` (units, size, row_bytes) from its place in `units` (units, bytes); exclusive or
    with that of a second place where there is one."""
    size = rows.shape[1]
    for unit in range(len(units)):
        for block in range((rows.shape[2] - header_bytes) // block_bytes):
            start = border + block * size * block_bytes
            for row in range(size):
                for byte in range(block_bytes):
                    found = 0
                    for bit in range(8):
                        place = first[row, 8 * byte + bit]
                        value = units[unit, start + (place >> 3)] >> (place & 7)
                        other = second[row, 8 * byte + bit]
                        if other >= 0:
                            value ^= units[unit, start + (other >> 3)] >> (other & 7)
                        found |= (value & 1) << bit
                    rows[unit, row, header_bytes + block * block_bytes + byte] = found
