"""llama.cpp's own vector dot products, by address, from the library that the `ggml` extra (llama-cpp-python) installs.

Only `libggml-cpu` and `libggml-base` are opened: no model code, no import of `llama_cpp`. C side: ggml-cpu.h
`ggml_get_type_traits_cpu`.
"""

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np

from kimi_lite.native.layouts import Layout
from kimi_lite.tools.bench.workloads import VecDot

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
_FEATURES = ("avx512_vnni", "avx512_vbmi", "avx512", "avx_vnni", "avx2", "neon", "dotprod", "matmul_int8")


class _CpuTraits(ctypes.Structure):
    """ggml-cpu.h `struct ggml_type_traits_cpu`."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """(libggml-cpu, libggml-base), or None where the extra is not installed."""
    package = importlib.util.find_spec("llama_cpp")  # finds the folder and runs nothing
    folders = [Path(place) / "lib" for place in package.submodule_search_locations or ()] if package else []
    found = [
        [file for folder in folders for file in folder.glob(f"*ggml-{part}.{_SUFFIX}")] for part in ("base", "cpu")
    ]
    if not all(found):
        return None
    base, cpu = (ctypes.CDLL(str(files[0])) for files in found)
    base.ggml_type_name.restype = ctypes.c_char_p
    base.ggml_type_size.restype = base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    cpu.ggml_cpu_init()  # fills the float16 table that some products read
    return cpu, base


def describe_ggml() -> str:
    """What the installed ggml was compiled for, or that there is none."""
    libraries = _libraries()
    if libraries is None:
        return 'not installed (pip install "kimi-lite[ggml]")'
    base = libraries[1]
    base.ggml_version.restype = ctypes.c_char_p
    features = [name for name in _FEATURES if getattr(libraries[0], f"ggml_cpu_has_{name}")()]
    return f"ggml {base.ggml_version().decode()}, built for {', '.join(features) or 'no vector extension we know'}"


def find_vec_dot(layout: Layout, x: np.ndarray) -> VecDot | None:
    """llama.cpp's product of a row of `layout` with x, float32 (K,); None where it has none, or ggml is not
    installed."""
    libraries = _libraries()
    if libraries is None:
        return None
    cpu, base = libraries
    if layout.is_ik or layout.is_own or (base.ggml_type_name(layout.ggml_id) or b"").decode().upper() != layout.name:
        return None  # another program's, or one that this ggml is too old for
    assert base.ggml_type_size(layout.ggml_id) == layout.block_bytes, (layout.name, base.ggml_type_size(layout.ggml_id))
    traits = cpu.ggml_get_type_traits_cpu(layout.ggml_id).contents
    if not traits.vec_dot:
        return None
    return VecDot(traits.vec_dot, _quantize(cpu, base, traits.vec_dot_type, x))


def _quantize(cpu: ctypes.CDLL, base: ctypes.CDLL, ggml_id: int, x: np.ndarray) -> np.ndarray:
    if ggml_id == 0:  # float32 stays what it is
        return x.view(np.uint8).copy()
    from_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
        cpu.ggml_get_type_traits_cpu(ggml_id).contents.from_float
    )
    quantized = np.zeros(base.ggml_row_size(ggml_id, len(x)), np.uint8)
    from_float(x.ctypes.data, quantized.ctypes.data, len(x))
    return quantized
