"""A slice of Kimi K2.5 with a desktop's memory: what a layer costs, part by part; tokens, prompts; what the whole model
would do, next to what the plan says.

One layer of the slice costs what one of the 60 costs. Parts are captured and replayed, so that the GPU's own time is
measured and no launch; seconds of tokens and prompts are the host's.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.arch.known import K2_5, slice_of
from kimi_lite.engine.engine import Engine
from kimi_lite.hardware.machine import described
from kimi_lite.hardware.probe import probe
from kimi_lite.model.hybrid.kernels import DenseMatrix
from kimi_lite.model.hybrid.layer import Layer
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.options import Options
from kimi_lite.plan.subject import find_subject, plan_in
from kimi_lite.tools.gpu_check.opening import chunk, opened, tiny_config, tiny_types, tokens
from kimi_lite.tools.gpu_check.settings import Settings, tell
from kimi_lite.tools.kernels.gpu_bench import median_s
from kimi_lite.tools.make.slice import make_slice
from kimi_lite.units import GIB

VRAM_BYTES, RAM_BYTES = 24 * GIB, 256 * GIB  # the desktop that is meant
_CONTEXT, _VOCABULARY = 16_384, 32_768
_PROMPTS = (64, 300, 512, 4096, 8192)
_LAYERS = K2_5.num_layers - K2_5.num_dense_layers


def make_file(settings: Settings) -> None:
    """Written once, read by the stages behind it."""
    path, types = _path(settings), tiny_types(settings)
    config = slice_of(K2_5, 1, settings.expert_layers, K2_5.num_experts, _VOCABULARY)
    if settings.is_stand_in:
        config = replace(tiny_config(), num_layers=1 + settings.expert_layers)
    report = make_slice(path, config, types, is_overwriting=True)
    tell("file", report.num_bytes / 1e9, "GB", s=report.seconds, where=str(path))


def _path(settings: Settings) -> Path:
    return settings.scratch / "slice.gguf"


def _open(settings: Settings, **options: object):
    """The stand-in makes its own tiny file: its stages run at the same time."""
    if settings.is_stand_in:
        settings = replace(settings, scratch=settings.scratch / f"{time.monotonic_ns()}")
        settings.scratch.mkdir()
        make_file(settings)
    length = settings.sized(1024, _CONTEXT)
    return opened(_path(settings), settings, vram_bytes=VRAM_BYTES, context_length=length, **options)


def time_parts(settings: Settings) -> None:
    """Of one token behind 4096: each part of a layer, layer 0 and the head."""
    import torch

    with _open(settings, num_gpu_experts=16) as engine, torch.inference_mode():
        if engine.model._streams.is_cuda:  # what weights could be read with at most
            plain = engine.model._streams.zeros((64 << 20,), torch.float32)
            tell("memory", plain.nbytes / median_s(lambda: torch.sum(plain), 20) / 1e9, "GB/s")
        for name, part in _parts(engine.model, depth=settings.sized(512, 4096)).items():
            _time_part(engine.model, name, part)


class Part(NamedTuple):
    run: Callable[[], object]
    num_bytes: int  # of weights that it reads


def _parts(model: HybridTransformer, depth: int) -> dict[str, Part]:
    """Each as decoding has it, on inputs that never change."""
    import torch

    from kimi_lite.native.gpu.arguments import ChoiceRows

    streams, kernels, c = model._streams, model._kernels, model.config
    dense, layer = model.layers[0], model.layers[1]
    form, slots = model.experts.store.index.layers[1], model.experts.slots.slots
    x, normed, shared = (streams.zeros((1, c.hidden_size), torch.float32) for _ in range(3))
    normed += 0.1
    step, top_k = model._maker.make(chunk(tokens(1, 500), depth, is_generated=True), []), c.num_experts_used
    choice = torch.arange(top_k, dtype=torch.int32).to(streams.device)
    token, weights = torch.zeros_like(choice), streams.zeros((1, top_k), torch.float32)
    rows = streams.zeros((top_k, c.hidden_size), torch.float32)
    attention = _attention_bytes(layer)
    feed_forward = _bytes(dense.dense.gate_up, dense.dense.down)
    return {
        "attention": Part(lambda: layer.attend(x, step), attention),
        "router": Part(lambda: layer.router.forward(normed), _bytes(layer.router.ffn_gate_inp)),
        "shared expert": Part(lambda: layer.shared_expert(normed), _bytes(layer.shared.gate_up, layer.shared.down)),
        "hits": Part(
            lambda: kernels.expert_choices(normed, slots, form, choice, token, rows),
            top_k * _expert_bytes(model),
        ),
        "join": Part(lambda: kernels.join(x, ChoiceRows(choice, rows, rows), weights, shared), 0),
        "dense layer": Part(lambda: dense.attend(x, step), _attention_bytes(dense) + feed_forward),
        "head": Part(lambda: model.head.logits(normed), _bytes(model.head.output)),
    }


def _attention_bytes(layer: Layer) -> int:
    return _bytes(*(each for each in vars(layer.attention).values() if isinstance(each, DenseMatrix)))


def _bytes(*matrices: DenseMatrix) -> int:
    return sum(matrix.data.numel() for matrix in matrices)


def _time_part(model: HybridTransformer, name: str, part: Part) -> float:
    """Seconds: the median of 30 replays. A part that fails is told, and the others go on."""
    streams = model._streams
    try:
        part.run()
        part.run()
        if streams.is_cuda:
            seconds = median_s(streams.capture(part.run, streams.graph_memory()).replay, 30)
        else:
            start_s = time.perf_counter()
            part.run()
            seconds = time.perf_counter() - start_s
    except Exception as error:
        tell(name, f"{type(error).__name__}: {error}"[:200], is_ok=False)
        return 0.0
    tell(name, seconds * 1e6, "us", **({"gb_s": part.num_bytes / seconds / 1e9} if part.num_bytes else {}))
    return seconds


def decode(settings: Settings) -> None:
    """Without slots, with a few that fill themselves, with all; then the whole model from the first."""
    found, count = {}, settings.sized(4, 200)
    for name, slots in (("0", 0), ("some", settings.sized(4, 120)), ("all", None)):
        try:
            with _open(settings, num_gpu_experts=slots) as engine:
                token_s = _decode(engine, name, count, settings.sized(3, 20))
                found[name] = token_s, (_once(engine.model) if name == "0" else 0.0)
        except Exception as error:
            tell(f"token_{name}", f"{type(error).__name__}: {error}"[:300], is_ok=False)
    if "0" in found:
        _extrapolate(settings, *found["0"])


def _decode(engine: Engine, name: str, count: int, num_warm: int) -> float:
    """Seconds a token; hits and promotions as they change."""
    model, ids = engine.model, tokens(count + num_warm, 500)
    for i in range(num_warm):  # kernels, graphs, threads
        model.forward(chunk(ids[i : i + 1], i, is_generated=True))
    before, times = dict(model.counters()), []
    for i in range(num_warm, num_warm + count):
        start_s = time.perf_counter()
        logits = model.forward(chunk(ids[i : i + 1], i, is_generated=True))
        times.append(time.perf_counter() - start_s)
        if i % 40 == 39:
            now = model.counters()
            chosen = now["gpu_expert_hits"] + now["gpu_expert_misses"]
            share = now["gpu_expert_hits"] / max(1, chosen)
            tell(f"{name} slots, token {i}", share, "hits", budget=now.get("promotion_budget"),
                 promotions=now["expert_promotions"], threads=now.get("expert_threads"))  # fmt: skip
    after, median_s = model.counters(), float(np.median(times))
    expert_bytes = (after["gpu_expert_misses"] - before["gpu_expert_misses"]) * _expert_bytes(model)
    spent = {key: (after[key] - before[key]) / count * 1e3 for key in ("cpu_experts_s", "gpu_wait_s", "decode_s")}
    tell(f"token_{name}", median_s * 1e3, "ms", bool(np.isfinite(logits).all()), slowest_ms=max(times) * 1e3,
         hits=after["gpu_expert_hits"] - before["gpu_expert_hits"],
         misses=after["gpu_expert_misses"] - before["gpu_expert_misses"],
         cpu_gb_s=expert_bytes / 1e9 / max(1e-9, after["cpu_experts_s"] - before["cpu_experts_s"]),
         **{f"{key.removesuffix('_s')}_ms": value for key, value in spent.items()})  # fmt: skip
    return median_s


def _expert_bytes(model: HybridTransformer) -> int:
    return sum(part.num_bytes for part in model.experts.store.index.layers[1].matrices)


def _once(model: HybridTransformer) -> float:
    """Seconds of a token that no further layer repeats: layer 0 and the head."""
    import torch

    with torch.inference_mode():
        parts = _parts(model, depth=128)
        return sum(_time_part(model, f"once: {name}", parts[name]) for name in ("dense layer", "head"))


def _extrapolate(settings: Settings, token_s: float, once_s: float) -> None:
    """60 layers from those of the slice: an estimate. What the host does once a token is counted with every layer, so
    that it is a little too slow; K2.5's head is five times the slice's (1 ms more on a 4090), which is left out. Last,
    what the plan says of this machine with a desktop's memory."""
    layer_s = (token_s - once_s) / settings.expert_layers
    whole_s = _LAYERS * layer_s + once_s
    tell("layer_0", layer_s * 1e6, "us", once_us=once_s * 1e6, review="1,330 on a 4090 with 80 GB/s")
    tell("whole_0", 1 / whole_s, "tokens/s", ms=whole_s * 1e3, estimated_from=f"{settings.expert_layers} layers")
    hardware = described(probe(Path.cwd()), RAM_BYTES, VRAM_BYTES)
    plan = plan_in(find_subject("kimi-k2.5"), "tq1_0", hardware, Options(vram_bytes=VRAM_BYTES, context_length=32_768))
    limit, expected = plan.decode.limit_tok_s, plan.decode.expected_tok_s
    tell("plan", limit, "tokens/s", expected=expected, bottleneck=plan.decode.bottleneck,
         review="12.0 at 0 hits on a 4090 with 80 GB/s, bound 15.2")  # fmt: skip


