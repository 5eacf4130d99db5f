"""The tower on a GPU, in plain torch: weights in bfloat16 (float32 where the file has float32), sums in float32.

By default the weights lie in RAM, pinned where there is a GPU to copy to, and go up layer by layer while an item is
encoded: 0.9 GB for K2.5, 40 ms over PCIe 4.0. `stays` leaves them there after the first item. Any device of torch will
do, so that a CPU stands in for it in tests.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from kimi_lite.arch.moonvit import LAYER_NORM_EPS, VisionFile
from kimi_lite.experts.gpu_failure import told
from kimi_lite.model.vision.patches import Grid, Patches
from kimi_lite.model.vision.positions import position_rows, rope_angles
from kimi_lite.model.vision.weights import Stored, VisionWeights

_CHUNK_ROWS = 4096  # that go through a layer's feed-forward network at once
_LINEARS = ("attn_qkv", "attn_out", "ffn_up", "ffn_down")
_NORMS = ("ln1", "ln2")


class Linear(NamedTuple):
    weight: torch.Tensor  # (rows, k)
    bias: torch.Tensor  # (rows,)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, k) -> (T, rows)."""
        return functional.linear(x.to(self.weight.dtype), self.weight).float() + self.bias


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


Parts = dict[str, Linear | Norm]  # of a layer, or of what is around the layers


class GpuTower:
    """Weights in RAM or on `device`; `encode` makes features of one item at a time."""

    def __init__(
        self,
        weights: VisionWeights,
        file: VisionFile,
        device: str,
        stays: bool,
        report: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Raises KimiLiteError where the device's memory is too small for weights that are to stay there."""
        self._file, self._device, report = file, torch.device(device), report or (lambda stage, done, total: None)
        tower, self._parts = file.tower, []
        for number in range(-1, tower.layers):
            report("reading the vision tower", number + 1, tower.layers + 1)
            parts = self._around(weights) if number < 0 else self._layer(weights, f"v.blk.{number}.")
            self._parts.append(self._up(parts) if stays else parts)
        self._positions = weights.positions()
        report("reading the vision tower", tower.layers + 1, tower.layers + 1)

    @property
    def num_bytes(self) -> int:
        """Of weights."""
        tensors = (tensor for parts in self._parts for part in parts.values() for tensor in part[:2])
        return sum(tensor.nbytes for tensor in tensors) + self._positions.nbytes

    @torch.inference_mode()
    def encode(
        self, patches: Patches, should_stop: Callable[[], bool], report: Callable[[str, int, int], None]
    ) -> np.ndarray:
        """float32 (tokens, D). Raises InterruptedError between layers when `should_stop()` becomes true, KimiLiteError
        where the GPU's memory ends."""
        grid, num_layers = Grid(*patches.grid), self._file.tower.layers
        with told(
            f"while an image of {grid.num_patches:,} patches was read",
            "Allow fewer experts there (--gpu-experts), or show a smaller image.",
        ):
            around = self._up(self._parts[0])
            x = self._embed(patches, grid, around)
            angles = torch.from_numpy(rope_angles(self._file.tower, grid, self._file.row_order)).to(self._device)
            turns = angles.cos().float()[:, None], angles.sin().float()[:, None]  # (T, 1, d / 2)
            for number, parts in enumerate(self._parts[1:]):
                if should_stop():
                    raise InterruptedError
                report("reading the image", number, num_layers)
                self._run_layer(x, self._up(parts), turns)
            report("reading the image", num_layers, num_layers)
            return self._project(x, grid, around).cpu().numpy()

    def close(self) -> None:
        """Drops the weights."""
        self._parts.clear()

    def _embed(self, patches: Patches, grid: Grid, around: Parts) -> torch.Tensor:
        """float32 (T, D)."""
        mean, std = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in self._file[2:])
        pixels = torch.from_numpy(patches.pixels).to(self._device).float()
        x = around["v.patch_embd"](((pixels / 255 - mean) / std).flatten(1))
        return x + torch.from_numpy(np.ascontiguousarray(position_rows(self._positions, grid))).to(self._device)

    def _run_layer(self, x: torch.Tensor, parts: Parts, turns: tuple[torch.Tensor, torch.Tensor]) -> None:
        """x (T, D), in place."""
        tower, dtype = self._file.tower, parts["attn_qkv"].weight.dtype
        qkv = parts["attn_qkv"](parts["ln1"](x)).view(len(x), 3, tower.heads, tower.head_dim)
        q, k, v = _turn(qkv[:, 0], turns), _turn(qkv[:, 1], turns), qkv[:, 2]  # (T, H, d)
        heads = (each.to(dtype).transpose(0, 1)[None] for each in (q, k, v))
        context = functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1).reshape(len(x), -1)
        x += parts["attn_out"](context.float())
        for rows in x.split(_CHUNK_ROWS):
            rows += parts["ffn_down"](functional.gelu(parts["ffn_up"](parts["ln2"](rows)), approximate="tanh"))

    def _project(self, x: torch.Tensor, grid: Grid, around: Parts) -> torch.Tensor:
        """(tokens, D of the language model)"""
        merge = self._file.tower.merge
        mean = around["post"](x).view(grid.t, grid.h // merge, merge, grid.w // merge, merge, -1).mean(0)
        merged = around["last"](mean.permute(0, 2, 1, 3, 4)).reshape(grid.num_tokens(merge), -1)
        return around["mm.2"](functional.gelu(around["mm.1"](merged)))

    def _around(self, weights: VisionWeights) -> Parts:
        """What comes before and after the layers."""
        linears = {name: self._linear(weights, name) for name in ("v.patch_embd", "mm.1", "mm.2")}
        last = self._norm(weights, "mm.input_norm", self._file.tower.eps)
        return linears | {"post": self._norm(weights, "v.post_ln"), "last": last}

    def _layer(self, weights: VisionWeights, block: str) -> Parts:
        linears = {name: self._linear(weights, block + name) for name in _LINEARS}
        return linears | {name: self._norm(weights, block + name) for name in _NORMS}

    def _linear(self, weights: VisionWeights, name: str) -> Linear:
        if name.endswith("attn_qkv"):
            stored, bias = weights.qkv(int(name.split(".")[2]))
        else:
            stored, bias = weights.matrix(f"{name}.weight"), weights.vector(f"{name}.bias")
        return Linear(self._in_ram(_as_tensor(stored)), self._in_ram(torch.from_numpy(bias)))

    def _norm(self, weights: VisionWeights, name: str, eps: float = LAYER_NORM_EPS) -> Norm:
        weight, bias = (torch.from_numpy(weights.vector(f"{name}.{kind}")) for kind in ("weight", "bias"))
        return Norm(self._in_ram(weight), self._in_ram(bias), eps)

    def _in_ram(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _up(self, parts: Parts) -> Parts:
        """On the device; where they are there already, themselves."""
        device = self._device
        return {
            name: part._replace(
                weight=part.weight.to(device, non_blocking=True), bias=part.bias.to(device, non_blocking=True)
            )
            for name, part in parts.items()
        }


def _as_tensor(stored: Stored) -> torch.Tensor:
    """bfloat16, float32 for float32."""
    if stored.type_name == "BF16":
        return torch.from_numpy(stored.data.astype(np.int16, copy=True)).view(torch.bfloat16)
    values = torch.from_numpy(np.ascontiguousarray(stored.values()))
    return values if stored.type_name == "F32" else values.to(torch.bfloat16)


def _turn(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x: (T, H, d), pairs of neighbours turned by angles (T, 1, d / 2)."""
    cos, sin = turns
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
