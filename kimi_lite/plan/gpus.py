"""What lies on the GPUs. One holds all layers; several share them so that the same share of every GPU's experts has
slots: all that belongs to a layer is on one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kimi_lite.arch.sizes import ModelSizes
from kimi_lite.plan.types import DENSE, KV, MARGIN, SLOTS, VISION, WORK, Budget, GpuPart, MemoryRow, PlanInputs
from kimi_lite.plan.workspace import PROMPT_CHUNKS, WORK_SHARE, gpu_margin_bytes, gpu_work_bytes, vision_work_bytes

_HALVINGS = 10  # of the share of experts that is looked for


@dataclass(frozen=True, slots=True)
class _Layers:
    """Bytes of each layer: what it must have, and slots for all of its experts."""

    dense: tuple[int, ...]
    cache: tuple[int, ...]
    slots: tuple[int, ...]
    tail: int  # behind the last one: the head

    @classmethod
    def find(cls, sizes: ModelSizes, cache_bytes: int) -> "_Layers":
        c, dense = sizes.config, sizes.gpu[sizes.dense_type]
        ends = [cache_bytes * number // c.num_layers for number in range(c.num_layers + 1)]
        slot_bytes = c.num_experts * sizes.slot_bytes
        return cls(
            dense=dense.layer_bytes,
            cache=tuple(end - start for start, end in pairwise(ends)),
            slots=tuple(slot_bytes if number >= c.num_dense_layers else 0 for number in range(c.num_layers)),
            tail=dense.other_bytes,
        )

    def fixed_bytes(self, layers: range) -> int:
        tail = self.tail if layers.stop == len(self.dense) else 0
        return sum(self.dense[layers.start : layers.stop]) + sum(self.cache[layers.start : layers.stop]) + tail

    def split(self, have: Sequence[float], share: float) -> list[range]:
        """So many layers to each GPU but the last as `have` bytes hold with slots for this share of their experts; at
        least one to each."""
        found, start, num_layers = [], 0, len(self.dense)
        for number, have_bytes in enumerate(have[:-1]):
            stop, most, left_bytes = start, num_layers - (len(have) - 1 - number), have_bytes
            while stop < most and (stop == start or self._need(stop, share) <= left_bytes):
                left_bytes -= self._need(stop, share)
                stop += 1
            found.append(range(start, stop))
            start = stop
        return [*found, range(start, num_layers)]

    def holds(self, have: Sequence[float], layers: Sequence[range], share: float) -> bool:
        """Whether every GPU holds its layers with this share of their experts."""
        needs = (self.fixed_bytes(own) + share * sum(self.slots[own.start : own.stop]) for own in layers)
        return all(need <= have_bytes for need, have_bytes in zip(needs, have, strict=True))

    def _need(self, layer: int, share: float) -> float:
        return self.dense[layer] + self.cache[layer] + share * self.slots[layer]


def lay_out_gpus(
    situation: PlanInputs, sizes: ModelSizes, budgets: tuple[Budget, ...], cache_bytes: int, context_length: int
) -> tuple[list[MemoryRow], int, tuple[GpuPart, ...]]:
    """Rows, tokens of a prompt's chunk, and what each GPU gets: layers, and slots from what is left."""
    limits, gpus = situation.limits, situation.hardware.gpus[: sizes.config.num_layers]
    layers = _Layers.find(sizes, cache_bytes)
    vision = [_vision_bytes(sizes, limits.vision == "gpu") if n == 0 else 0 for n in range(len(gpus))]
    margins = [gpu_margin_bytes(gpu) for gpu in gpus]
    have = [budgets[n].have_bytes - vision[n] - margins[n] for n in range(len(gpus))]
    share = 1.0
    if limits.num_gpu_experts is not None:
        share = min(1.0, limits.num_gpu_experts / max(1, sizes.num_experts))
    for chunk in PROMPT_CHUNKS:
        work_bytes = gpu_work_bytes(sizes, chunk, context_length)
        split = _split(layers, [each - work_bytes for each in have], share)
        left = [each - layers.fixed_bytes(own) for each, own in zip(have, split, strict=True)]
        if work_bytes <= WORK_SHARE * min(left):
            break
    slots = _slots(sizes, split, [each - work_bytes for each in left], limits.num_gpu_experts)
    rows = []
    for n, own in enumerate(split):
        kv_bytes = sum(layers.cache[own.start : own.stop])
        parts = {DENSE: layers.fixed_bytes(own) - kv_bytes, KV: kv_bytes, VISION: vision[n], MARGIN: margins[n]}
        parts |= {WORK: work_bytes, SLOTS: slots[n] * sizes.slot_bytes}
        rows += [MemoryRow("VRAM", part, num_bytes, n) for part, num_bytes in parts.items()]
    return rows, chunk, tuple(GpuPart(own, count) for own, count in zip(split, slots, strict=True))


def _vision_bytes(sizes: ModelSizes, stays: bool) -> int:
    """Of the tower, which works on the first GPU: its weights, or two layers of them where they come from RAM."""
    if sizes.tower is None:
        return sizes.vision_bytes if stays else 0
    weights = sizes.vision_bytes if stays else 2 * sizes.vision_bytes // sizes.tower.layers
    return weights + vision_work_bytes(sizes.tower, is_on_gpu=True)


def _split(layers: _Layers, have: Sequence[float], most_share: float) -> list[range]:
    """With the largest share of experts, the same on every GPU, for which all layers find a place; where none do even
    without slots, by the GPUs' sizes."""
    split = layers.split(have, most_share)
    if len(have) == 1 or layers.holds(have, split, most_share):
        return split
    low, high = 0.0, most_share
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = layers.holds(have, layers.split(have, middle), middle)
        low, high = (middle, high) if fits else (low, middle)
    split = layers.split(have, low)
    if layers.holds(have, split, low):
        return split
    need_bytes, have_bytes = layers.fixed_bytes(range(len(layers.dense))), max(1, sum(have))
    return layers.split([max(0, each) * need_bytes / have_bytes for each in have], 0.0)


def _slots(sizes: ModelSizes, split: Sequence[range], left: Sequence[float], asked: int | None) -> list[int]:
    """Of each GPU: what is left for them, or its share of what is asked."""
    c = sizes.config
    counts = [c.num_experts * sum(layer >= c.num_dense_layers for layer in own) for own in split]
    if asked is None:
        fit = [int(max(0, each) // sizes.slot_bytes) if sizes.slot_bytes else 0 for each in left]
        return [min(count, most) for count, most in zip(counts, fit, strict=True)]
    wanted, ends = min(asked, sizes.num_experts), [0]
    for count in counts:
        ends.append(ends[-1] + count)
    bounds = [wanted * end // max(1, sizes.num_experts) for end in ends]
    return [stop - start for start, stop in pairwise(bounds)]
