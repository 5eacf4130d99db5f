"""The GPU's operations on a CPU device: plain torch, and experts by `native.cpu` from slots in host memory.

With these in the place of Triton's kernels the whole path runs without a GPU, and an expert in a slot gives the same
bits as one that the CPU computes, so that with a cache must equal without one exactly.
"""

import time

import numpy as np
import torch

from kimi_lite.experts.index import RoutedLayer
from kimi_lite.hardware.machine import Gpu
from kimi_lite.model.hybrid.kernels import Angles, DenseMatrix, Residents, RouterRule
from kimi_lite.model.hybrid.turns import Turn
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.experts import experts_op, experts_scratch_bytes
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.matrix import Matrix, dequantize
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.gpu.arguments import ChoiceRows, Routes
from kimi_lite.native.reference import route
from kimi_lite.native.turn_cells import ANSWERED, CHOICES_POSTED, GIVEN_UP, X_POSTED

GPU = Gpu("a stand-in", 24 << 30, 23 << 30, vram_bytes_s=900e9, pcie_bytes_s=23e9)  # as plans see it
PATIENCE_S = 60.0  # of the GPU, for the CPU's answer


class StandInKernels:
    """`kimi_lite.model.hybrid.kernels.Kernels` for the CPU."""

    grouped_choices = 1 << 30  # never: rows of every number of choices come from the same float32

    def dequantize(
        self, data: torch.Tensor, layout_name: str, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = dequantize(data.reshape(-1, data.shape[-1]).numpy(), layout_name)
        return _placed(torch.from_numpy(rows).view(*data.shape[:-1], -1).to(dtype), out)

    def linear(
        self, x: torch.Tensor, matrix: DenseMatrix, out: torch.Tensor | None = None, is_exact: bool = False
    ) -> torch.Tensor:
        return _placed(x.float() @ self.dequantize(matrix.data, matrix.layout_name).T, out)

    def head_linear(self, x: torch.Tensor, matrix: DenseMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
        weights = self.dequantize(matrix.data, matrix.layout_name)
        return _placed(torch.einsum("thk,hrk->thr", x.float(), weights), out)

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        delta: torch.Tensor | None = None,
        also: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if delta is not None:
            x += delta
        normed = x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight
        if also is not None:
            also.copy_(normed)
        return _placed(normed.to(dtype), out)

    def swiglu(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        out: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        return _placed((torch.nn.functional.silu(gate) * up).to(dtype), out)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b, cos, sin = x[..., 0::2].clone(), x[..., 1::2].clone(), cos[:, None], sin[:, None]
        x[..., 0::2], x[..., 1::2] = a * cos - b * sin, a * sin + b * cos
        return x

    def write_latent(
        self,
        kv: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        angles: Angles,
        storage: torch.Tensor,
        cache_rows: torch.Tensor,
    ) -> None:
        rank, is_written = len(weight), cache_rows >= 0
        key = self.rotate(kv[:, None, rank:].clone(), angles.cos, angles.sin)[:, 0]
        rows = torch.cat([self.rms_norm(kv[:, :rank], weight, eps), key], dim=1)
        storage.view(-1, storage.shape[-1])[cache_rows[is_written]] = rows[is_written].to(storage.dtype)

    def mla_decode(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        storage: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = torch.zeros(q_latent.shape)
        for t, length in enumerate(lengths.tolist()):
            if length:
                pages = page_table[t, : -(-length // 64)].long()
                latents = storage[pages].reshape(-1, storage.shape[-1])[:length].float()  # (P, R + rope)
                scores = torch.cat([q_latent[t], q_rope[t]], dim=-1).float() @ latents.T * scale  # (H, P)
                context[t] = scores.softmax(dim=-1) @ latents[:, : q_latent.shape[-1]]
        return _placed(context, out)

    def route(
        self,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        rule: RouterRule,
        residents: Residents | None = None,
        turn: Turn | None = None,
        out: Routes | None = None,
    ) -> Routes:
        added = None if bias is None else bias.numpy()
        if residents is not None and residents.cache_bias:
            gain = (residents.slot_of.numpy() >= 0) * np.float32(residents.cache_bias)
            added = gain if added is None else added + gain
        groups = (rule.num_groups, rule.num_groups_used)
        options = (rule.top_k, groups, rule.is_sigmoid, rule.is_normalized, rule.scale)
        chosen, weights = route(logits.numpy(), added, *options)
        ids = torch.from_numpy(chosen)
        slots = None if residents is None else residents.slot_of[ids.long()]
        if turn is not None:
            post(turn, ids, slots)
        made = Routes(ids, torch.from_numpy(weights.astype(np.float32)), slots)
        return made if out is None else Routes(*map(_placed, made, out))

    def await_answer(self, turn: Turn) -> None:
        number, until_s = int(turn.first) + turn.number, time.monotonic() + PATIENCE_S
        while not is_answered(turn):
            if time.monotonic() > until_s:
                turn.memory.given_up[0] = turn.memory.cells[GIVEN_UP] = number
            time.sleep(0)

    def expert_choices(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        form: RoutedLayer,
        slot_of_choice: torch.Tensor,
        token_of_choice: torch.Tensor,
        out: torch.Tensor | None = None,
        is_exact: bool | None = None,
    ) -> torch.Tensor:
        """By the CPU's kernel, which groups tokens by expert as it does for the CPU's own."""
        ids, tokens = slot_of_choice.numpy(), token_of_choice.numpy()
        top_k = int(np.bincount(tokens).max()) if len(tokens) else 1
        table = np.full((len(x), top_k), -1, np.int32)
        place = np.zeros(len(x), int)
        at = np.empty(len(ids), int)
        for i, (slot, token) in enumerate(zip(ids, tokens, strict=True)):
            table[token, place[token]] = slot
            at[i] = token * top_k + place[token]
            place[token] += 1
        rows = run_experts(x.numpy(), _matrices(slots.numpy(), form), table, form)
        chosen = torch.from_numpy(rows[at])
        return chosen if out is None else out.copy_(chosen)

    def weighted_sum(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        base: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        total = torch.zeros_like(rows[:, 0])
        for k in range(rows.shape[1]):
            total += rows[:, k] * weights[:, k, None]
        return _placed(total if base is None else total + base, out)

    def sum_at_places(
        self, rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.weighted_sum(rows[places.long()], weights, base)

    def join(
        self,
        x: torch.Tensor,
        rows: ChoiceRows,
        weights: torch.Tensor,
        shared: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        out: torch.Tensor | None = None,
        arrivals: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        count = weights.numel()
        is_hit = rows.slot_of_choice[:count, None] >= 0
        chosen = torch.where(is_hit, rows.hits[:count], rows.misses[:count])
        x += self.weighted_sum(chosen.view(*weights.shape, -1), weights, shared)
        return None if norm is None else self.rms_norm(x, norm, eps, out)


def _placed(result: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor | None:
    """`result`, or in `out` where there is one."""
    return result if out is None or result is None else out.copy_(result)


def is_answered(turn: Turn) -> bool:
    """Whether a kernel that waits for the CPU's rows of this turn goes on."""
    memory, first = turn.memory, int(turn.first)
    return bool(memory.cells[ANSWERED] >= first + turn.number or memory.given_up > first)


def post(turn: Turn, ids: torch.Tensor, slots: torch.Tensor) -> None:
    """Tells the CPU what was chosen, and what of it is missing."""
    chosen, missing, cells, first, number = turn.posting
    cells[X_POSTED : X_POSTED + len(ids)] = int(first) + number
    chosen[: len(ids)], missing[: len(ids)] = ids, torch.where(slots < 0, ids, -1)
    cells[CHOICES_POSTED : CHOICES_POSTED + len(ids)] = int(first) + number


def run_experts(x: np.ndarray, table: np.ndarray, ids: np.ndarray, form: RoutedLayer) -> np.ndarray:
    """x (T, D), ids int32 (T, K), -1 for absent -> unweighted rows (T * K, D)."""
    num_tokens, top_k = ids.shape
    kinds = [{activation_kind(part.layout_name)} - {0} for part in form.matrices]
    inputs = Activations(num_tokens, form.hidden_size, kinds[0] | kinds[1])
    hidden = Activations(num_tokens * top_k, form.width, kinds[2])
    run = RunTable(num_tokens, 1, experts_scratch_bytes(form.hidden_size, form.width, num_tokens), num_tokens * top_k)
    rows = np.zeros((num_tokens * top_k, form.hidden_size), np.float32)
    weights = np.zeros(ids.shape, np.float32)
    arguments = (run, inputs, rows, table, hidden, ids, weights)
    op = experts_op(*arguments, num_always=0, weights_owner=None, has_few_each=True, per_choice=rows)
    inputs.values[:] = x
    run.set_tokens(np.zeros(num_tokens, np.int32))
    team = Team(1)
    team.run(Program([quantize_op(run, inputs), op]))
    team.close()
    return rows


def _matrices(slots: np.ndarray, form: RoutedLayer) -> np.ndarray:
    """int64 (slots, 3, 9): the kernel tables of the experts in the slots."""
    return np.stack([np.stack([_table(slot, part) for part in form.matrices]) for slot in slots])


def _table(slot: np.ndarray, part: object) -> np.ndarray:
    data = slot[part.offset : part.offset + part.num_bytes].reshape(part.num_rows, part.row_bytes)
    return Matrix.of(data, part.layout_name, part.k).table
