"""All layers of a model, ready to run on the CPU: their weights, the buffers they share, and the table of the batch.

`transformer` makes programs of their operations, `walk` runs them one at a time.
"""

from collections.abc import Callable

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.rope import rope_attention_factor, rope_inverse_frequencies
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import usable_cores
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, Features
from kimi_lite.model.cpu.attention import Attention, mla_shape
from kimi_lite.model.cpu.buffers import Buffers, num_pairs
from kimi_lite.model.cpu.kernels import Needs, compile_kernels
from kimi_lite.model.cpu.moe import FeedForward
from kimi_lite.model.cpu.ops import LayerOp
from kimi_lite.model.cpu.weights import check_types, matrix
from kimi_lite.native.cpu.attention_prefill import prefill_scratch_bytes
from kimi_lite.native.cpu.experts import experts_scratch_bytes
from kimi_lite.native.cpu.linear import embed_op
from kimi_lite.native.cpu.placement import place_threads
from kimi_lite.native.cpu.run import Attending, RunTable
from kimi_lite.native.cpu.threads import Team

MAX_BATCH_TOKENS = 512  # rows of one forward pass; longer prompts come in chunks
MAX_ABSORBED_TOKENS = 64  # rows that attend in the absorbed form at once; more take turns
# Tokens of prompts below this position attend in the expanded form, all others absorbed. Expanded saves up to half of
# the work, but only where many new tokens share the keys and values that are made of all that came before: from here on
# a short message after a long conversation would cost more than it can save.
EXPANDED_POSITIONS = 2048


class Layers:
    """`run`: the table of the batch at hand, `prepare` fills it. One batch at a time."""

    def __init__(
        self,
        store: GGUFStore,
        config: ModelConfig,
        kv: KVCache,
        num_threads: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
        num_deferred: int = 0,
        team: Team | None = None,
        is_divided: bool = False,
    ) -> None:
        """num_threads: default, one for each usable core. team: another model's threads, while that one rests.
        is_divided: threads are kept to memory nodes, where there are several.
        on_compile(kernels done, kernels in all). num_deferred: experts of a generated token that are added one layer
        later. Raises KimiLiteError for a missing tensor, a type without a kernel or sizes the kernels cannot take."""
        check_types(store)
        check_sizes(config)
        check_deferral(config, num_deferred)
        compile_kernels(Needs.of(store, config, kv.dtype), on_compile or (lambda done, total: None))
        self.config, self.kv, self.shape = config, kv, mla_shape(config)
        self.token_embd = matrix(store, "token_embd.weight")
        self.attention = [Attention(store, config, layer) for layer in range(config.num_layers)]
        self.feed_forward = [FeedForward(store, config, layer) for layer in range(config.num_layers)]
        self._inverse_frequencies = rope_inverse_frequencies(config)  # (rope / 2,)
        self._rope_factor = rope_attention_factor(config)
        self._features: Features | None = None
        kinds = _activation_kinds(config, self.attention, self.feed_forward)
        self.num_deferred = num_deferred
        self.buffers = Buffers(
            config, self.shape, MAX_BATCH_TOKENS, MAX_ABSORBED_TOKENS, kinds, has_deferral=num_deferred > 0
        )
        num_threads = num_threads or usable_cores().num_usable
        self.team = team or Team(num_threads, place_threads(num_threads) if is_divided else ())
        pairs = num_pairs(config, MAX_BATCH_TOKENS)
        self.run = RunTable(MAX_BATCH_TOKENS, self.team.num_threads, self._scratch_bytes(), pairs)

    def _scratch_bytes(self) -> int:
        """Of a thread, for any operation."""
        c = self.config
        width = max(experts.width for layer in self.feed_forward for experts in layer.experts)
        widest = max(width, c.hidden_size, c.num_heads * c.v_head_dim, c.q_lora_rank)
        experts = experts_scratch_bytes(c.hidden_size, widest, MAX_BATCH_TOKENS)
        return max(prefill_scratch_bytes(MAX_BATCH_TOKENS, self.shape), experts)

    def embedding_ops(self) -> list[LayerOp]:
        """x = the embeddings of the batch's tokens."""
        return [LayerOp("token_embd", embed_op(self.run, self.token_embd, self.buffers.x))]

    def attention_ops(self, layer: int) -> list[LayerOp]:
        storage = self.kv.storage[layer]
        return self.attention[layer].ops(self.run, self.buffers, storage, self.kv.dtype)

    def ops(self, layer: int) -> list[LayerOp]:
        """The whole layer."""
        feed_forward = self.feed_forward[layer]
        if not self.num_deferred or feed_forward.is_dense:
            return [*self.attention_ops(layer), *feed_forward.ops(self.run, self.buffers)]
        is_last = layer == self.config.num_layers - 1  # what it left would never be added
        before = self.feed_forward[layer - 1] if layer > self.config.num_dense_layers else None
        num_deferred = 0 if is_last else self.num_deferred
        return [*self.attention_ops(layer), *feed_forward.deferring_ops(self.run, self.buffers, num_deferred, before)]

    def chosen(self, layer: int, num_tokens: int) -> np.ndarray:
        """int32 (T, K): what the router of this layer, which ran last, chose."""
        router = self.buffers.deferral[layer % 2].router if self.num_deferred else self.buffers.router
        return router.ids[:num_tokens]

    def prepare(self, batch: Batch, expanded_until: int = EXPANDED_POSITIONS) -> None:
        """Tells the kernels about this batch: tokens, rotations, rows of the cache, and which form each row attends
        in: expanded where it belongs to a prompt and its position is below `expanded_until`."""
        self.run.set_tokens(batch.token_ids, batch.num_generated)
        self._features = batch.features
        angles = batch.positions[:, None] * self._inverse_frequencies  # (T, rope / 2)
        cos, sin = np.cos(angles) * self._rope_factor, np.sin(angles) * self._rope_factor
        self.run.set_positions(batch.cache_rows(), cos.astype(np.float32), sin.astype(np.float32))
        absorbed, expanded = [], []
        for piece in batch.sequences:
            first = int(batch.positions[piece.start])
            num_expanded = 0 if piece.is_generated else min(piece.length, max(0, expanded_until - first))
            if num_expanded:
                expanded.append(Attending(piece.start, num_expanded, first, piece.pages))
            absorbed += [
                Attending(piece.start + i, 1, first + i, piece.pages) for i in range(num_expanded, piece.length)
            ]
        self.run.set_attention(absorbed, expanded)

    def place_features(self) -> None:
        """After the embedding: the batch's features take the place of what their rows' tokens embed to."""
        if self._features:
            self.buffers.x[self._features.rows] = self._features.values

    def close(self) -> None:
        """Ends the threads."""
        self.team.close()


