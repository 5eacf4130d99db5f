"""Where compiled kernels are kept: one folder per state of the kernel sources.

Numba decides by the date of the file a function stands in whether its cached code is still good; ours are put together
from several files. So the folder is named after the content of all of them: an edit anywhere compiles again, and going
back finds the old code. In it a file belongs to one function, CPU and version of the compiler, and is named after them:
any number of processes compile at once, for whichever CPUs, and none reads what another meant. A process locks the
state that it uses (shared, while it runs); when a new state is begun, the oldest beyond a few that no process uses are
deleted.
"""

import atexit
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path

_KEPT = 4  # states of the sources
_place: list[Callable[[], Path]] = []  # who says where: `kimi_lite` itself, when it is imported
_LOCK = "in-use"
_DIGEST_BYTES = 16


def keep_kernels_in(folder: Callable[[], Path]) -> None:
    """`folder()` is asked when the first kernel is compiled: states are kept in its folder "kernels"."""
    _place[:] = [folder]


def kernel_cache() -> Path:
    """The folder for the sources as they are now."""
    [folder] = _place
    return folder() / "kernels" / state_of_sources()


@cache
def state_of_sources() -> str:
    digest, here = blake2b(digest_size=8), Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        if not any(part.startswith("gpu") for part in path.relative_to(here).parts):  # Triton has a cache of its own
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def use_kernel_cache() -> None:
    """Makes Numba keep its code there, unless NUMBA_CACHE_DIR says otherwise. Called before anything is compiled."""
    from numba.core import config

    _keep_files_by_key()
    if config.CACHE_DIR:
        return
    folder = kernel_cache()
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        _lock(folder, is_shared=True)
    except OSError as error:
        _say_unkept(folder, error.strerror)
        config.CACHE_DIR = tempfile.mkdtemp(prefix="kimi-lite-kernels-")  # Numba wants a place
        atexit.register(shutil.rmtree, config.CACHE_DIR, ignore_errors=True)
        return
    config.CACHE_DIR = str(folder)
    if is_new:
        _delete_old_states(folder.parent)


def is_kept(function: Callable, signature: object) -> bool:
    """Whether a function of this signature is there, compiled for this CPU."""
    use_kernel_cache()
    from numba.core import caching
    from numba.core.registry import cpu_target

    kept = caching.FunctionCache(function)
    return kept._cache_file.has(kept._index_key(signature, cpu_target.target_context.codegen()))


@cache
def _keep_files_by_key() -> None:
    """A file for each function compiled for one CPU, named after all that decides its code. Numba numbers files in an
    index that it reads, changes and writes back: two processes that do so at once take the same number, and one then
    runs the other's code. Here nothing is shared between keys. A full disk and damaged files cost compiling and nothing
    else; Numba raises whatever it meets there."""
    import llvmlite
    import numba
    from numba.core import caching, config

    versions = numba.__version__, llvmlite.__version__

    class KeyedFiles(caching.IndexDataCacheFile):
        """Files of one function, by key; a digest of key and data stands before the data."""

        def __init__(self, cache_path: str, filename_base: str, source_stamp: object) -> None:
            super().__init__(cache_path, filename_base, source_stamp)
            self._base = Path(cache_path, filename_base)

        def flush(self) -> None:
            """Nothing is kept that could be wrong."""

        def save(self, key: tuple, data: object) -> None:
            name = self._name(key)
            try:
                data = self._dump(data)
                with self._open_for_write(str(self._path(name))) as file:
                    file.write(_digest(name, data) + data)
            except OSError as error:
                _say_unkept(Path(config.CACHE_DIR), error.strerror)

        def load(self, key: tuple) -> object:
            name = self._name(key)
            try:
                stored = self._path(name).read_bytes()
                digest, data = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
                return pickle.loads(data) if digest == _digest(name, data) else None
            except Exception:  # no file, or a pickle that raises anything
                return None

        def has(self, key: tuple) -> bool:
            return self._path(self._name(key)).exists()

        def _name(self, key: tuple) -> str:
            """Of the signature, the CPU and its features, the function's code and closure, and who compiles."""
            return blake2b(repr((key, self._source_stamp, versions)).encode(), digest_size=_DIGEST_BYTES).hexdigest()

        def _path(self, name: str) -> Path:
            return self._base.with_name(f"{self._base.name}.{name}.nbc")

    caching.IndexDataCacheFile = KeyedFiles


def _digest(name: str, data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES, key=bytes.fromhex(name)).digest()


@cache
def _say_unkept(folder: Path, reason: str) -> None:
    warnings.warn(
        f"Compiled kernels cannot be kept in {folder}: {reason}. Every start compiles them anew; "
        f"KIMI_LITE_CACHE names another folder.",
        stacklevel=2,
    )


def _delete_old_states(states: Path) -> None:
    with suppress(OSError):  # another process may be deleting them too
        by_age = sorted(states.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in by_age[_KEPT:]:
            lock = _lock(old, is_shared=False)
            if lock is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path, is_shared: bool) -> int | None:
    """Locks a state for as long as the descriptor is open; None where another process stands in the way, or where the
    system has no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
