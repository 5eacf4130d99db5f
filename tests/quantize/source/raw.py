"""Raw tensors on disk, for tests of what reads them."""

from pathlib import Path

import numpy as np

from kimi_lite.quantize.source.shards import RawTensor


def raw_tensor(folder: Path, name: str, dtype: str, values: np.ndarray) -> RawTensor:
    """`values` as the bytes of a safetensors type, seven bytes into a file of its own."""
    file = folder / f"{name}.bin"
    file.write_bytes(b"padding" + values.tobytes())
    return RawTensor(name, dtype, values.shape, file, 7, values.nbytes)
