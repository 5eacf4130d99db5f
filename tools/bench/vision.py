"""How long the vision tower looks at an image, as a share of what the arithmetic takes at least, next to llama.cpp.

    python -m tools.make.vision mmproj.gguf --type q8_0
    python -m tools.bench.vision mmproj.gguf --size 1024x768 --compare llama.cpp

The bound counts multiply-adds: matrices at the peak of the instruction that they take (float32 FMA, or the int8 dot
product for files with quantized matrices), attention at that of float32 FMA. Peaks are measured in the same run, one
core times threads. Repeats of ours and llama.cpp's take turns; the image has a multiple of 28 pixels, so that both see
the same patches.
"""

import json
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import numpy as np
import typer

from kimi_lite.arch.known import K2_5
from kimi_lite.arch.moonvit import MoonViT
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware.bandwidth import measure_macs
from kimi_lite.hardware.host import usable_cores
from kimi_lite.model.vision.patches import PATCH, Grid, Patches
from kimi_lite.model.vision.tower import VisionTower
from kimi_lite.native.cpu.compiler import function
from kimi_lite.native.simd import fma_f32x16, load_f32x16, store_f32x16
from kimi_lite.tools.bench.clip import Clip
from kimi_lite.tools.make.slice import make_slice

SCREENSHOT = Grid(1, 56, 74)  # 1024 x 768 pixels, padded
_STEP = 2 * PATCH  # pixels that an image is padded to a multiple of
_FMA_ROUNDS, _FMA_MACS = 50_000, 12 * 16


@function("void(int64, int64)", fastmath=True)
def _fused(data, num_rounds):
    """Twelve float32 sums that wait for nothing but themselves."""
    a, b, c, d = load_f32x16(data), load_f32x16(data), load_f32x16(data), load_f32x16(data)
    e, f, g, h = a, b, c, d
    i, j, k, m = a, b, c, d
    for number in range(num_rounds):
        at = data + 64 * (number & 7)
        x, y, z = load_f32x16(at), load_f32x16(at + 64), load_f32x16(at + 128)
        a, b, c, d = fma_f32x16(x, y, a), fma_f32x16(x, z, b), fma_f32x16(y, z, c), fma_f32x16(x, x, d)
        e, f, g, h = fma_f32x16(y, y, e), fma_f32x16(z, z, f), fma_f32x16(y, x, g), fma_f32x16(z, x, h)
        i, j, k, m = fma_f32x16(z, y, i), fma_f32x16(x, y, j), fma_f32x16(x, z, k), fma_f32x16(y, z, m)
    store_f32x16(data, (a + b + c + d) + (e + f + g + h) + (i + j + k + m))


def measure_fmas(num_cores: int, num_runs: int = 60) -> float:
    """Float32 multiply-adds/s of so many cores at the instruction's peak: the best of one core's runs, times cores."""
    data, best_s = np.zeros(256, np.float32), float("inf")
    for _ in range(num_runs):
        start_s = time.perf_counter()
        _fused(data.ctypes.data, _FMA_ROUNDS)
        best_s = min(best_s, time.perf_counter() - start_s)
    return num_cores * _FMA_ROUNDS * _FMA_MACS / best_s


class Work(NamedTuple):
    """Multiply-adds of one item."""

    matrices: float
    attention: float

    @classmethod
    def of(cls, tower: MoonViT, grid: Grid) -> "Work":
        patches, d = grid.num_patches, tower.hidden
        layer = d * (4 * d + 2 * tower.feed_forward)
        ends = grid.num_tokens(tower.merge) * tower.merged * (tower.merged + tower.text_hidden)
        patch_filter = patches * 3 * tower.patch**2 * d
        return cls(patches * layer * tower.layers + ends + patch_filter, 2 * patches**2 * d * tower.layers)

    def bound_s(self, macs_s: float, attention_macs_s: float) -> float:
        return self.matrices / macs_s + self.attention / attention_macs_s


class Measured(NamedTuple):
    """Seconds of each repeat; theirs is empty without --compare."""

    ours_s: list[float]
    theirs_s: list[float]
    difference: float  # of the features, relative; 0 without --compare


def random_image(grid: Grid) -> tuple[np.ndarray, Patches]:
    """uint8 (height, width, 3), and its patches."""
    image = np.random.default_rng(0).integers(0, 256, (PATCH * grid.h, PATCH * grid.w, 3), dtype=np.uint8)
    pixels = image.reshape(grid.h, PATCH, grid.w, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, PATCH, PATCH)
    return image, Patches(np.ascontiguousarray(pixels), grid)


def prepare(tower: VisionTower) -> None:
    """Packs and compiles, which the first image pays for."""
    side = tower.sizes.merge
    tower.encode(random_image(Grid(1, side, side))[1])


