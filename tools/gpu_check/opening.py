"""Models for the stages: opened on the GPU, on the CPU path, or on the stand-in; batches without a scheduler."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5, slice_of
from kimi_lite.engine import loader
from kimi_lite.engine.engine import Engine
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.hybrid import load
from kimi_lite.native.latent_rows import PAGE_TOKENS
from kimi_lite.options import Options
from kimi_lite.tools.gpu_check.settings import Settings, tell


@contextmanager
def opened(path: Path, settings: Settings, device: str = "cuda", **options: object) -> Iterator[Engine]:
    """As `kimi-lite` opens it; without heat of other runs. Tells how long that took."""
    with ExitStack() as stack:
        if settings.is_stand_in:
            _stand_in(stack, device)
        start_s = time.perf_counter()
        chosen = Options(device=device, keeps_heat=False, vision="off", **options)
        engine = stack.enter_context(loader.load(path, chosen))
        slots = engine.plan.num_vram_slots
        tell("loaded", time.perf_counter() - start_s, "s", slots=slots, chunk=engine.plan.prompt_chunk_tokens)
        yield engine


def _stand_in(stack: ExitStack, device: str) -> None:
    """A CPU device called by a name that is not the CPU path's, as the tests have it; a checkout has them."""
    from tests.model.hybrid.stand_in import GPU, StandInKernels

    name = "cpu" if device == "cpu" else "cpu:0"
    stack.enter_context(patch.object(loader, "choose_device", lambda wanted: name))
    stack.enter_context(patch.object(loader, "find_gpu", lambda device: None if device == "cpu" else GPU))
    stack.enter_context(patch.object(load, "TritonKernels", StandInKernels))


def tiny_config() -> ModelConfig:
    """K2.5 in everything but size."""
    small = {"hidden_size": 256, "feed_forward_size": 256, "expert_feed_forward_size": 256, "num_experts_used": 2}
    heads = {"num_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
    return replace(slice_of(K2_5, 1, 2, 8, 1024), v_head_dim=32, **small, **heads)


def tiny_types(settings: Settings) -> dict[str, str]:
    """As a file of K2.5 in small; for the stand-in in types whose CPU kernels other tests have compiled."""
    return {"*": "F32"} if settings.is_stand_in else {"blk.*_exps": "TQ1_0"}


def tokens(count: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int32)


def chunk(ids: np.ndarray, start: int = 0, first_page: int = 0, is_generated: bool = False) -> Batch:
    """One sequence whose pages follow each other; logits of the last token, or of all that are generated."""
    num_pages = -(-(start + len(ids)) // PAGE_TOKENS)
    pages = np.arange(first_page, first_page + num_pages, dtype=np.int32)
    wants = np.full(len(ids), is_generated)
    wants[-1] = True
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    return Batch(ids.astype(np.int32), positions, wants, (SequenceSlice(0, len(ids), pages, is_generated),))


def step(ids: np.ndarray, positions: np.ndarray, pages_each: int) -> Batch:
    """One token of each of several sequences, each with pages of its own."""
    slices = tuple(
        SequenceSlice(i, 1, np.arange(i * pages_each, (i + 1) * pages_each, dtype=np.int32), is_generated=True)
        for i in range(len(ids))
    )
    return Batch(ids.astype(np.int32), positions.astype(np.int32), np.ones(len(ids), bool), slices)


def decoded(engine: Engine, ids: np.ndarray, start: int = 0) -> np.ndarray:
    """Logits (T, vocabulary) of tokens one after the other."""
    forward = engine.model.forward
    return np.concatenate([forward(chunk(ids[i : i + 1], start + i, is_generated=True)) for i in range(len(ids))])


def errors(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative distance of each row of logits, (T,)."""
    return np.linalg.norm(have - want, axis=1) / np.linalg.norm(want, axis=1)
