"""Where compiled kernels are kept: one folder per state of the kernel sources.

Numba decides by the date of the file a function stands in whether its cached code is still good; ours are put together
from several files. So the folder is named after the content of all of them: an edit anywhere compiles anew, and going
back finds the old code again.
"""

import os
import shutil
from hashlib import blake2b
from pathlib import Path

import platformdirs

_KEPT = 4  # states of the sources


def kernel_cache() -> Path:
    """The folder for the sources as they are now; KIMI_LITE_CACHE moves it."""
    digest, here = blake2b(digest_size=8), Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        if (here / "gpu") not in path.parents:  # Triton has a cache of its own
            digest.update(path.read_bytes())
    base = os.environ.get("KIMI_LITE_CACHE") or platformdirs.user_cache_path("kimi-lite")
    return Path(base) / "kernels" / digest.hexdigest()


def use_kernel_cache() -> None:
    """Makes Numba keep its code there, unless NUMBA_CACHE_DIR says otherwise; forgets old states."""
    from numba.core import config

    if config.CACHE_DIR:
        return
    folder = kernel_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        states = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in states[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return  # Numba then looks for a place of its own, beside the sources or in the home folder
    config.CACHE_DIR = str(folder)
