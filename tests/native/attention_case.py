"""Sequences with a paged latent cache, run through the attention kernels and through the numpy oracle."""

from collections.abc import Sequence
from copy import copy

import numpy as np

from kimi_lite.native import reference
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.attention import AttentionBuffers, attention_op
from kimi_lite.native.cpu.attention_prefill import prefill_attention_op, prefill_scratch_bytes
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.cpu.run import Attending, RunTable
from kimi_lite.native.latent_rows import PAGE_TOKENS, MlaShape
from kimi_lite.native.reference_types import dequantize
from kimi_lite.native.types.random_blocks import hostile_rows
from tests.native.harness import run_ops

SCALE = 0.21
_NAN = {"f32": np.nan, "f16": np.nan, "bf16": 0x7FC0, "q8": 0x7F}  # 0x7F7F is a NaN among float16


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> the stored form of a cache dtype: float32, float16, bfloat16 bits (uint16), to nearest even, or rows
    of q8."""
    if dtype == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if dtype == "q8":
        return reference.quantize_latents(values.astype(np.float32))
    return values.astype(np.float32 if dtype == "f32" else np.float16)


def stored_values(stored: np.ndarray) -> np.ndarray:
    if stored.dtype == np.uint8:
        return reference.dequantize_latents(stored)
    return (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored.astype(np.float32)


class Sequences:
    """`spans`: (first position, number of new tokens) of each sequence; their pages lie scattered in one storage."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        rng: np.random.Generator,
        shape: tuple[int, ...] = (5, 32, 16, 64, 32),
        types: tuple[str, str] = ("F32", "F32"),
        dtype: str = "f32",
    ) -> None:
        self.spans, self.shape, self.types, self.dtype = spans, MlaShape(*shape), types, dtype
        heads, nope, rope, kv_lora, value = shape
        self.k_b, self.v_b = (
            hostile_rows(types[0], heads * kv_lora, nope, rng),
            hostile_rows(types[1], heads * value, kv_lora, rng),
        )
        num_pages = [-(-(first + length) // PAGE_TOKENS) for first, length in spans]
        order = rng.permutation(sum(num_pages) + 2).astype(np.int32)
        self.pages = [order[sum(num_pages[:i]) :][:n].copy() for i, n in enumerate(num_pages)]
        self.storage = round_to(rng.standard_normal((len(order), PAGE_TOKENS, kv_lora + rope)), dtype)
        for pages, (first, length) in zip(
            self.pages, spans, strict=True
        ):  # what lies behind the last position is never read
            self.storage[pages[-1], (first + length - 1) % PAGE_TOKENS + 1 :] = _NAN[dtype]
        self.num_tokens = sum(length for _, length in spans)
        self.q = (rng.standard_normal((self.num_tokens, heads * (nope + rope))) / np.sqrt(nope)).astype(np.float32)
        self.positions = np.concatenate([np.arange(first, first + length) for first, length in spans])
        angles = self.positions[:, None] * rng.uniform(0, 1, rope // 2)
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def run(self, expanded: Sequence[int] = (), num_threads: int = 1, capacity: int = 64) -> np.ndarray:
        """float32 (T, H, V); the sequences in `expanded` attend in that form, the others absorbed, `capacity` tokens at
        once."""
        heads, nope, _, kv_lora, value = self.shape
        run = RunTable(self.num_tokens, num_threads, prefill_scratch_bytes(self.num_tokens, self.shape))
        run.set_tokens(np.zeros(self.num_tokens, np.int32))
        run.set_positions(np.zeros(self.num_tokens, np.int64), self.cos, self.sin)
        run.set_attention(*self._attending(expanded))
        kinds = tuple({activation_kind(name)} - {0} for name in self.types)
        buffers = AttentionBuffers(capacity, self.shape, *kinds)
        out = Activations(self.num_tokens, heads * value, set())
        q = self.q.copy()
        k_b, v_b = Matrix.of(self.k_b, self.types[0], nope), Matrix.of(self.v_b, self.types[1], kv_lora)
        arguments = (run, q, k_b, v_b, self.storage)
        absorbed = attention_op(*arguments, buffers, out, self.shape, SCALE, self.dtype)
        prefill = prefill_attention_op(*arguments, out, self.shape, SCALE, self.dtype)
        run_ops([absorbed, prefill], num_threads)
        return out.values.reshape(self.num_tokens, heads, value)

    def part(self, index: int) -> "Sequences":
        """One of the sequences by itself."""
        first = sum(length for _, length in self.spans[:index])
        return self._rows(first, first + self.spans[index][1], [self.spans[index]], [self.pages[index]])

    def chunk(self, start: int, end: int) -> "Sequences":
        """The new tokens `start .. end` of the only sequence; those before them are in the cache."""
        [(first, _)], [pages] = self.spans, self.pages
        num_pages = -(-(first + end) // PAGE_TOKENS)
        return self._rows(start, end, [(first + start, end - start)], [pages[:num_pages].copy()])

    def _rows(self, start: int, end: int, spans: Sequence[tuple[int, int]], pages: list[np.ndarray]) -> "Sequences":
        part = copy(self)
        part.spans, part.pages, part.num_tokens = spans, pages, end - start
        part.q, part.positions = self.q[start:end], self.positions[start:end]
        part.cos, part.sin = self.cos[start:end], self.sin[start:end]
        return part

    def expected(self, is_absorbed: bool) -> np.ndarray:
        """float64 (T, H, V) of all sequences in one form."""
        heads, nope, rope, kv_lora, value = self.shape
        q = self.q.reshape(self.num_tokens, heads, nope + rope).copy()
        q[..., nope:] = reference.rotate_pairs(q[..., nope:], self.cos[:, None], self.sin[:, None])
        k_b = dequantize(self.k_b, self.types[0]).reshape(heads, kv_lora, nope)
        v_b = dequantize(self.v_b, self.types[1]).reshape(heads, value, kv_lora)
        kinds, row, results = tuple(activation_kind(name) for name in self.types), 0, []
        for pages, (first, length) in zip(self.pages, self.spans, strict=True):
            latents = stored_values(self.storage[pages]).reshape(-1, kv_lora + rope)[: first + length]
            rows = slice(row, row + length)
            inputs = reference.LatentAttention(q[rows], latents, self.positions[rows], k_b, v_b, SCALE)
            form = reference.absorbed_attention(inputs, kinds) if is_absorbed else reference.expanded_attention(inputs)
            results.append(form)
            row += length
        return np.concatenate(results)

    def _attending(self, expanded: Sequence[int]) -> tuple[list[Attending], list[Attending]]:
        """The absorbed tokens and the expanded sequences."""
        absorbed_rows, expanded_rows, row = [], [], 0
        for i, (pages, (first, length)) in enumerate(zip(self.pages, self.spans, strict=True)):
            if i in expanded:
                expanded_rows.append(Attending(row, length, first, pages))
            else:
                absorbed_rows += [Attending(row + j, 1, first + j, pages) for j in range(length)]
            row += length
        return absorbed_rows, expanded_rows
