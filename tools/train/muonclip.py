"""MuonClip: Muon for hidden matrices, AdamW for the rest, and QK-Clip for every head after every step.

Muon (Jordan 2024; arXiv 2502.16982) replaces a matrix's momentum by the nearest semi-orthogonal one, scaled so that an
update has AdamW's size, 0.2 at learning rate one. An attention logit is then a product of two matrices that both grow,
and can explode. QK-Clip (arXiv 2507.20534, Algorithm 1) looks at the largest logit S of each head in the last forward
pass and, where it is above tau, multiplies that head's logits by tau / S, by its weights alone.

`torch.optim.Muon` has the same update, with `adjust_lr_fn="match_rms_adamw"`, but refuses a layer's experts, which are
one tensor here. Ours takes (..., rows, columns), all matrices of a tensor in one batched product.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kimi_lite.arch.architecture import find_row
from kimi_lite.arch.config import ModelConfig
from kimi_lite.tools.train.model import Layer, Model

OptimizerName = Literal["muonclip", "muon", "adamw"]  # muon: without QK-Clip
TAU = 100.0
_COEFFICIENTS, _NUM_ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_MOMENTUM = 0.95
_UPDATE_RMS = 0.2  # that AdamW's updates have, by measurement of Moonlight's authors
_ADAMW_BETAS, _ADAMW_EPS = (0.9, 0.95), 1e-8
_BALANCE_STEP = 1e-3  # DeepSeek-V3's


def orthogonalize(matrices: Tensor) -> Tensor:
    """(..., rows, columns) -> bfloat16 of the same shape, each with all singular values near one (0.7 to 1.2): five
    Newton-Schulz steps of x -> a x + b x^3 + c x^5."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16().flatten(0, -3) if matrices.ndim > 2 else matrices.bfloat16()[None]  # (B, rows, columns)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Of matrices, or of tensors (..., rows, columns) that are many; with Nesterov momentum, as torch's."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        assert all(parameter.ndim >= 2 for parameter in parameters)
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - _MOMENTUM)
                update = orthogonalize(weight.grad.lerp(momentum, _MOMENTUM))
                scale = _UPDATE_RMS * math.sqrt(max(weight.shape[-2:]))
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


@dataclass(frozen=True, slots=True)
class MuonClip:
    """The optimizers of a model, and what follows their step. `tau` None: logits are left alone, as they are where
    nothing trains the attention; nor are experts balanced where nothing trains the routers."""

    model: Model
    optimizers: tuple[torch.optim.Optimizer, ...]
    tau: float | None
    is_balancing: bool

    @classmethod
    def of(
        cls, model: Model, name: OptimizerName, weight_decay: float, tau: float = TAU, is_balancing: bool = True
    ) -> "MuonClip":
        """Over the parameters that want a gradient. `is_balancing`: not where a teacher's choice is learnt."""
        wanted = [(each, weight) for each, weight in model.named_parameters() if weight.requires_grad]
        hidden = [weight for each, weight in wanted if name != "adamw" and is_hidden(each)]
        rest = [weight for each, weight in wanted if name == "adamw" or not is_hidden(each)]
        groups = [
            {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": weight_decay},
            {"params": [weight for weight in rest if weight.ndim == 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=_ADAMW_BETAS, eps=_ADAMW_EPS, fused=True) if rest else None
        muon = Muon(hidden, 0.0, weight_decay) if hidden else None
        parts = {find_row(f"{each}.weight").part for each, _ in wanted}
        is_clipping, is_balancing = name == "muonclip" and "attention" in parts, is_balancing and "router" in parts
        return cls(model, tuple(filter(None, (muon, adamw))), tau if is_clipping else None, is_balancing)

    def step(self, lr: float, max_logits: Tensor, loads: Tensor) -> int:
        """One update by the gradients that are there, then QK-Clip and balancing by what the forward passes saw
        (`model.Output`). Returns how many heads were clipped."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.is_balancing:
            balance(self.model, loads)
        return clip_logits(self.model, max_logits, self.tau) if self.tau else 0

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def is_hidden(name: str) -> bool:
    """Whether Muon trains the parameter: a matrix, but for the embedding and the head."""
    row = find_row(f"{name}.weight")
    assert row is not None, name
    return row.part not in ("embedding", "head") and len(row.shape) > 1


@torch.no_grad()
def clip_logits(model: Model, max_logits: Tensor, tau: float) -> int:
    """QK-Clip: multiplies the logits of every head whose largest, (L, H), is above tau by tau / largest. The parts of
    query and key without rotation share the factor; the rotated key belongs to all heads, so the rotated query takes
    it whole. Returns the number of heads."""
    num_clipped = 0
    for layer, layer_logits in zip(model.blk, max_logits, strict=True):
        for head in torch.nonzero(layer_logits > tau).flatten().tolist():
            factor = tau / float(layer_logits[head])
            for rows, power in _head_rows(layer, model.config, head):
                rows.mul_(factor**power)
            num_clipped += 1
    return num_clipped


def _head_rows(layer: Layer, config: ModelConfig, head: int) -> Iterator[tuple[Tensor, float]]:
    """The rows of a head that make its logits, and the power of the factor that each takes."""
    nope = config.qk_nope_head_dim
    queries = layer.attn_q_b if config.q_lora_rank else layer.attn_q
    query = queries[head * config.qk_head_dim : (head + 1) * config.qk_head_dim]
    yield query[:nope], 0.5
    yield query[nope:], 1.0
    yield layer.attn_kv_b[head * config.kv_head_dim :][:nope], 0.5


@torch.no_grad()
def balance(model: Model, loads: Tensor) -> None:
    """Balancing without an auxiliary loss (arXiv 2408.15664): the selection bias of every expert with less than the
    mean load (L', E) goes up by a constant, of every other one down."""
    for layer, load in zip((layer for layer in model.blk if not layer.is_dense), loads.float(), strict=True):
        layer.exp_probs_b.add_((load.mean() - load).sign(), alpha=_BALANCE_STEP)
