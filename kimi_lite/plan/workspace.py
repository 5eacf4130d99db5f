"""Memory that is not weights: activations, scratch, buffers for streaming, the program itself. Bounds, by the sizes of
a model.

The CPU's sums follow `model.cpu.buffers`, `native.cpu.attention` and `native.cpu.run` array by array; a test compares
the whole with what a loaded model really takes.
"""

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.moonvit import MoonViT
from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.experts.memory import BLOCK_BYTES, MIN_PIECES, NUM_STAGINGS, RING_BYTES
from kimi_lite.hardware.machine import CUDA_BYTES, Gpu
from kimi_lite.kv.host import fitting_pages
from kimi_lite.native.gpu.pieces import DECODED_WEIGHTS
from kimi_lite.native.turn_cells import MAX_TOKENS
from kimi_lite.units import MIB

STEP_TOKENS = 512  # of one forward pass on the CPU
PROMPT_CHUNKS = (8192, 4096, 2048, 1024, 512)  # of one pass on a GPU, tried in turn
DECODE_SHAPES = 6  # of steps (rows, pages) whose graphs and inputs are kept
STREAM_EXPERTS = 8  # experts of one transfer; two transfers are under way
_ABSORBED_TOKENS, _LOGITS_ROWS, _ATTENTION_TASKS = 64, 64, 64
_PACK_BYTES = 5120  # 16 tokens, 256 columns
_PROGRAM_BYTES = 155 * MIB  # Python, Numba and LLVM with kernels from the cache; compiling takes 75 MiB more (measured)
_KERNEL_BYTES = MIB  # compiled code of a type of weights
_VOCABULARY_ENTRY_BYTES, _EXPERT_RECORD_BYTES = 730, 900  # a token; an expert's line in the tables, its views in RAM
EXPANDED_BYTES = 512 * MIB  # keys and values of expanded attention that exist at a time on a GPU
WORK_SHARE = 0.35  # of what is left on the GPU, for a prompt's chunk; the rest becomes slots
LOADING_BYTES = 64 * MIB  # of pinned memory, through which dense weights come
ROW_TOKENS = 512  # of a batch whose every choice has a row on the host: 117 MB for Kimi K2.5
SENT_ROWS = 512  # of the CPU's products in a prompt, that cross the bus together
_GPU_SLACK_BYTES, _GPU_SHARE = 188 * MIB, 0.02  # small things; what allocation leaves between pieces
_DISPLAY_BYTES = 1024 * MIB  # a browser and another window, opened while the model is loaded
_SPILL_SHARES = 0.002, 0.05  # of the RAM that is left, for pages of a GPU's cache: where experts lack RAM, else


def program_bytes(sizes: ModelSizes) -> int:
    """Interpreter, compiled kernels, vocabulary and the tables of the experts."""
    config = sizes.config
    records = config.vocab_size * _VOCABULARY_ENTRY_BYTES + sizes.num_experts * _EXPERT_RECORD_BYTES
    return _PROGRAM_BYTES + len(sizes.bytes_by_type) * _KERNEL_BYTES + records