def time_image(tower: VisionTower, grid: Grid, num_threads: int, repeats: int) -> tuple[float, float | None]:
    """Median seconds of an image, and what the arithmetic takes at least; None on a GPU."""
    prepare(tower)
    times_s, (_, patches) = [], random_image(grid)
    for _ in range(repeats):
        start_s = time.perf_counter()
        tower.encode(patches)
        times_s.append(time.perf_counter() - start_s)
    return median(times_s), find_bound_s(tower, grid, num_threads) if tower.is_on_cpu else None


def find_bound_s(tower: VisionTower, grid: Grid, num_threads: int) -> float:
    """Matrices at the peak of their instruction, attention at that of float32."""
    fmas = measure_fmas(num_threads)
    return Work.of(tower.sizes, grid).bound_s(
        measure_macs(num_threads, with_tiles=False) if tower.is_int8 else fmas, fmas
    )


def measure(path: Path, grid: Grid, num_threads: int, repeats: int, has_llama_cpp: bool) -> Measured:
    """Raises KimiLiteError."""
    image, patches = random_image(grid)
    with ExitStack() as stack:
        tower = stack.enter_context(closing(VisionTower.open(path, num_threads=num_threads)))
        prepare(tower)
        clip = stack.enter_context(closing(_clip(stack, path, tower.sizes, num_threads))) if has_llama_cpp else None
        ours_s, theirs_s, difference = [], [], 0.0
        if clip:
            clip.show(image)
        for _ in range(repeats):
            start_s = time.perf_counter()
            have = tower.encode(patches)
            ours_s.append(time.perf_counter() - start_s)
            if clip:
                start_s = time.perf_counter()
                theirs = clip.encode()
                theirs_s.append(time.perf_counter() - start_s)
                difference = float(np.linalg.norm(have - theirs) / np.linalg.norm(theirs))
    return Measured(ours_s, theirs_s, difference)


def _clip(stack: ExitStack, path: Path, tower: MoonViT, num_threads: int) -> Clip:
    """llama.cpp with a text model that has nothing but the right width."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = replace(
        K2_5,
        hidden_size=tower.text_hidden,
        num_layers=2,
        num_heads=1,
        num_experts=4,
        num_experts_used=2,
        feed_forward_size=256,
        expert_feed_forward_size=256,
        vocab_size=640,
    )
    make_slice(folder / "text.gguf", config, {})
    return Clip(path, folder / "text.gguf", num_threads)


def main(
    path: Annotated[Path, typer.Argument(help="A vision file.")],
    size: Annotated[str, typer.Option(help="Of the image, WIDTHxHEIGHT; padded to multiples of 28.")] = "1024x768",
    threads: Annotated[int, typer.Option("-t", "--threads", help="0: all cores.", min=0)] = 0,
    repeats: Annotated[int, typer.Option("-r", "--repeats", min=1)] = 3,
    compare: Annotated[str, typer.Option(help="llama.cpp, or nothing.")] = "",
) -> None:
    """Seconds for one image, share of the arithmetic bound, next to llama.cpp."""
    num_threads = threads or usable_cores().num_usable
    width, height = (int(part) for part in size.split("x"))
    grid = Grid(1, *(-(-side // _STEP) * _STEP // PATCH for side in (height, width)))
    try:
        with closing(VisionTower.open(path)) as tower:
            work, bound_s = Work.of(tower.sizes, grid), find_bound_s(tower, grid, num_threads)
        fmas, macs = measure_fmas(num_threads), measure_macs(num_threads, with_tiles=False)
        print(
            f"{path.name}: {grid.w} x {grid.h} patches, {sum(work) / 1e12:.2f} T multiply-adds, {num_threads} threads"
        )
        print(f"peaks: float32 FMA {fmas / 1e9:.0f}, int8 dot product {macs / 1e9:.0f} G multiply-adds/s")
        measured = measure(path, grid, num_threads, repeats, compare == "llama.cpp")
    except KimiLiteError as error:
        sys.exit(str(error))
    ours_s = median(measured.ours_s)
    print(f"bound {bound_s:.2f} s; kimi-lite {ours_s:.2f} s, {100 * bound_s / ours_s:.0f} % of it")
    document = {
        "patches": grid.num_patches,
        "bound_s": bound_s,
        "ours_s": measured.ours_s,
        "fmas_s": fmas,
        "macs_s": macs,
    }
    if measured.theirs_s:
        theirs_s = median(measured.theirs_s)
        print(
            f"llama.cpp {theirs_s:.2f} s: kimi-lite is {theirs_s / ours_s:.2f} x as fast; features differ by "
            f"{100 * measured.difference:.2f} %"
        )
        document |= {"theirs_s": measured.theirs_s, "difference": measured.difference}
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
