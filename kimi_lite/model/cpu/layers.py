"""All layers of a model, ready to run on the CPU: their weights, the buffers they share, and the table of the batch.

`transformer` makes programs of their operations, `walk` runs them one at a time.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.rope import rope_attention_factor, rope_inverse_frequencies
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.hardware.host import usable_cores
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.cpu.attention import Attention, mla_shape
from kimi_lite.model.cpu.buffers import Buffers, num_pairs
from kimi_lite.model.cpu.moe import FeedForward
from kimi_lite.model.cpu.ops import LayerOp
from kimi_lite.model.cpu.weights import check_types, compile_kernels, matrix
from kimi_lite.native.cpu.attention import num_splits
from kimi_lite.native.cpu.attention_prefill import expanded_is_cheaper, prefill_scratch_bytes
from kimi_lite.native.cpu.experts import experts_scratch_bytes
from kimi_lite.native.cpu.linear import embed_op
from kimi_lite.native.cpu.run import Attending, RunTable
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.latent_rows import MlaShape

MAX_BATCH_TOKENS = 512  # rows of one forward pass; longer prompts come in chunks
MAX_ABSORBED_TOKENS = 64  # rows that attend in the absorbed form; longer slices are expanded


class Layers:
    """`run`: the table of the batch at hand, `prepare` fills it. One batch at a time."""

    def __init__(
        self,
        store: GGUFStore,
        config: ModelConfig,
        kv: KVCache,
        num_threads: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        """num_threads: default, one for each usable core. on_compile(kernels done, kernels in all). Raises
        KimiLiteError for a missing tensor, a type without a kernel or sizes the kernels cannot take."""
        check_types(store)
        check_sizes(config)
        compile_kernels(store, on_compile or (lambda done, total: None))
        self.config, self.kv, self.shape = config, kv, mla_shape(config)
        self.token_embd = matrix(store, "token_embd.weight")
        self.attention = [Attention(store, config, layer) for layer in range(config.num_layers)]
        self.feed_forward = [FeedForward(store, config, layer) for layer in range(config.num_layers)]
        self._inverse_frequencies = rope_inverse_frequencies(config)  # (rope / 2,)
        self._rope_factor = rope_attention_factor(config)
        kinds = _activation_kinds(config, self.attention, self.feed_forward)
        self.buffers = Buffers(config, self.shape, MAX_BATCH_TOKENS, MAX_ABSORBED_TOKENS, kinds)
        self.team = Team(num_threads or usable_cores().num_usable)
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
        return [*self.attention_ops(layer), *self.feed_forward[layer].ops(self.run, self.buffers)]

    def prepare(self, batch: Batch, expanded: Sequence[SequenceSlice]) -> None:
        """Tells the kernels about this batch: tokens, rotations, rows of the cache, and which of its sequences attend
        in the `expanded` form."""
        self.run.set_tokens(batch.token_ids)
        angles = batch.positions[:, None] * self._inverse_frequencies  # (T, rope / 2)
        cos, sin = np.cos(angles) * self._rope_factor, np.sin(angles) * self._rope_factor
        self.run.set_positions(batch.cache_rows(), cos.astype(np.float32), sin.astype(np.float32))
        chosen = {id(piece) for piece in expanded}
        absorbed = [piece for piece in batch.sequences if id(piece) not in chosen]
        rows = [
            Attending(row, 1, batch.positions[row], piece.pages)
            for piece in absorbed
            for row in range(piece.start, piece.start + piece.length)
        ]
        slices = [Attending(p.start, p.length, batch.positions[p.start], p.pages) for p in expanded]
        longest = int(batch.positions.max()) + 1
        self.run.set_attention(rows, slices, num_splits(len(rows), longest, self.config.num_heads))

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


def choose_expanded(sequences: Sequence[SequenceSlice], shape: MlaShape) -> list[SequenceSlice]:
    """The slices whose attention is expanded: those where it is cheaper, and the longest beyond what absorbed rows
    allow."""
    absorbed = sorted((p for p in sequences if not expanded_is_cheaper(p.length, shape)), key=lambda p: p.length)
    while sum(p.length for p in absorbed) > MAX_ABSORBED_TOKENS:
        absorbed.pop()
    kept = {id(p) for p in absorbed}
    return [p for p in sequences if id(p) not in kept]
