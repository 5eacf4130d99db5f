"""How hot every expert was, kept next to the model between runs, so that the next start knows what to bring first.

`kimi-k2.5-00001-of-00006.gguf` has its heat in `kimi-k2.5.heat.npz`, or, where that folder cannot be written, in the
cache folder. Heat is a help and never a need: a file that is missing or of another model is passed over, and a damaged
one with a warning.
"""

import os
import re
import warnings
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path

import numpy as np

from kimi_lite.experts.npz import DAMAGE
from kimi_lite.files import cache_folder, whole_file

_SHARD_END = re.compile(r"-\d{5}-of-\d{5}$")


def heat_path(model: Path) -> Path:
    """Where the heat of the model with this first shard is kept."""
    name = _SHARD_END.sub("", model.stem) + ".heat.npz"
    neighbour = model.with_name(name)
    if os.access(neighbour if neighbour.exists() else model.parent, os.W_OK):
        return neighbour
    return cache_folder() / "heat" / f"{blake2b(str(model.resolve()).encode(), digest_size=8).hexdigest()}-{name}"


def load_heat(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """float32 (averages, layers, experts) as `save_heat` wrote it; None where there is none of this shape."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            heat = file["heat"]
    except FileNotFoundError:
        return None
    except DAMAGE:
        warnings.warn(f"The experts' heat {path} is damaged; it starts empty.", stacklevel=2)
        return None
    is_sound = (
        heat.shape == shape and heat.dtype == np.float32 and bool(np.isfinite(heat).all()) and bool((heat >= 0).all())
    )
    return heat if is_sound else None


def save_heat(path: Path, heat: np.ndarray, layers: Collection[int] | None = None) -> bool:
    """Writes it, whole or not at all; False where that is impossible. layers: only theirs, the file keeps what it has
    of the others."""
    if layers is not None and (kept := load_heat(path, heat.shape)) is not None:
        kept[:, list(layers)] = heat[:, list(layers)]
        heat = kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, heat=heat)
    except OSError:
        return False
    return True