def check_sizes(config: ModelConfig) -> None:
    """Raise KimiLiteError where a size does not divide into the kernels' vectors. All models of the family do."""
    multiples = {
        "embedding_length": (config.hidden_size, 32),
        "attention.q_lora_rank": (config.q_lora_rank, 32),
        "attention.kv_lora_rank": (config.kv_lora_rank, 32),
        "the part of a key without rotation": (config.qk_nope_head_dim, 32),
        "rope.dimension_count": (config.qk_rope_head_dim, 16),
        "attention.value_length_mla": (config.v_head_dim, 32),
        "feed_forward_length": (config.feed_forward_size if config.num_dense_layers else 0, 32),
        "expert_feed_forward_length": (config.expert_feed_forward_size if config.num_experts else 0, 32),
    }
    for name, (size, multiple) in multiples.items():
        if size % multiple:
            raise KimiLiteError(
                f"{name} is {size}; the kernels need a multiple of {multiple}.", "This model cannot run here."
            )


def check_deferral(config: ModelConfig, num_deferred: int) -> None:
    """Raise KimiLiteError where a token would be left without an expert of its layer."""
    if num_deferred and config.num_experts and num_deferred >= config.num_experts_used:
        raise KimiLiteError(
            f"--defer-experts is {num_deferred}; a token has {config.num_experts_used} routed experts a layer.",
            f"Give at most {config.num_experts_used - 1}; 0 defers none.",
        )


def _activation_kinds(config: ModelConfig, attention: list[Attention], feed_forward: list[FeedForward]) -> dict:
    """Which int8 forms each shared buffer needs, over all layers."""
    kinds: dict = {
        "normed": set().union(*(a.input_kinds() for a in attention), *(f.input_kinds() for f in feed_forward)),
        "q_compressed": {a.attn_q_b.kind for a in attention} - {0} if config.q_lora_rank else set(),
        "k_b": {a.attn_k_b.kind for a in attention} - {0},
        "v_b": {a.attn_v_b.kind for a in attention} - {0},
        "heads": {a.attn_output.kind for a in attention} - {0},
    }
    for experts in (experts for layer in feed_forward for experts in layer.experts):
        kinds.setdefault(("hidden", experts.width), set()).update(experts.hidden_kinds)
    return kinds
