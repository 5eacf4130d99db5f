"""Every type has every piece: this names whichever is missing, and where it belongs."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kimi_lite.native.cpu import blocks as cpu_blocks
from kimi_lite.native.layouts import BY_NAME, LAYOUTS
from kimi_lite.native.types import families
from kimi_lite.native.types.layout import Layout

TYPES = Path(families.__file__).parent


def pieces(modules: dict[str, object], layout: Layout) -> list[str]:
    """The pieces of a type that its family's modules (by part) lack."""
    name, wanted = layout.name, {"reference": "DECODERS", "gpu": "DECODERS", "blocks": "MAKERS"}
    missing = [f"{part}.py: {table}" for part, table in wanted.items() if name not in getattr(modules[part], table)]
    if not cpu_blocks.is_implemented(name):
        missing.append("cpu.py: @implements")
    if layout.encoder != "none" and find_spec(f"kimi_lite.quantize.codecs.{layout.encoder}") is None:
        missing.append(f"quantize/codecs/{layout.encoder}.py")
    return missing


def modules_of(family: str) -> dict[str, object]:
    at = families.FAMILIES.index(family)
    return {part: families.parts(part)[at] for part in families.PARTS}


def test_every_folder_is_a_family():
    folders = {path.name for path in TYPES.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == set(families.FAMILIES)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_type_has_every_piece(family):
    modules = modules_of(family)
    missing = {layout.name: pieces(modules, layout) for layout in modules["layout"].LAYOUTS}
    assert not {f"{family}/{name}": lacks for name, lacks in missing.items() if lacks}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_nothing_belongs_to_no_type(family):
    modules = modules_of(family)
    names = {layout.name for layout in modules["layout"].LAYOUTS}
    for part, table in (("reference", "DECODERS"), ("gpu", "DECODERS"), ("blocks", "MAKERS")):
        assert set(getattr(modules[part], table)) == names, (family, part)


def test_names_and_numbers_are_unique():
    rows = [layout for part in families.parts("layout") for layout in part.LAYOUTS]
    assert len(rows) == len(BY_NAME) == len(LAYOUTS)
    assert all(layout.product in ("float", "block32", "block256") for layout in rows)


@pytest.mark.parametrize("layout", BY_NAME.values(), ids=lambda layout: layout.name)
def test_offsets_are_numpys(layout):
    """What kernels add to the address of a block, against where numpy puts the field."""
    block = np.zeros(1, layout.dtype)
    for field in layout.dtype.names:
        assert [block[field].ctypes.data - block.ctypes.data] == layout.offsets(field)


def test_a_missing_piece_is_named():
    """A row alone, as somebody would begin with it."""
    row = Layout("Q9_9", 999, 32, (("d", "<f2"), ("qs", "u1", 16)), "block32", 32, encoder="nines")
    empty = SimpleNamespace(DECODERS={}, MAKERS={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BY_NAME, "Q9_9", row)
        assert pieces(dict.fromkeys(families.PARTS, empty), row) == [
            "reference.py: DECODERS",
            "gpu.py: DECODERS",
            "blocks.py: MAKERS",
            "cpu.py: @implements",
            "quantize/codecs/nines.py",
        ]
