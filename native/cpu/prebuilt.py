"""Kernels that were compiled elsewhere: a wheel carries them for common kinds of CPUs, and a first start compiles none.

`python -m tools.make.kernels` makes an archive for each path of `isa`, prebuilt/avx2.zip next to this file, and one for
what CPUs with matrix tiles take instead, amx.zip: an object file (ELF) for each kernel, with the one function `kernel`,
and an index. Its code is Numba's for a CPU that has the
archive's features and no others, and needs neither Numba nor Python to run, so it does not depend on their versions. It
is taken where the kernels' sources are those it was made of, this CPU has all of those features and its path is the
same; what is not in it, and everything elsewhere, Numba compiles.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from kimi_lite.native.amx import has_amx
from kimi_lite.native.cache import state_of_sources
from kimi_lite.native.isa import isa, target_features

FOLDER = Path(__file__).parent / "prebuilt"
INDEX, SYMBOL = "index.json", "kernel"
AMX = "amx"  # the archive that has nothing but kernels with matrix tiles
_PLAIN = (str, int, float, bool, type(None))


class Index(NamedTuple):
    """What an archive says of itself. `kernels`: the object file of each `identity`."""

    sources: str
    triple: str
    features: tuple[str, ...]
    made_by: str
    kernels: Mapping[str, str]


def find(function: Callable, signature: object) -> int | None:
    """The address of a kernel's code, where an archive for this CPU has it: a C function, arguments and result as the
    signature says."""
    archives = _archives()
    wanted = identity(function, signature) if archives else None
    for file, index in archives:
        if wanted in index.kernels:
            return load(file.read(index.kernels[wanted]))
    return None


def has(function: Callable, signature: object) -> bool:
    """Whether `find` would find it."""
    archives = _archives()
    wanted = identity(function, signature) if archives else None
    return any(wanted in index.kernels for _, index in archives)


def num_kernels() -> int:
    """How many this process may take from an archive."""
    return sum(len(index.kernels) for _, index in _archives())


def identity(function: Callable, signature: object) -> str | None:
    """What a function is, whichever Python runs: its name, signature and what its closure holds, and a digest of its
    file where that is none of the kernels' sources. None where the closure holds more than plain values."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    if not all(isinstance(value, _PLAIN) for value in cells):
        return None
    held = dict(zip(function.__code__.co_freevars, cells, strict=True))
    parts = [f"{function.__module__}.{function.__qualname__}", str(signature), *map(str, sorted(held.items()))]
    if not function.__module__.startswith("kimi_lite.native."):
        parts.append(blake2b(Path(function.__code__.co_filename).read_bytes(), digest_size=8).hexdigest())
    return " ".join(parts)


def _archives() -> list[tuple[zipfile.ZipFile, Index]]:
    """Those for this process."""
    names = (AMX, isa().name) if has_amx() else (isa().name,)
    return list(filter(None, (_archive(FOLDER / f"{name}.zip") for name in names)))


@cache
def _archive(path: Path) -> tuple[zipfile.ZipFile, Index] | None:
    """One that is there, for these sources and this CPU."""
    if not path.is_file():
        return None
    from llvmlite import binding as llvm

    try:
        file = zipfile.ZipFile(path)
        index = Index(**json.loads(file.read(INDEX)))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        warnings.warn(f"Compiled kernels in {path} cannot be read ({error}): a start compiles them.", stacklevel=2)
        return None
    is_ours = index.sources == state_of_sources() and index.triple == llvm.get_process_triple()
    return (file, index) if is_ours and target_features().issuperset(index.features) else None


def load(code: bytes) -> int:
    """The address of an object file's function, in memory and linked with this process until it ends."""
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(SYMBOL)
    assert address, f"no function {SYMBOL}"
    engine.detach()  # never freed: programs hold bare addresses
    return address