def cpu_work_bytes(config: ModelConfig, num_threads: int) -> int:
    """Everything a prompt of a whole step touches on the CPU."""
    c, tokens, heads = config, STEP_TOKENS, config.num_heads
    layer = (
        4 * tokens * c.hidden_size
        + _activations(tokens, c.hidden_size, 2)
        + _activations(tokens, c.q_lora_rank)
        + 4 * tokens * (heads * c.qk_head_dim + c.kv_latent_size)
        + _activations(tokens, heads * c.v_head_dim)
        + tokens * (8 * c.num_experts + 16 * c.num_experts_used)
    )
    absorbed_rows = _ABSORBED_TOKENS * heads
    attention = (
        _activations(absorbed_rows, c.qk_nope_head_dim)
        + 4 * absorbed_rows * c.kv_latent_size
        + 4 * absorbed_rows * -(-_ATTENTION_TASKS // -(-heads // 8)) * (c.kv_lora_rank + 16)
        + _activations(absorbed_rows, c.kv_lora_rank)
    )
    hidden = _activations(tokens, c.feed_forward_size) if c.num_dense_layers else 0
    if c.num_experts:
        slots = tokens * (c.num_experts_used + max(1, c.num_shared_experts))
        hidden += _activations(slots, c.expert_feed_forward_size)
    head = _activations(_LOGITS_ROWS, c.hidden_size) + 4 * _LOGITS_ROWS * (c.hidden_size + c.vocab_size)
    threads = num_threads * (_thread_scratch_bytes(c) + _panel_bytes(c.hidden_size, _LOGITS_ROWS))
    return int(layer + attention + hidden + head + threads + tile_pack_bytes(c))


def tile_pack_bytes(c: ModelConfig) -> int:
    """The tokens of an operation once more, by 16, for matrix tiles, on CPUs that have them (native.cpu.packing): every
    expert begins a pack of its own."""
    widest = max(c.hidden_size, c.feed_forward_size, c.num_heads * c.v_head_dim)
    num_bytes = -(-STEP_TOKENS // 16) * -(-widest // 256) * _PACK_BYTES
    if c.num_experts:
        pairs = STEP_TOKENS * (c.num_experts_used + max(1, c.num_shared_experts))
        packs = pairs // 16 + 1 + min(pairs, c.num_experts + max(1, c.num_shared_experts))
        num_bytes = max(num_bytes, packs * -(-max(c.hidden_size, c.expert_feed_forward_size) // 256) * _PACK_BYTES)
    return num_bytes + 1024


def _activations(rows: int, width: int, num_kinds: int = 1) -> float:
    """float32 rows and, for each int8 form, codes, scales and sums (native.cpu.activations)."""
    return rows * width * (4 + 1.5 * num_kinds)


def _thread_scratch_bytes(c: ModelConfig) -> int:
    """Of expanded attention, or of a panel of weights with its results."""
    widest = max(c.hidden_size, c.feed_forward_size, c.num_heads * c.v_head_dim)
    nope, value, latent = c.qk_nope_head_dim, c.v_head_dim, c.kv_latent_size
    page = 64 * (2 * latent + nope + value)
    prefill = 4 * (c.kv_lora_rank * 2 * (nope + value) + page + (STEP_TOKENS + 4) * (value + 2))
    return int(max(prefill, _panel_bytes(widest, STEP_TOKENS))) + 64 * 1024


def _panel_bytes(width: int, num_tokens: int) -> int:
    """64 rows of weights as matrix tiles take them (native.cpu.tile_panel), and their results."""
    return 48 * 1024 + -(-width // 256) * 4 * 9344 + 512 * num_tokens


def gpu_work_bytes(sizes: ModelSizes, chunk_tokens: int, context_length: int) -> int:
    """On the GPU: the activations of a chunk, which attends to all of the context in the expanded form and then has one
    row for every chosen expert; a matrix that is decoded for its product; two groups of streamed experts."""
    c = sizes.config
    choices = c.num_experts_used * (4 * c.hidden_size + 6 * c.expert_feed_forward_size)
    attention = c.num_heads * (8 * c.qk_head_dim + 2 * c.v_head_dim) + 4 * c.kv_latent_size  # queries twice, heads
    dense = 10 * c.feed_forward_size if c.num_dense_layers else 0  # gate and up in float32, their product in bfloat16
    expanded = _expanded_bytes(c, context_length)
    phases = max(chunk_tokens * attention + expanded, chunk_tokens * max(choices, dense))
    pieces = 2 * DECODED_WEIGHTS + 4 * _LOGITS_ROWS * c.vocab_size + stream_bytes(sizes)
    return chunk_tokens * 10 * c.hidden_size + phases + pieces


def _expanded_bytes(c: ModelConfig, num_positions: int) -> int:
    """Keys and values of some heads at a time, values as wide as keys, and the latents that they are made of."""
    head_bytes = 2 * num_positions * 2 * c.qk_head_dim
    heads_bytes = min(c.num_heads * head_bytes, max(EXPANDED_BYTES, head_bytes))
    return heads_bytes + (2 + 4) * num_positions * c.kv_latent_size


def vision_work_bytes(tower: MoonViT, is_on_gpu: bool) -> int:
    """While an image of the most patches is read: residual stream, queries, keys and values in float32 (on a GPU before
    and behind the turn, and in bfloat16), a chunk's feed-forward network, features."""
    t, patches = tower, tower.max_patches
    chunk, head_dim = min(patches, 4096 if is_on_gpu else 1152), -(-t.head_dim // 16) * 16
    if is_on_gpu:
        patch = 36 * t.hidden + 12 * 3 * t.patch**2
    else:
        patch = 8 * t.hidden + 12 * t.heads * head_dim + 8 * head_dim + 3 * t.patch**2
    features = patches // t.merge**2 * (8 * t.text_hidden + 12 * t.merged * is_on_gpu)
    chunk_bytes = chunk * (12 * t.feed_forward + 24 * t.hidden + 12 * t.patch**2)
    return int(patches * patch + chunk_bytes + features)


def stream_bytes(sizes: ModelSizes) -> int:
    """Two groups of experts on their way: on the GPU, and pinned in memory."""
    return 2 * STREAM_EXPERTS * sizes.slot_bytes


def ram_slot_bytes(sizes: ModelSizes) -> int:
    """Of an expert of the middle size in RAM: each of its matrices in whole blocks of the disk, which it may begin and
    end within."""
    return sizes.expert_bytes // sizes.num_experts + 3 * 2 * BLOCK_BYTES


def pinned_bytes(sizes: ModelSizes, chunk_tokens: int) -> int:
    """Memory that the GPU reads by itself: the ring of a prompt's stream, promotions, weights while they load,
    activations for the CPU and its rows; logits, inputs of captured steps."""
    c = sizes.config
    rows = min(ROW_TOKENS, chunk_tokens) * c.num_experts_used * c.hidden_size
    blocks = [
        max(RING_BYTES, MIN_PIECES * sizes.slot_bytes // 2) + BLOCK_BYTES,  # a piece: a matrix, at most half an expert
        *([sizes.slot_bytes] * NUM_STAGINGS),
        LOADING_BYTES,
        4 * chunk_tokens * c.hidden_size,
        4 * chunk_tokens * c.num_experts_used,
        4 * rows,
        *([4 * SENT_ROWS * c.hidden_size] * 2),
        4 * MAX_TOKENS * c.vocab_size,
        *([4 * MAX_TOKENS * 2 * c.hidden_size] * DECODE_SHAPES),  # x, and page tables of at most as many words
    ]
    return sum(map(pinned_block_bytes, blocks))


def pinned_block_bytes(num_bytes: int) -> int:
    """What pinning so many bytes in one piece takes: torch rounds up to powers of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def num_spill_pages(num_cache_pages: int, page_bytes: int, left_bytes: int, expert_bytes: int) -> int:
    """Pages in RAM behind a GPU's cache; `left_bytes`: RAM for them and for `expert_bytes` of experts."""
    least, most = (share * max(0, left_bytes) for share in _SPILL_SHARES)
    may_bytes = int(min(most, max(least, left_bytes - expert_bytes)))
    return min(num_cache_pages, fitting_pages(may_bytes, page_bytes))


def gpu_margin_bytes(gpu: Gpu) -> int:
    """Of VRAM that no row names; more where a desktop draws with the same GPU."""
    display_bytes = _DISPLAY_BYTES if gpu.has_display else 0
    return int(CUDA_BYTES + _GPU_SLACK_BYTES + display_bytes + _GPU_SHARE * gpu.vram_total_bytes)


def ram_margin_bytes(ram_total_bytes: int) -> int:
    """Left to the system, so that a little more elsewhere does not push weights out."""
    return int(min(1024 * MIB, 0.03 * ram_total_bytes))
