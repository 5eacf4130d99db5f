"""A model as the planner sees it: how many bytes lie in which group of tensors, and nothing about where they are
stored.

Made from the tensors of a file, or from a configuration and a choice of types before there is any file:

    sizes = store_sizes(store, config)
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from kimi_lite.arch.architecture import Row, find_row, layer_of
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.dense import F32, dense_layout
from kimi_lite.arch.moonvit import MoonViT
from kimi_lite.arch.tensors import is_tied
from kimi_lite.native.layouts import Layout
from kimi_lite.options import DENSE_TYPES, FITTING

if TYPE_CHECKING:
    from kimi_lite.gguf.store import GGUFStore

GATE_UP = "ffn_gate_up_exps.weight"  # two matrices of each expert in one tensor
_SLOT_ALIGNMENT = 256  # bytes
_NAMED_SHARE = 0.1
Tensor = tuple[str, tuple[int, ...], Layout]  # name, shape (the last axis is the row), type


_JOINED = {"ffn_gate.": "ffn_up.", "ffn_up.": "ffn_gate.", "ffn_gate_shexp.": "ffn_up_shexp."} | {
    "ffn_up_shexp.": "ffn_gate_shexp."
}  # dense matrices of the same inputs, which a GPU multiplies as one


class DenseSize(NamedTuple):
    """What every token uses, on a GPU in one of `arch.dense`'s types."""

    layer_bytes: tuple[int, ...]  # of each layer
    other_bytes: int  # head and last norm
    bytes_by_type: tuple[tuple[str, int], ...]  # largest first

    @property
    def num_bytes(self) -> int:
        return sum(self.layer_bytes) + self.other_bytes


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes by group. `label` names the types for a reader, as "TQ1_0 experts, Q8_0 rest"."""

    config: ModelConfig
    label: str
    embedding_bytes: int  # looked up, one row a token
    dense_bytes: int  # read for every token: attention, dense layers, shared experts, routers, norms, head
    gpu: Mapping[str, DenseSize]  # the same on a GPU, by the type that is asked for (arch.dense)
    expert_bytes: int  # all routed experts of all layers
    slot_bytes: int  # of the largest routed expert, its matrices aligned: what a place for one takes
    converted_bytes: int = 0  # copies that loading makes: keys and values of files with a joint attn_kv_b
    vision_bytes: int = 0
    tower: MoonViT | None = None  # whose weights those are
    bytes_by_type: tuple[tuple[str, int], ...] = ()  # largest first, without vision
    dense_type: str = FITTING[0]  # of `gpu`, what plans and costs count

    @property
    def total_bytes(self) -> int:
        return self.embedding_bytes + self.dense_bytes + self.expert_bytes + self.vision_bytes

    @property
    def gpu_dense_bytes(self) -> int:
        return self.gpu[self.dense_type].num_bytes

    def with_dense_type(self, dense_type: str) -> "ModelSizes":
        return replace(self, dense_type=dense_type)

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


def sizes_of(
    config: ModelConfig, tensors: Iterable[Tensor], vision_bytes: int = 0, tower: MoonViT | None = None
) -> ModelSizes:
    """Sums the tensors of a file, or of a file to be. An embedding that is the head too is read whole, for every
    token."""
    tensors = list(tensors)
    layouts = {name: layout for name, _, layout in tensors}
    has_head = not is_tied(list(layouts))
    embedding, dense, routed, converted = 0, 0, 0, 0
    slot, by_type, experts_by_type = Counter[int](), Counter[str](), Counter[str]()
    on_gpu: dict[str, Counter[tuple[int, str]]] = {kind: Counter() for kind in DENSE_TYPES}  # by layer and type
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
            partner = _partner(name)
            joined = [layout] if partner is None else [layout, layouts.get(partner, layout)]
            for kind, sizes in on_gpu.items():
                for there, size in _gpu_parts(kind, config, row, shape, joined):
                    sizes[layer_of(name), there.name] += size
            converted += _converted_bytes(config, row, layout)
    return ModelSizes(
        config=config,
        label=_label(by_type, experts_by_type),
        embedding_bytes=embedding,
        dense_bytes=dense,
        gpu={kind: _dense_size(sizes, config.num_layers) for kind, sizes in on_gpu.items()},
        expert_bytes=routed,
        slot_bytes=max(slot.values(), default=0),
        converted_bytes=converted,
        vision_bytes=vision_bytes,
        tower=tower,
        bytes_by_type=tuple(by_type.most_common()),
    )


def _dense_size(sizes: Counter[tuple[int, str]], num_layers: int) -> DenseSize:
    by_layer, by_type = Counter[int](), Counter[str]()
    for (layer, type_name), num_bytes in sizes.items():
        by_layer[layer] += num_bytes
        by_type[type_name] += num_bytes
    layers = tuple(by_layer[layer] for layer in range(num_layers))
    return DenseSize(layers, sum(sizes.values()) - sum(layers), tuple(by_type.most_common()))


def slot_aligned(num_bytes: int) -> int:
    """Where the next matrix begins in a slot in VRAM."""
    return -(-num_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


def store_sizes(
    store: "GGUFStore", config: ModelConfig, vision_bytes: int = 0, tower: MoonViT | None = None
) -> ModelSizes:
    """Of an open file."""
    tensors = ((tensor.name, tensor.shape, tensor.layout) for tensor in store.tensors.values())
    return sizes_of(config, tensors, vision_bytes, tower)


def _partner(name: str) -> str | None:
    """The tensor that a GPU multiplies in one with this one."""
    return next((name.replace(own, other) for own, other in _JOINED.items() if own in name), None)


def _gpu_parts(
    kind: str, config: ModelConfig, row: Row | None, shape: tuple[int, ...], joined: list[Layout]
) -> Iterator[tuple[Layout, int]]:
    """Types and bytes of a dense tensor on the GPU, as `model.hybrid.weights` puts it there."""
    if len(shape) < 2:
        yield F32, 4 * prod(shape)
    elif row and row.is_exact:
        yield joined[0], prod(shape[:-1]) * joined[0].row_bytes(shape[-1])
    elif row and row.cut == "keys and values":  # made anew: keys head by head, transposed
        c = config
        for rows, k in ((c.kv_lora_rank, c.qk_nope_head_dim), (c.v_head_dim, c.kv_lora_rank)):
            layout = dense_layout(kind, [], k)
            yield layout, c.num_heads * rows * layout.row_bytes(k)
    else:
        layout = dense_layout(kind, joined, shape[-1])
        yield layout, prod(shape[:-1]) * layout.row_bytes(shape[-1])


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
