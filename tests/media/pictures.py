"""Images and videos for tests."""

import io
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / rng.uniform(3, 40)) + np.cos(columns / rng.uniform(3, 40)) for _ in range(3)]
    noise = rng.normal(scale=8, size=(height, width, 3))
    return np.clip(128 + 50 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def encoded(image, form: str = "PNG", **more: object) -> bytes:
    """A Pillow image, or uint8 rows, as a file's bytes."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def write_video(
    path: Path, num_frames: int, rate: int, width: int = 64, height: int = 48, codec: str = "mpeg4"
) -> Path:
    """Frame i is a grey of 2 * i."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), min(2 * i, 255), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
