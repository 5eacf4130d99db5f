"""A model as the planner sees it: how many bytes lie in which group of tensors, and nothing about where they are
stored.

Made from the tensors of a file, or from a configuration and a choice of types before there is any file:

    sizes = store_sizes(store, config)
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from kimi_lite.arch.architecture import Row, find_row, layer_of
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.tensors import is_tied
from kimi_lite.native.layouts import BY_NAME, Layout

if TYPE_CHECKING:
    from kimi_lite.gguf.store import GGUFStore

DENSE_TYPES = ("q8_0", "bf16", "file")  # of what is dense, on a GPU
GATE_UP = "ffn_gate_up_exps.weight"  # two matrices of each expert in one tensor
_SLOT_ALIGNMENT = 256  # bytes
_NAMED_SHARE = 0.1
Tensor = tuple[str, tuple[int, ...], Layout]  # name, shape (the last axis is the row), type


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes by group. `label` names the types for a reader, as "TQ1_0 experts, Q8_0 rest"."""

    config: ModelConfig
    label: str
    embedding_bytes: int  # looked up, one row a token
    dense_bytes: int  # read for every token: attention, dense layers, shared experts, routers, norms, head
    gpu_dense_bytes: int  # the same on a GPU: Q8_0 whatever the file holds, head-wise products in bfloat16
    gpu_bf16_bytes: int  # all of it there in bfloat16
    gpu_file_bytes: int  # as in the file, head-wise products in float32
    expert_bytes: int  # all routed experts of all layers
    slot_bytes: int  # of the largest routed expert, its matrices aligned: what a place for one takes
    converted_bytes: int = 0  # copies that loading makes: keys and values of files with a joint attn_kv_b
    vision_bytes: int = 0
    bytes_by_type: tuple[tuple[str, int], ...] = ()  # largest first, without vision

    @property
    def total_bytes(self) -> int:
        return self.embedding_bytes + self.dense_bytes + self.expert_bytes + self.vision_bytes

    def with_dense_type(self, kind: str) -> "ModelSizes":
        """Where the user asks for another type on the GPU than Q8_0."""
        sizes = dict(zip(DENSE_TYPES, (self.gpu_dense_bytes, self.gpu_bf16_bytes, self.gpu_file_bytes), strict=True))
        return replace(self, gpu_dense_bytes=sizes[kind])

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return self.config.num_moe_layers * self.config.num_experts

    @property
    def expert_bits(self) -> float:
        """Of a weight of the routed experts; 0 where there are none."""
        weights = self.num_experts * self.config.expert_parameters
        return 8 * self.expert_bytes / weights if weights else 0.0

    @property
    def embedding_row_bytes(self) -> float:
        return self.embedding_bytes / self.config.vocab_size

    @property
    def shared_expert_bytes(self) -> float:
        """The part of `gpu_dense_bytes` of the shared experts, at the mean size of a weight."""
        config = self.config
        dense = config.other_parameters - config.table.num_weights(config, "embedding")
        return self.gpu_dense_bytes * config.shared_parameters / dense


def sizes_of(config: ModelConfig, tensors: Iterable[Tensor], vision_bytes: int = 0) -> ModelSizes:
    """Sums the tensors of a file, or of a file to be. An embedding that is the head too is read whole, for every
    token."""
    tensors = list(tensors)
    has_head = not is_tied([name for name, _, _ in tensors])
    embedding, dense, routed, converted, on_gpu = 0, 0, 0, 0, Counter[str]()
    slot, by_type, experts_by_type = Counter[int](), Counter[str](), Counter[str]()
    for name, shape, layout in tensors:
        num_bytes = prod(shape[:-1]) * layout.row_bytes(shape[-1])
        by_type[layout.name] += num_bytes
        row = find_row(name)
        if row and row.part == "embedding" and has_head:
            embedding += num_bytes
        elif row and row.part == "routed":
            routed += num_bytes
            experts_by_type[layout.name] += num_bytes
            num_matrices = shape[0] * (2 if row.name == GATE_UP else 1)
            slot[layer_of(name)] += num_matrices // shape[0] * slot_aligned(num_bytes // num_matrices)
        else:
            dense += num_bytes
            on_gpu += {kind: _gpu_bytes(kind, row, shape, num_bytes) for kind in DENSE_TYPES}
            converted += _converted_bytes(config, row, layout)
    label = _label(by_type, experts_by_type)
    largest = max(slot.values(), default=0)
    types = tuple(by_type.most_common())
    gpus = (on_gpu[kind] for kind in DENSE_TYPES)
    return ModelSizes(config, label, embedding, dense, *gpus, routed, largest, converted, vision_bytes, types)


def slot_aligned(num_bytes: int) -> int:
    """Where the next matrix begins in a slot in VRAM."""
    return -(-num_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


def store_sizes(store: "GGUFStore", config: ModelConfig, vision_bytes: int = 0) -> ModelSizes:
    """Of an open file."""
    tensors = ((tensor.name, tensor.shape, tensor.layout) for tensor in store.tensors.values())
    return sizes_of(config, tensors, vision_bytes)


def _gpu_bytes(kind: str, row: Row | None, shape: tuple[int, ...], file_bytes: int) -> int:
    """As `model.hybrid.weights` puts a dense tensor on the GPU."""
    if len(shape) < 2 or (row and row.is_exact):
        return file_bytes
    if row and row.cut in ("keys", "values", "keys and values"):  # multiplied head by head
        return prod(shape) * (4 if kind == "file" else 2)
    if kind == "file":
        return file_bytes
    is_q8_0 = kind == "q8_0" and shape[-1] % BY_NAME["Q8_0"].block_size == 0
    return prod(shape[:-1]) * BY_NAME["Q8_0" if is_q8_0 else "BF16"].row_bytes(shape[-1])


def _converted_bytes(config: ModelConfig, row: Row | None, layout: Layout) -> int:
    """A joint `attn_kv_b` is cut when it is loaded: keys transposed into F16, values as they are."""
    if not (row and row.cut == "keys and values"):
        return 0
    keys = config.num_heads * config.kv_lora_rank * config.qk_nope_head_dim * (4 if layout.name == "F32" else 2)
    return keys + config.num_heads * config.v_head_dim * layout.row_bytes(config.kv_lora_rank)


def _label(by_type: Counter[str], experts_by_type: Counter[str]) -> str:
    """The types of the experts and of the rest, by bytes; types of less than a tenth are left out."""
    names = []
    for types, what in ((experts_by_type, "experts"), (by_type - experts_by_type, "rest")):
        main = [name for name, size in types.most_common() if size > _NAMED_SHARE * types.total()]
        names += [f"{'+'.join(main)} {what}"] if main else []
    return ", ".join(names)
