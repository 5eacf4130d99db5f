"""Makes Numba's disk cache notice a change in any module that a kernel calls.

Numba keeps compiled code while the file that defines a function stays the same, and does not look at the functions that
it calls. A kernel here calls into half a dozen modules, so after an edit or an upgrade old code would go on running. The
stamp of a file therefore covers the `native` modules it imports, directly or not. Installed by `native.simd`, which every
kernel imports.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_IMPORT = re.compile(r"^\s*(?:from|import) (native[\w.]*)(?: import (\([^)]*\)|.*))?", re.MULTILINE)
_REGISTERED = {"native.cpu.blocks": "native.cpu.types"}  # whoever asks the registry gets code from there, without an import


def read_sources() -> dict[str, str]:
    """Module name -> source text of everything in this package."""
    root = Path(__file__).parent
    files = {".".join(("native", *file.relative_to(root).with_suffix("").parts)): file for file in sorted(root.rglob("*.py"))}
    return {name.removesuffix(".__init__"): file.read_text("utf-8") for name, file in files.items()}


def modules_used(source: str, sources: Mapping[str, str]) -> list[str]:
    """Names of the `native` modules that a source text imports, directly or not, sorted."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        for module, names in _IMPORT.findall(waiting.pop()):
            candidates = {module, *(f"{module}.{name}" for name in re.findall(r"\w+", names))}
            candidates |= {_REGISTERED[name] for name in candidates & _REGISTERED.keys()}
            new = {name for name in candidates if name in sources} - found
            found |= new
            waiting += [sources[name] for name in new]
    return sorted(found)


def stamp(source: str, sources: Mapping[str, str]) -> str:
    """Hash of all the modules that a source text uses; constant for one that uses none."""
    digest = hashlib.sha256()
    for name in modules_used(source, sources):
        digest.update(f"{name}\0{sources[name]}\0".encode())
    return digest.hexdigest()


@cache
def install() -> None:
    """Adds the stamp to the ones that Numba's cache compares. Reads all sources now, while they are what was imported."""
    from numba.core.caching import CacheImpl

    sources = read_sources()
    CacheImpl._locator_classes = [_with_stamp(locator, sources) for locator in CacheImpl._locator_classes]


def _with_stamp(locator: type, sources: Mapping[str, str]) -> type:
    @cache
    def stamp_of(file: str) -> str:
        path = Path(file)
        return stamp(path.read_text("utf-8"), sources) if path.is_file() else ""  # a notebook's cell is no file

    class Stamped(locator):
        def get_source_stamp(self):
            return super().get_source_stamp(), stamp_of(self._py_file)

    return Stamped
