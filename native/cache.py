"""Where compiled kernels are kept: one folder per state of the kernel sources.

Numba decides by the date of the file a function stands in whether its cached code is still good; ours are put together
from several files. So the folder is named after the content of all of them: an edit anywhere compiles again, and going
back finds the old code. A process locks the state that it uses (shared, while it runs); when a new state is
begun, the oldest beyond a few that no process uses are deleted.
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
    return folder() / "kernels" / _state_of_sources()


@cache
def _state_of_sources() -> str:
    digest, here = blake2b(digest_size=8), Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        if not any(part.startswith("gpu") for part in path.relative_to(here).parts):  # Triton has a cache of its own
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def use_kernel_cache() -> None:
    """Makes Numba keep its code there, unless NUMBA_CACHE_DIR says otherwise. Called before anything is compiled."""
    from numba.core import config

    _tolerate_bad_files()
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


def _tolerate_bad_files() -> None:
    """A full disk and damaged files cost compiling and nothing else; Numba raises whatever it meets there."""
    from numba.core import caching, config

    class CheckedFile(caching.IndexDataCacheFile):
        """Numba's index and data of one function; the data's digest stands before it."""

        def save(self, key: tuple, data: object) -> None:
            try:
                super().save(key, data)
            except OSError as error:
                _say_unkept(Path(config.CACHE_DIR), error.strerror)

        def load(self, key: tuple) -> object:
            try:
                return super().load(key)
            except Exception:  # a damaged pickle raises anything
                return None

        def _load_index(self) -> dict:
            try:
                return super()._load_index()
            except Exception:
                return {}

        def _save_data(self, name: str, data: object) -> None:
            data = self._dump(data)
            with self._open_for_write(self._data_path(name)) as file:
                file.write(_digest(data) + data)

        def _load_data(self, name: str) -> object:
            stored = Path(self._data_path(name)).read_bytes()
            if stored[:_DIGEST_BYTES] != _digest(stored[_DIGEST_BYTES:]):
                raise OSError("damaged")
            return pickle.loads(stored[_DIGEST_BYTES:])

    if caching.IndexDataCacheFile.__name__ != CheckedFile.__name__:
        caching.IndexDataCacheFile = CheckedFile


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


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