def prompts(settings: Settings) -> None:
    """Each twice: the second time kernels are compiled and costs are known."""
    lengths = settings.sized((40,), _PROMPTS)
    with _open(settings, num_gpu_experts=8) as engine:
        for length in lengths:
            for attempt in ("first", "prompt"):
                try:
                    _prompt(engine, attempt, length, settings.expert_layers)
                except Exception as error:
                    tell(f"{attempt}_{length}", f"{type(error).__name__}: {error}"[:300], is_ok=False)


def _prompt(engine: Engine, attempt: str, length: int, num_layers: int) -> None:
    model, ids = engine.model, tokens(length, 500, length)
    before, start_s = dict(model.counters()), time.perf_counter()
    for first in range(0, length, model.max_batch_tokens):
        logits = model.forward(chunk(ids[first : first + model.max_batch_tokens], first))
    took_s = time.perf_counter() - start_s
    after = model.counters()
    streamed = after["streamed_experts"] - before["streamed_experts"]
    tell(f"{attempt}_{length}", length / took_s, "tokens/s of the slice", bool(np.isfinite(logits).all()), s=took_s,
         whole_estimated=length / (took_s / num_layers * _LAYERS), streamed=streamed,
         **{key: after[key] - before[key] for key in ("cpu_experts_s", "stream_s")})  # fmt: skip


def trace_tokens(settings: Settings) -> None:
    """Four tokens under torch's profiler: what GPU and CPU do at the same time, and a timeline to look at."""
    from kimi_lite.tools.trace.gpu import table, trace

    with _open(settings, num_gpu_experts=8) as engine:
        shares = trace(engine, 4, settings.out / "trace.json")
        for line in table(shares, 4)[2:]:
            name, milliseconds, share = (part.strip() for part in line.strip("|").split("|"))
            tell(name, milliseconds, "ms", share=share)
