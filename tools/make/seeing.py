"""Makes a vision file for the demo model with which it names one of eight colours: a random tower, a fitted projector.

    python -m tools.make.seeing mmproj-demo.gguf              # seconds; then:
    kimi-lite run --mmproj mmproj-demo.gguf --image IMAGE -p "Which colour is it? Answer with one word."

The tower is two layers of MoonViT-3D with random weights. What it makes of some drawings (one shape of one colour,
somewhere, of some size, on grey) is fitted linearly, by least squares, to the embedding of the colour's word where a
token shows mostly the shape, and to that of FILLER elsewhere. An answer that names the colour proves that pixels come
through decoding, preprocessing, the tower, the projector and the prompt into the right rows. It proves nothing about
how well a trained tower would see, and little about positions: any token with the word in it will do.
"""

import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kimi_lite.demo.build import ensure_demo_model
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.vision.patches import PATCH, Grid, Patches
from kimi_lite.model.vision.tower import VisionTower
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.text.tokenizer import Tokenizer
from kimi_lite.tools.make.vision import K2_5_TOWER, write_tower

COLOURS = {
    "red": (214, 32, 32),
    "green": (32, 150, 48),
    "blue": (32, 64, 214),
    "yellow": (240, 220, 32),
    "white": (255, 255, 255),
    "black": (8, 8, 8),
    "orange": (245, 130, 20),
    "pink": (255, 110, 190),
}
BACKGROUND, FILLER = 128, "\n"
SHAPES = ("circle", "square", "triangle")
_TOKEN = 2 * PATCH  # pixels
_NUM_DRAWINGS = 320
_RIDGE = 1e-5  # of the mean of the values' squares
_SMALL = replace(K2_5_TOWER, hidden=128, feed_forward=192, layers=2, heads=4, height=8, width=8)


def draw(rng: np.random.Generator, colour: str) -> np.ndarray:
    """uint8 (height, width, 3): a shape that covers whole tokens, at a random place, of a random size."""
    height, width = (_TOKEN * int(n) for n in rng.integers(3, 9, 2))
    radius = int(rng.integers(_TOKEN, min(height, width) // 2))
    y, x = int(rng.integers(radius, height - radius + 1)), int(rng.integers(radius, width - radius + 1))
    rows, columns = np.mgrid[:height, :width]
    dy, dx = rows + 0.5 - y, columns + 0.5 - x
    shape = str(rng.choice(SHAPES))
    if shape == "circle":
        is_inside = dy**2 + dx**2 <= radius**2
    elif shape == "square":
        is_inside = np.maximum(abs(dy), abs(dx)) <= radius
    else:
        is_inside = (dy <= radius) & (2 * abs(dx) <= dy + radius)
    image = np.full((height, width, 3), BACKGROUND, np.uint8)
    image[is_inside] = COLOURS[colour]
    return image


def patches_of(image: np.ndarray) -> Patches:
    """Of an image whose sides are multiples of 28 pixels, as preprocessing makes them."""
    h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
    pixels = image.reshape(h, PATCH, w, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, PATCH, PATCH)
    return Patches(np.ascontiguousarray(pixels), Grid(1, h, w))


def _shown(image: np.ndarray, colour: str) -> np.ndarray:
    """Which tokens show mostly the shape, bool (tokens,)."""
    is_shape = (image == np.array(COLOURS[colour], np.uint8)).all(axis=2)
    h, w = image.shape[0] // _TOKEN, image.shape[1] // _TOKEN
    return is_shape.reshape(h, _TOKEN, w, _TOKEN).mean(axis=(1, 3)).reshape(-1) > 0.5


def make_seeing_tower(path: Path, model: Path, seed: int = 0, is_overwriting: bool = False) -> None:
    """Writes the file for a model, in float32. Raises KimiLiteError."""
    store = GGUFStore.open(model)
    words = _embeddings(store, [*(f" {colour}" for colour in COLOURS), FILLER])
    rng = np.random.default_rng(seed)
    drawings = [(draw(rng, colour), colour) for colour in sorted(COLOURS) for _ in range(_NUM_DRAWINGS // len(COLOURS))]
    names = list(COLOURS)
    inputs, targets = [], []
    with tempfile.TemporaryDirectory() as folder:
        for (image, colour), seen in zip(
            drawings, _inner_values(Path(folder) / "probe.gguf", drawings, seed), strict=True
        ):
            inputs.append(seen)
            is_shown = _shown(image, colour)
            targets.append(np.where(is_shown[:, None], words[names.index(colour)], words[-1]))
    values = np.concatenate(inputs).astype(np.float64)
    values = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    ridge = 1e-4 * np.trace(values.T @ values) / values.shape[1] * np.eye(values.shape[1])
    fitted = np.linalg.solve(values.T @ values + ridge, values.T @ np.concatenate(targets))  # (merged + 1, D)
    weights = {"mm.2.weight": fitted[:-1].T.astype(np.float32), "mm.2.bias": fitted[-1].astype(np.float32)}
    write_tower(path, replace(_SMALL, text_hidden=words.shape[1]), "f32", weights, seed, is_overwriting)


def _embeddings(store: GGUFStore, words: list[str]) -> np.ndarray:
    """float32 (words, D). Raises KimiLiteError for a word of several tokens."""
    tokenizer, table = Tokenizer.from_metadata(store.metadata), store.tensor("token_embd.weight")
    ids = [tokenizer.encode(word) for word in words]
    if any(len(each) != 1 for each in ids):
        raise KimiLiteError(f"{store.path}: a word of {words} is no single token there.", "Use the demo model.")
    return dequantize(table.data[[each[0] for each in ids]], table.layout.name)


def _inner_values(path: Path, drawings: list[tuple[np.ndarray, str]], seed: int) -> list[np.ndarray]:
    """What the projector's last matrix reads: of a file in which it is the identity, what the tower makes."""
    merged = _SMALL.merged
    given = {"mm.2.weight": np.eye(merged, dtype=np.float32), "mm.2.bias": np.zeros(merged, np.float32)}
    write_tower(path, replace(_SMALL, text_hidden=merged), "f32", given, seed)
    with closing(VisionTower.open(path)) as tower:
        return [tower.encode(patches_of(image)) for image, _ in drawings]


def main(
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Default: the demo model.")] = None,
    force: Annotated[bool, typer.Option(help="Write over a file that is there.")] = False,
) -> None:
    """A vision file with which the demo model names colours."""
    start_s = time.perf_counter()
    try:
        make_seeing_tower(path, model or ensure_demo_model(), is_overwriting=force)
    except KimiLiteError as error:
        sys.exit(str(error))
    print(f"{path}: knows {', '.join(COLOURS)}; {time.perf_counter() - start_s:.1f} s")


if __name__ == "__main__":
    typer.run(main)
