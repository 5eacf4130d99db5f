"""The stamp of cached kernels: what a change of a module does to the files that call into it."""

from pathlib import Path

import numpy as np
from numba import njit

from native.kernel_cache import modules_used, read_sources, stamp
from native.simd import load_f32


def test_imports_are_followed():
    sources = {
        "native.a": "from native.b import (\n    one,\n    two,\n)\n",
        "native.b": "import numpy\nfrom native import c\n",
        "native.c": "    import native.a\n",
        "native.d": "",
    }
    assert modules_used("from native.a import one", sources) == ["native.a", "native.b", "native.c"]
    assert modules_used("import numba", sources) == []


def test_a_stamp_changes_with_what_a_file_uses_and_only_then():
    sources = read_sources()
    rows, router = sources["native.cpu.dot"], sources["native.cpu.router"]
    for name, changes_router in (("native.simd", True), ("native.cpu.types.ternary", True), ("native.cpu.experts", False)):
        changed = {**sources, name: sources[name] + "\n# changed"}
        assert (stamp(rows, changed) != stamp(rows, sources)) == (name != "native.cpu.experts"), name
        assert (stamp(router, changed) != stamp(router, sources)) == changes_router, name


@njit("float32(int64)", cache=True)
def _load(address):
    return load_f32(address)


def test_numba_compares_the_stamp():
    assert _load(np.array([2.5], np.float32).ctypes.data) == 2.5
    stamps = _load._cache._cache_file._source_stamp
    assert stamp(Path(__file__).read_text("utf-8"), read_sources()) in stamps
