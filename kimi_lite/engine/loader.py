"""Builds an engine from a model file: store, configuration, tokenizer, cache, model.

The heavy parts (Numba through the model) are imported here, when a model is really loaded.
"""

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.moonvit import find_vision_file
from kimi_lite.arch.tensors import open_model
from kimi_lite.engine.device import choose_device, find_gpu
from kimi_lite.engine.engine import Engine, Model, OnProgress
from kimi_lite.engine.planning import plan_load
from kimi_lite.engine.types import ModelInfo
from kimi_lite.engine.vision import NO_TOWER_HINT, Vision
from kimi_lite.engine.warming import check_warmed
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.heat import heat_path
from kimi_lite.experts.recorder import RoutingRecorder
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import is_on_windows_drive
from kimi_lite.kv.disk import PrefixStore, model_key
from kimi_lite.kv.pages import KVCache, page_shape
from kimi_lite.media.features import FeatureStore
from kimi_lite.media.preprocess import TOKEN_PATCHES
from kimi_lite.media.reader import MediaLimits, MediaReader
from kimi_lite.options import Options
from kimi_lite.plan.types import Plan


def load(path: str | Path, options: Options | None = None, on_progress: OnProgress | None = None) -> Engine:
    """The one way in which a model is loaded: a .gguf file, the first of its shards, or their folder.

    The plan is made here, once, and what it says is allocated. Raises KimiLiteError where the file is damaged or the
    plan cannot be. Where no context is asked for, it is the model's own up to 32,768 tokens.
    """
    from kimi_lite.text.isolation import prepare
    from kimi_lite.text.template import ChatTemplate
    from kimi_lite.text.tokenizer import Tokenizer

    prepare()
    options = options or Options()
    report = on_progress or (lambda stage, done, total: None)
    report("reading headers", 0, 4)
    store, config = open_model(path)
    if is_on_windows_drive(store.path):
        slow = f"{store.path} is on a drive of Windows, which WSL2 reads many times more slowly: copy it below ~."
        warnings.warn(slow, RuntimeWarning, stacklevel=2)
    report("reading the vocabulary", 1, 4)
    tokenizer = Tokenizer.from_metadata(store.metadata)
    template = ChatTemplate.from_metadata(store.metadata, tokenizer)
    report("preparing the cache", 2, 4)
    device = choose_device(options.devices if options.allows_gpu else "cpu")
    plan = plan_load(store, config, options, [find_gpu(name) for name in device.split(",")])
    prefixes = open_prefixes(store, config, plan)
    vision = open_vision(store, config, plan, device.partition(",")[0])
    model, kv = _open_model(store, config, options, device, plan, prefixes, report)
    if not options.is_warm:  # else once it is
        check_warmed(store, config, plan)
    report("ready", 4, 4)
    holdings = [*([prefixes] if prefixes else []), store]
    return Engine(
        model,
        kv,
        tokenizer,
        template,
        plan.context_length,
        describe(store, config),
        holdings=holdings,
        plan=plan,
        max_context_length=config.context_length,
        max_running=plan.situation.num_running,
        max_gap_s=options.max_gap_s,
        vision=vision,
    )


def open_vision(store: GGUFStore, config: ModelConfig, plan: Plan, device: str) -> Vision | None:
    """The model's vision tower, where the options allow one and there is a file of it; only its header is read now."""
    options = plan.limits
    file = None if options.vision == "off" else find_vision_file(store.path, config.hidden_size, options.mmproj)
    if file is None and (options.images or options.videos):  # known before minutes of loading
        raise KimiLiteError(f"--image and --video need a vision tower; {config.name} has none here.", NO_TOWER_HINT)
    if file is None:
        return None
    from kimi_lite.model.vision.tower import VisionTower

    tower = VisionTower.open(
        file,
        hidden_size=config.hidden_size,
        device=device,
        stays_on_device=options.vision == "gpu",
        num_threads=plan.num_threads,
    )
    if tower.sizes.merge != TOKEN_PATCHES:
        raise KimiLiteError(
            f"{file} makes a token of {tower.sizes.merge} x {tower.sizes.merge} patches; {TOKEN_PATCHES} x "
            f"{TOKEN_PATCHES} can be read.",
            "Go without it: --vision off.",
        )
    limits = MediaLimits(
        max_bytes=options.image_bytes,
        max_patches=tower.sizes.max_patches,
        fps=options.video_fps,
        max_frames=options.video_frames,
    )
    reader = MediaReader(limits)
    features = FeatureStore(config.hidden_size, options.prefix_folder, tower.key, options.prefix_bytes)
    return Vision(tower, tower.key, reader, features)


def _open_model(
    store: GGUFStore,
    config: ModelConfig,
    options: Options,
    device: str,
    plan: Plan,
    prefixes: PrefixStore | None,
    report: OnProgress,
) -> tuple[Model, KVCache]:
    """On the CPU path or the hybrid path."""
    recorder = RoutingRecorder(options.routing_trace, config) if options.routing_trace else None
    if device != "cpu":
        from kimi_lite.model.hybrid.load import load_hybrid

        return load_hybrid(store, config, plan, device, report, prefixes, recorder)
    from kimi_lite.model.cpu.transformer import Transformer

    kv = KVCache(config.num_layers, config.kv_latent_size, plan.num_cache_pages, options.kv_dtype, prefixes=prefixes)
    heat_file = heat_path(store.path) if options.keeps_heat else None
    options = replace(options, num_threads=plan.num_threads)
    return Transformer(store, config, kv, options, plan.ram_budget_bytes, heat_file, report, recorder), kv


def open_prefixes(store: GGUFStore, config: ModelConfig, plan: Plan) -> PrefixStore | None:
    """The pages of this model on disk, where the options want any; who opens them closes them."""
    options = plan.limits
    if options.prefix_folder is None:
        return None
    num_deferred = options.num_deferred_experts if plan.is_on_gpu or options.defers_on_cpu else 0
    deferred = [f"deferred {num_deferred}"] if num_deferred else []
    form = (plan.dense_type, *["reproducible"] * options.is_reproducible) if plan.is_on_gpu else (True,)
    key = model_key(store, options.kv_dtype, options.cache_bias, *form, *deferred)
    return PrefixStore(options.prefix_folder, key, page_shape(config, options.kv_dtype), options.prefix_bytes)


def describe(store: GGUFStore, config: ModelConfig) -> ModelInfo:
    bytes_by_type: Counter[str] = Counter()
    for tensor in store.tensors.values():
        bytes_by_type[tensor.layout.name] += tensor.num_bytes
    return ModelInfo(config.name, store.path, store.total_bytes, tuple(bytes_by_type.most_common()))
