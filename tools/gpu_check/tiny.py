"""The hybrid path on a model of a few megabytes: what a GPU may get wrong besides arithmetic.

Graphs against plain calls and decoded hits against misses bit for bit, hundreds of steps while experts come and go,
forty shapes in a row, uploads that fail, memory that ends. Each is a process: one that breaks the GPU leaves the others
theirs.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np

from kimi_lite.engine.engine import Engine
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.costs import ExpertCosts
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.tools.gpu_check.opening import chunk, decoded, errors, opened, step, tiny_config, tiny_types, tokens
from kimi_lite.tools.gpu_check.settings import Settings, tell
from kimi_lite.tools.make.slice import make_slice

# Of logits: int8 activations of the CPU path next to float ones everywhere, and of a prompt's experts alone
_ROUNDED, _INT8 = 2**-4, 2**-5
_HANG_S = 20.0
_COUNTS = (1, 2, 4, 8, 16)  # tokens of a step


def make_tiny(settings: Settings, name: str) -> Path:
    """The stage's own file."""
    path = settings.scratch / f"{name}.gguf"
    make_slice(path, tiny_config(), tiny_types(settings), is_overwriting=True)
    return path


def graphs_are_plain_calls(settings: Settings) -> None:
    """A shape's first step runs as plain calls, the second is captured, later ones are replayed: the same bits."""
    with opened(make_tiny(settings, "graphs"), settings, num_gpu_experts=0, context_length=2048) as engine:
        for count in settings.sized((1, 3), (1, 3, 8, 16)):
            ids, places = tokens(count, 500, count), np.full(count, 5)
            found = [engine.model.forward(step(ids, places, 1)) for _ in range(5)]
            same = all(np.array_equal(found[0], other) for other in found[1:])
            tell(f"steps of {count}", "the same bits" if same else "differ", is_ok=same and np.isfinite(found[0]).all())


def hits_are_misses(settings: Settings) -> None:
    """All experts in VRAM, none, and the CPU path: decoded tokens have the same bits with slots and without, all else
    is the same within roundings."""
    path, ids, found = make_tiny(settings, "hits"), tokens(settings.sized(12, 64), 500), {}
    behind = len(ids) * 2 // 3  # a prompt
    for name, device, slots in (("cpu", "cpu", 0), ("no slots", "cuda", 0), ("all slots", "cuda", 16)):
        options = {} if device == "cpu" else {"num_gpu_experts": slots, "dense_type": "file"}
        with opened(path, settings, device, context_length=2048, **options) as engine:
            found[name] = decoded(engine, ids)
            engine.model.forward(chunk(ids[:behind]))
            found[f"{name}, prompt"] = decoded(engine, ids[behind:], behind)
            counters = engine.model.counters()
            tell(f"{name}: hits", counters.get("gpu_expert_hits", 0), misses=counters.get("gpu_expert_misses", 0))
    _tell_bits("all slots next to none", found["all slots"], found["no slots"])
    far = errors(found["all slots, prompt"], found["no slots, prompt"])
    is_ok = bool(np.median(far) < _INT8)
    tell("all slots, prompt next to none", float(np.median(far)), "median", is_ok, worst=float(far.max()))
    for name in ("no slots", "all slots"):
        for suffix in ("", ", prompt"):
            far = errors(found[name + suffix], found["cpu" + suffix])
            is_ok = bool(np.median(far) < _ROUNDED and np.isfinite(far).all())
            tell(f"{name}{suffix} next to the CPU path", float(np.median(far)), "median", is_ok, worst=float(far.max()))


def soak(settings: Settings) -> None:
    """Steps of 1 to 16 tokens while experts come and go at random, promotions are given up, prompts come between; the
    same steps without slots."""
    path, rng = make_tiny(settings, "soak"), np.random.default_rng(0)
    count = settings.sized(12, 300)
    steps = [(int(n), tokens(int(n), 500, i)) for i, n in enumerate(rng.choice([1, 1, 1, 2, 5, 16], count))]
    found = []
    for slots in (0, 6):
        with opened(path, settings, num_gpu_experts=slots, context_length=2048) as engine:
            logits, start_s = [], time.perf_counter()
            for i, (size, ids) in enumerate(steps):
                if i % 50 == 10:
                    engine.model.forward(chunk(tokens(settings.sized(40, 200), 500, i), first_page=16))
                logits.append(engine.model.forward(step(ids, np.full(size, i % 60), 1)))
                if slots and rng.random() < 0.1:
                    engine.model.experts.slots.cancel()
            found.append(np.concatenate(logits))
            counters = engine.model.counters()
            tell(f"{slots} slots", count / (time.perf_counter() - start_s), "steps/s",
                 promotions=counters["expert_promotions"], hits=counters["gpu_expert_hits"])  # fmt: skip
    _tell_bits("with slots next to without", found[1], found[0])


def _tell_bits(name: str, have: np.ndarray, want: np.ndarray) -> None:
    """Logits (T, vocabulary) of decoded tokens: an expert gives the same bits in VRAM and on the CPU."""
    is_same = np.array_equal(have, want)
    tell(name, "the same bits" if is_same else "differ", is_ok=is_same, worst=float(errors(have, want).max()))


