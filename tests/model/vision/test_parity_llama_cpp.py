"""The tower beside llama.cpp's vision code on the same file. It has GELU by tanh in the projector where the vendor's is
exact, no video, and pads images in the middle; so images here are whole tokens, and the limit is what the GELUs differ
by. For kimivl it resamples the table of positions bilinearly where the vendor does so bicubically, so those images have
the table's size; and it turns queries and keys of its own kimivl files wrongly (`arch.moonvit`), so the file is ours.
"""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from kimi_lite.model.vision.tower import VisionTower
from kimi_lite.tools.make.seeing import patches_of
from kimi_lite.tools.make.vision import K2_5_TOWER, KIMI_VL_TOWER, write_tower
from tests.tiny import write_tiny_gguf

TEXT_HIDDEN = 256
SMALL = {
    "hidden": 128,
    "feed_forward": 192,
    "heads": 4,
    "layers": 2,
    "height": 8,
    "width": 8,
    "text_hidden": TEXT_HIDDEN,
}
TOWERS = {"kimik25": replace(K2_5_TOWER, **SMALL), "kimivl": replace(KIMI_VL_TOWER, **SMALL)}
SIZES = ((4, 4), (2, 5), (7, 3), (5, 12))  # in tokens; the first has as many patches as the table of positions
LIMITS = {"f32": 2e-3, "f16": 4e-3, "bf16": 2e-2, "q8_0": 3e-2}  # it rounds activations as the weights are


@pytest.mark.parametrize(("projector", "type_name"), [("kimivl", "f32"), *(("kimik25", name) for name in LIMITS)])
def test_equals_llama_cpp(projector, type_name, tmp_path):
    pytest.importorskip("llama_cpp.mtmd_cpp")
    from kimi_lite.tools.bench.clip import Clip

    path, rng = tmp_path / "mmproj.gguf", np.random.default_rng(3)
    write_tower(path, TOWERS[projector], type_name)
    text_model = write_tiny_gguf(tmp_path / "text.gguf", np.random.default_rng(1), hidden_size=TEXT_HIDDEN)
    with closing(VisionTower.open(path, num_threads=1)) as tower, closing(Clip(path, text_model, 1)) as clip:
        for height, width in SIZES if projector == "kimik25" else SIZES[:1]:
            image = rng.integers(0, 256, (28 * height, 28 * width, 3), dtype=np.uint8)
            assert clip.show(image) == height * width
            have, want = tower.encode(patches_of(image)), clip.encode()
            assert np.linalg.norm(have - want) < LIMITS[type_name] * np.linalg.norm(want)
