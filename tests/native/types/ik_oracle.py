"""ik_llama.cpp's own decoders, and what they made of some rows: recorded, as its library is on few machines.

    python -m tests.native.types.ik_oracle LIBGGML.so [TYPE ...]

records rows of the types (all that only ik_llama.cpp knows, without one) in `recorded/`, and a unit of each interleaved
one. The library comes with PyPI's
ik-llama-cpp-python (`ik_llama_cpp/lib/libggml.so`); install that into a virtual environment of its own.
"""

import ctypes
import importlib.util
import sys
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.types.interleaved import Interleaved, interleaved, sources
from kimi_lite.native.types.random_blocks import hostile_rows

RECORDED = Path(__file__).parent / "recorded"
_RECORDED_WEIGHTS = 512  # a row: two super-blocks

IK_TYPES = tuple(name for name, layout in BY_NAME.items() if layout.is_ik)


class Record(NamedTuple):
    """Rows uint8 (N, row_bytes) and what ik_llama.cpp decodes of them, float32 (N, K)."""

    rows: np.ndarray
    weights: np.ndarray


def recorded(name: str) -> Record:
    with np.load(RECORDED / f"{name}.npz") as file:
        return Record(file["rows"], file["weights"])


class _Traits(ctypes.Structure):
    """ik_llama.cpp's ggml.h, `ggml_type_traits_t`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("from_float", "from_float_ref", "from_float_to_mat", "vec_dot")),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
        ("ncols", ctypes.c_int64),
        ("gemv", ctypes.c_void_p),
        ("gemm", ctypes.c_void_p),
        ("row_meta_size", ctypes.c_int64),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def installed_library() -> Path | None:
    """Of this environment's ik-llama-cpp-python."""
    package = importlib.util.find_spec("ik_llama_cpp")
    places = package.submodule_search_locations if package else []
    return next((path for place in places for path in Path(place, "lib").glob("libggml.so")), None)


class Oracle:
    """ik_llama.cpp's ggml library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.ggml_init.argtypes, self._library.ggml_init.restype = [_InitParams], ctypes.c_void_p
        self._library.ggml_free.argtypes = [ctypes.c_void_p]
        self._library.ggml_free(self._library.ggml_init(_InitParams(1 << 20, None, False)))  # fills its tables
        self._traits = self._library.ggml_internal_get_type_traits
        self._traits.argtypes, self._traits.restype = [ctypes.c_int], _Traits

    def sizes(self, name: str) -> tuple[int, int, int]:
        """Weights and bytes of a block, bytes in front of a row."""
        traits = self._traits(BY_NAME[name].ggml_id)
        assert traits.type_name.decode().upper() == name, (traits.type_name, name)
        return traits.block_size, traits.type_bytes, traits.row_meta_size

    def decode(self, name: str, rows: np.ndarray) -> np.ndarray:
        """uint8 (N, row_bytes) -> float32 (N, K)."""
        weights = np.empty((len(rows), BY_NAME[name].row_weights(rows.shape[1])), np.float32)
        to_float = self._traits(BY_NAME[name].ggml_id).to_float
        for row, out in zip(np.ascontiguousarray(rows), weights, strict=True):
            to_float(row.ctypes.data, out.ctypes.data, out.size)
        return weights

    def decode_units(self, kind: Interleaved, units: np.ndarray, row_weights: int) -> np.ndarray:
        """uint8 (num_rows * n, row_bytes) of interleaved rows -> float32 (num_rows * n, row_weights)."""
        traits = self._traits(kind.ggml_id)
        assert traits.type_name.decode().upper() == kind.name, (traits.type_name, kind.name)
        weights = np.empty((len(units), row_weights), np.float32)
        for unit, out in zip(_by_units(kind, units), _by_units(kind, weights), strict=True):
            traits.to_float(unit.ctypes.data, out.ctypes.data, out.size)
        return weights


def _by_units(kind: Interleaved, rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows) // kind.num_rows, -1)


def interleave(kind: Interleaved, rows: np.ndarray) -> np.ndarray:
    """What `rows_in_order` undoes, bit by bit: uint8 (num_rows * n, row_bytes) -> the units."""
    header_bytes, size = kind.base.header_bytes, kind.num_rows
    of_units = rows.reshape(-1, size, rows.shape[1])
    blocks = of_units[:, :, header_bytes:].reshape(len(of_units), size, -1, kind.base.block_bytes)
    bits = np.unpackbits(blocks, axis=-1, bitorder="little")  # (units, rows, B, bits)
    found = np.zeros((len(of_units), blocks.shape[2], size * 8 * kind.base.block_bytes), np.uint8)
    first, second = sources(kind)
    for row in range(size):
        for bit in range(bits.shape[-1]):
            found[..., first[row, bit]] = bits[:, row, :, bit]
            if second[row, bit] >= 0:
                found[..., first[row, bit]] ^= found[..., second[row, bit]]
    packed = np.packbits(found, axis=-1, bitorder="little").reshape(len(of_units), -1)
    heads = of_units[:, :, :header_bytes].reshape(len(of_units), -1)
    return np.concatenate([heads, packed], axis=1).reshape(rows.shape)


def digest_of(weights: np.ndarray) -> str:
    """Of float32; zeros count as positive."""
    return blake2b((weights + np.float32(0)).tobytes(), digest_size=16).hexdigest()


UNITS = RECORDED / "units.npz"
# Their library does not know MXFP4_R8.
RECORDED_KINDS = tuple(kind for kind in interleaved().values() if kind.name != "MXFP4_R8")


def record_units(oracle: Oracle) -> None:
    """A unit of each interleaved type, and a digest of the weights that they are."""
    found = {}
    for kind in RECORDED_KINDS:
        k = kind.base.block_size
        units = interleave(kind, hostile_rows(kind.base.name, kind.num_rows, k, np.random.default_rng(kind.ggml_id)))
        found[kind.name] = units
        found[f"{kind.name} digest"] = np.array(digest_of(oracle.decode_units(kind, units, k)))
    np.savez_compressed(UNITS, **found)


def record(oracle: Oracle, name: str) -> None:
    """One row with a positive and one with a negative scale."""
    rng = np.random.default_rng(BY_NAME[name].ggml_id)
    rows = np.concatenate([hostile_rows(name, 1, _RECORDED_WEIGHTS, rng, regime) for regime in ("normal", "negative")])
    np.savez_compressed(RECORDED / f"{name}.npz", rows=rows, weights=oracle.decode(name, rows))


if __name__ == "__main__":
    for type_name in sys.argv[2:] or IK_TYPES:
        record(Oracle(Path(sys.argv[1])), type_name)
    record_units(Oracle(Path(sys.argv[1])))