def many_shapes(settings: Settings) -> None:
    """Forty shapes in a row, again and again: more than torch has streams, and more than are kept.

    Every position has one token, so that after as many rounds as there are layers nothing in the cache changes any
    more: the last two rounds must give the same bits.
    """
    pages = settings.sized((1, 20), (1, 20, 40, 70, 140, 260, 520, 1030))
    path, length = make_tiny(settings, "shapes"), PAGE_TOKENS * pages[-1]
    ids, shapes = (
        tokens(length, 500),
        [(PAGE_TOKENS * n, count) for count in settings.sized((1, 4), _COUNTS) for n in pages],
    )
    with opened(path, settings, num_gpu_experts=16, context_length=length) as engine:
        num_rounds = engine.model.config.num_layers + 2
        rounds = [[_three_times(engine, ids, *shape) for shape in shapes] for _ in range(num_rounds)]
    same = [np.array_equal(a, b) for a, b in zip(*rounds[-2:], strict=True)]
    far = max(float(errors(a, b).max()) for a, b in zip(*rounds[-2:], strict=True))
    tell("shapes", len(same), f"in {len(rounds)} rounds", is_ok=all(same), same_bits=sum(same), worst=far)


def _three_times(engine: Engine, ids: np.ndarray, end: int, count: int) -> np.ndarray:
    """Logits of the last `count` positions before `end`: plain calls, captured, replayed."""
    batch = chunk(ids[end - count : end], end - count, is_generated=True)
    return [engine.model.forward(batch) for _ in range(3)][-1]


def failing_copies(settings: Settings) -> None:
    """An expert that cannot be read and a copy that the GPU refuses: an error soon, and afterwards the same logits."""
    with ExitStack() as stack:
        path = make_tiny(settings, "copies")
        engine = stack.enter_context(opened(path, settings, num_gpu_experts=4, context_length=2048))
        model, ids = engine.model, tokens(settings.sized(60, 200), 500)
        want = model.forward(chunk(ids))
        stack.enter_context(patch.object(ExpertCosts, "split", lambda costs, counts, *others: len(counts)))
        streamed = model.forward(chunk(ids))  # all of them
        count, far = model.counters()["streamed_experts"], float(errors(streamed, want)[0])
        tell("streamed", far, "of the logits", count > 0 and far < _ROUNDED, experts=count)
        reads = OSError(5, "Input/output error")
        reader = model.experts.store._reader
        _expect_error("a read that fails", lambda: model.forward(chunk(ids)), reader, "read", reads)
        far = float(errors(model.forward(chunk(ids)), streamed)[0])
        tell("after it", far, "of the logits", far < _ROUNDED)
        refused = RuntimeError("CUDA error: an injected fault")
        _expect_error("a copy that fails", lambda: model.forward(chunk(ids)), model._streams, "copy", refused)


def _expect_error(name: str, run: Callable[[], object], owner: object, method: str, error: Exception) -> None:
    """`run` must end with an error while `owner.method` raises this one; told with the time that took."""
    found: list[object] = []

    def attempt() -> None:
        try:
            found.append(run())
        except Exception as problem:  # a KimiLiteError is a sentence for the user, others are not
            found.append(problem)

    start_s = time.perf_counter()
    with patch.object(type(owner), method, side_effect=error):
        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(_HANG_S)
    took_s = time.perf_counter() - start_s
    if thread.is_alive():
        tell(name, f"hangs for {_HANG_S:.0f} s", is_ok=False)
    else:
        is_sentence = isinstance(found[0], KimiLiteError)
        words = f"{type(found[0]).__name__}: {found[0]}" if isinstance(found[0], Exception) else "no error"
        tell(name, words.splitlines()[0][:200], is_ok=is_sentence, s=took_s)


def out_of_memory(settings: Settings) -> None:
    """Another program takes the GPU's memory: a sentence, and once it is free again the same logits."""
    import torch

    with opened(make_tiny(settings, "memory"), settings, num_gpu_experts=0, context_length=16384) as engine:
        if settings.is_stand_in:
            tell("memory", "not tried without a GPU")
            return
        ids = tokens(8192, 500)
        want = engine.model.forward(chunk(ids[:4096]))
        engine.model.drop_steps()
        hogs = []
        for size in (1 << 30, 64 << 20, 4 << 20):
            try:
                while True:
                    hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                continue
        try:
            engine.model.forward(chunk(ids))
            tell("a prompt without memory", "it fitted")
        except KimiLiteError as error:
            tell("a prompt without memory", str(error).splitlines()[0][:200])
        except Exception as error:
            tell("a prompt without memory", f"{type(error).__name__}: {error}"[:200], is_ok=False)
        hogs.clear()
        torch.cuda.empty_cache()
        far = float(errors(engine.model.forward(chunk(ids[:4096])), want)[0])
        tell("afterwards", far, "of the logits", is_ok=far < _ROUNDED)
