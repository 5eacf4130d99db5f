"""Every kernel at Kimi K2.5's own shapes against float64, computed from what `native.reference_types` decodes.

Matrices are 64 random rows repeated, so that 64 decoded rows judge all: the results of the repetitions must also be the
same bits. Errors are relative to what the factors' magnitudes could add up to; a case's line has its limit. A few
choices of experts must have the very bits that the CPU's kernels give.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5
from kimi_lite.native import reference
from kimi_lite.native.cpu.activations import Activations
from kimi_lite.native.cpu.blocks import activation_kind
from kimi_lite.native.cpu.experts import experts_op, experts_scratch_bytes
from kimi_lite.native.cpu.linear import quantize_op
from kimi_lite.native.cpu.matrix import Matrix
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team
from kimi_lite.native.gpu.dequant import dequantize
from kimi_lite.native.gpu.elementwise import rms_norm, rope, swiglu, weighted_sum
from kimi_lite.native.gpu.experts import GROUPED_CHOICES, ExpertMatrix, expert_choices
from kimi_lite.native.gpu.linear import heads_linear, linear
from kimi_lite.native.gpu.matvec import MAX_TOKENS
from kimi_lite.native.gpu.mla import mla_decode, write_latent
from kimi_lite.native.gpu.router import route
from kimi_lite.native.gpu.support import is_interpreted
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.native.reference_types import dequantize as decoded
from kimi_lite.native.types.random_blocks import random_rows
from kimi_lite.tools.gpu_check.opening import tiny_config
from kimi_lite.tools.gpu_check.settings import Settings, tell

TILE_ROWS = 64
NORMAL_TYPES = ("Q8_0", "BF16", "F32")
# Largest error of a sum, relative to the sum of the products' magnitudes
FLOAT32, SPLIT, BFLOAT16 = 3e-6, 2e-5, 8e-3


class Sizes(NamedTuple):
    """Of the cases; K2.5's, or tiny ones for the interpreter."""

    config: ModelConfig
    types: tuple[str, ...]
    tokens: tuple[int, ...]
    choices: tuple[int, ...]
    contexts: tuple[int, ...]
    splits: tuple[int | None, ...]
    caches: tuple[str, ...]
    rows: int = 2048  # of a type's matrix


class Case(NamedTuple):
    name: str
    run: Callable[[], float]  # the error as a share of its limit; above 1 is wrong


def check(settings: Settings) -> None:
    """Every n-th case of n processes. A kernel that raises is a wrong case."""
    device = torch.device("cpu" if settings.is_stand_in else "cuda")
    if not settings.is_stand_in:
        from kimi_lite.native.gpu.support import why_unusable

        if unusable := why_unusable():
            raise RuntimeError(unusable.problem)
    worst, count = ("none", 0.0), 0
    for number, case in enumerate(cases(_sizes(settings), device)):
        if number % settings.num_shards != settings.shard:
            continue
        count += 1
        try:
            share = case.run()
        except Exception as error:
            tell(case.name, f"{type(error).__name__}: {str(error)[:200]}", is_ok=False)
            continue
        if not share <= 1:
            tell(case.name, share, "of its limit", is_ok=False)
        worst = max(worst, (case.name, share), key=lambda pair: pair[1])
    tell("worst", worst[1], "of its limit", is_ok=worst[1] <= 1, case=worst[0])
    tell("compared", count, "cases", shard=settings.shard)


def sanitize(settings: Settings) -> None:
    """Every kernel once at tiny sizes under NVIDIA's compute-sanitizer, where that is installed: no access outside."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if settings.is_stand_in or program is None:
        tell("memcheck", "not run: there is no compute-sanitizer")
        return
    small = replace(settings, is_small=True, types=settings.types or ("Q8_0", "TQ1_0", "IQ1_M", "Q4_K"))
    stage = [sys.executable, "-m", "kimi_lite.tools.gpu_check.stage", "kernels", small.to_json()]
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", *stage]
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    tell("memcheck", "no bad access" if result.returncode == 0 else f"exit code {result.returncode}: see the log",
         is_ok=result.returncode == 0)  # fmt: skip


def bandwidths(settings: Settings) -> None:
    """`tools.kernels.gpu_bench`: bytes/s of types, attention and experts as shares of what memory gives."""
    if settings.is_stand_in:
        tell("read", "not measured without a GPU")
        return
    types = ",".join(settings.types or ("TQ1_0", "IQ1_M", "IQ2_XXS", "Q2_K", "Q4_K", "Q6_K", "Q8_0"))
    command = [sys.executable, "-m", "kimi_lite.tools.kernels.gpu_bench", "--types", types.lower(), "--repeats", "10"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    tell("read", report["read_gb_s"], "GB/s")
    for name, each in report["types"].items():
        tell(name, each["product_gb_s"], "GB/s", share=each["bandwidth_share"], dequantize=each["dequantize_gb_s"])
    for name, rate in report["attention"].items():
        tell(f"attention, {name}", rate, "GB/s", share=rate / report["read_gb_s"])
    for name, rate in report["prompt_tflop_s"].items():
        tell(f"prompt, {name}", rate, "TFLOP/s")
    experts = report["experts"]
    tell("experts, a token", experts["few_gb_s"], "GB/s", share=experts["few_gb_s"] / report["read_gb_s"])
    tell("experts, many tokens", experts["many_tflop_s"], "TFLOP/s")


def _sizes(settings: Settings) -> Sizes:
    if settings.is_small:
        caches = ("f16", "q8", "f32", "bf16")
        return Sizes(tiny_config(), settings.types, (1, 3, 16, 17), (5, 64), (1, 65), (None, 1), caches, rows=TILE_ROWS)
    if settings.is_stand_in:  # what the interpreter does in seconds
        small = dict.fromkeys(("hidden_size", "feed_forward_size", "expert_feed_forward_size"), TILE_ROWS)
        config = replace(tiny_config(), num_heads=2, **small)
        return Sizes(config, ("Q8_0",), (1,), (3,), (65,), (None,), ("f32",), rows=TILE_ROWS)
    types = settings.types or tuple(BY_NAME)
    choices, contexts = (8, 64, 512, 1365, 4096), (1, 63, 64, 65, 1000, 32768)
    return Sizes(K2_5, types, (1, 3, 16, 64), choices, contexts, (None, 1, 32), ("f16", "q8", "f32", "bf16"))


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    c = sizes.config
    for name in sizes.types:
        for num_tokens in sizes.tokens:
            yield Case(
                f"linear {name} T={num_tokens}", partial(_linear, name, sizes.rows, c.hidden_size, num_tokens, device)
            )
        yield Case(f"dequantize {name}", partial(_dequantize, name, c.hidden_size, device))
        for count in sizes.choices:
            yield Case(f"experts {name} n={count}", partial(_experts, c, name, count, device))
    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    for matrix, (rows, k) in _dense_shapes(c).items() if device.type == "cuda" else ():
        prompt = 8192 if rows <= c.num_heads * head else 2048  # the results of eight processes must fit
        for num_tokens in sorted({*sizes.tokens, 1, 8, 65, prompt}):
            yield Case(f"{matrix} Q8_0 T={num_tokens}", partial(_linear, "Q8_0", rows, k, num_tokens, device))
    for name, shape in (("k_b", (c.kv_lora_rank, c.qk_nope_head_dim)), ("v_b", (c.v_head_dim, c.kv_lora_rank))):
        yield Case(f"heads {name}", partial(_heads, c.num_heads, *shape, device))
    for cache in sizes.caches:
        for context in sizes.contexts:
            for splits in sizes.splits:
                name = f"attention {cache} {context} splits {splits or 'chosen'}"
                yield Case(name, partial(_attention, c, cache, context, splits, device))
    yield Case("router, ties", partial(_router, c, device))
    yield Case("small steps", partial(_small, c, device))


def _dense_shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    return {
        "attn_q_a": (c.q_lora_rank, c.hidden_size),
        "attn_q_b": (c.num_heads * head, c.q_lora_rank),
        "attn_kv_a": (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
        "attn_output": (c.hidden_size, c.num_heads * c.v_head_dim),
        "ffn_gate_up": (2 * c.feed_forward_size, c.hidden_size),
        "ffn_down": (c.hidden_size, c.feed_forward_size),
    }


def _tiles(name: str, rows: int, k: int, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (rows, row_bytes), TILE_ROWS rows repeated; float64 (TILE_ROWS, k) of them."""
    tile = random_rows(BY_NAME[name], TILE_ROWS, k, k**-0.5, np.random.default_rng(seed))
    data = torch.from_numpy(tile).to(device).repeat(-(-rows // TILE_ROWS), 1)[:rows]
    return data, torch.from_numpy(decoded(tile, name)).to(device).double()


def _random(shape: tuple[int, ...], device: torch.device, seed: int = 1) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return torch.from_numpy(values).to(device)


def _share(have: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, limit: float) -> float:
    """have (T, rows) of rows that repeat, x (T, k), weights float64 (TILE_ROWS, k): error over limit."""
    wide = x.double()
    want, size = wide @ weights.T, wide.abs() @ weights.abs().T
    if not torch.equal(have, _repeated(have)):
        return float("inf")
    first = have[:, :TILE_ROWS].double()
    return float(((first - want[:, : first.shape[1]]).abs() / size[:, : first.shape[1]].clamp_min(1e-30)).max()) / limit


def _repeated(have: torch.Tensor) -> torch.Tensor:
    """What equal rows of weights must give: the first of them everywhere."""
    return have[:, torch.arange(have.shape[1], device=have.device) % TILE_ROWS]


def _limit(name: str, num_tokens: int) -> float:
    if num_tokens <= MAX_TOKENS or name == "F32":
        return FLOAT32
    return SPLIT if name == "Q8_0" else BFLOAT16


def _linear(name: str, rows: int, k: int, num_tokens: int, device: torch.device) -> float:
    data, weights = _tiles(name, rows, k, device)
    x = _random((num_tokens, k), device)
    return _share(linear(x, data, name, k), x, weights, _limit(name, num_tokens))


def _dequantize(name: str, k: int, device: torch.device) -> float:
    data, weights = _tiles(name, 2 * TILE_ROWS, k, device)
    have = dequantize(data, name).double()
    return float((have - weights.repeat(2, 1)).abs().max() / weights.abs().max()) / 1e-6


def _heads(num_heads: int, rows: int, k: int, device: torch.device) -> float:
    data, weights = _tiles("Q8_0", max(rows, TILE_ROWS) * num_heads, k, device)
    matrices = data[: num_heads * rows].view(num_heads, rows, -1)
    x = _random((3, num_heads, k), device)
    have, wide = heads_linear(x, matrices, "Q8_0"), x.double()
    share = 0.0
    for head in (0, num_heads - 1):
        own = weights[torch.arange(head * rows, head * rows + rows, device=device) % TILE_ROWS]
        size = wide[:, head].abs() @ own.abs().T
        share = max(share, float(((have[:, head].double() - wide[:, head] @ own.T).abs() / size).max()) / FLOAT32)
    return share


class _Form(NamedTuple):
    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


def _experts(c: ModelConfig, name: str, count: int, device: torch.device) -> float:
    """Four slots with weights of their own; every seventh choice has no slot, and its row must stay as it is."""
    hidden, width, num_slots = c.hidden_size, c.expert_feed_forward_size, 4
    shapes, matrices, offset = ((width, hidden), (width, hidden), (hidden, width)), [], 0
    for rows, k in shapes:
        matrices.append(ExpertMatrix(name, offset, rows, k, BY_NAME[name].row_bytes(k)))
        offset += rows * matrices[-1].row_bytes
    parts = [[_tiles(name, *shape, device, seed=10 * slot + i) for i, shape in enumerate(shapes)] for slot in range(4)]
    slots = torch.stack([torch.cat([data.reshape(-1) for data, _ in own]) for own in parts])
    choice = torch.arange(count, dtype=torch.int32, device=device)
    slot_of_choice = torch.where(choice % 7 == 6, -1, choice % num_slots).to(torch.int32)
    num_tokens = -(-count // 8)
    x = _random((num_tokens, hidden), device)
    token_of_choice = (choice // 8).to(torch.int32)
    out = torch.full((count, hidden), 7.0, device=device)
    have = expert_choices(x, slots, _Form(*matrices), slot_of_choice, token_of_choice, out)
    is_exact, share = count < GROUPED_CHOICES, 0.0
    if not bool((have[slot_of_choice < 0] == 7).all()):
        return float("inf")
    for slot, own in enumerate(parts):
        at = torch.nonzero(slot_of_choice == slot)[:, 0]
        if len(at) and is_exact:
            wanted = _on_cpu(x[token_of_choice[at].long()].cpu().numpy(), [data for data, _ in own], matrices)
            share = max(share, _bits(have[at].cpu().numpy(), wanted))
        elif len(at):
            gate, up, down = (weights for _, weights in own)
            inputs = x[token_of_choice[at].long()].double()
            inner = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)  # (n, TILE_ROWS), repeated
            inner = inner.repeat(1, -(-width // TILE_ROWS))[:, :width]
            want, rows = inner @ down.T, have[at]
            if not torch.equal(rows, _repeated(rows)):
                return float("inf")
            first = rows[:, :TILE_ROWS].double()
            error = float((first - want[:, : first.shape[1]]).norm() / want[:, : first.shape[1]].norm())
            share = max(share, error / BFLOAT16)
    return share


def _on_cpu(x: np.ndarray, data: Sequence[torch.Tensor], matrices: Sequence[ExpertMatrix]) -> np.ndarray:
    """The same expert by the CPU's kernels: float32 (n, D) -> (n, N)."""
    kinds = {each.layout_name: activation_kind(each.layout_name) for each in matrices}
    count, (name, *_), down = len(x), kinds, matrices[2]
    inputs, hidden = (Activations(count, k, {kinds[name]} - {0}) for k in (x.shape[1], down.k))
    rows = [np.ascontiguousarray(each.cpu().numpy()) for each in data]
    table = np.stack([Matrix.of(own, m.layout_name, m.k).table for own, m in zip(rows, matrices, strict=True)])[None]
    run = RunTable(count, 1, experts_scratch_bytes(x.shape[1], down.k, count), count)
    out, ids, weights = np.zeros_like(x), np.zeros((count, 1), np.int32), np.zeros((count, 1), np.float32)
    options = {"num_always": 0, "weights_owner": rows, "has_few_each": True, "per_choice": out}
    op = experts_op(run, inputs, out, table, hidden, ids, weights, **options)
    inputs.values[:] = x
    run.set_tokens(np.zeros(count, np.int32))
    with closing(Team(1)) as team:
        team.run(Program([quantize_op(run, inputs), op]))
    return out


def _bits(have: np.ndarray, wanted: np.ndarray) -> float:
    """0 for the same bits, else above 1. The interpreter, which rounds a fused product twice, may be off by a code."""
    if np.array_equal(have, wanted):
        return 0.0
    error = float(np.linalg.norm(have - wanted) / np.linalg.norm(wanted))
    return error / 1e-2 if is_interpreted() else 1 + max(error, 1e-9)


def _attention(c: ModelConfig, cache: str, context: int, splits: int | None, device: torch.device) -> float:
    rank, row = c.kv_lora_rank, c.kv_lora_rank + c.qk_rope_head_dim
    pages = -(-context // 64)
    rng = np.random.default_rng(3)
    latents = rng.standard_normal((pages * 64, row)).astype(np.float32)
    if cache == "q8":
        codes = reference.quantize_latents(latents)
        storage = torch.from_numpy(codes).to(device).view(pages, 64, -1)
        values = torch.from_numpy(reference.dequantize_latents(codes)).to(device).double()
    else:
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[cache]
        storage = torch.from_numpy(latents).to(device).to(dtype).view(pages, 64, row)
        values = storage.view(-1, row).double()
    order = torch.from_numpy(rng.permutation(pages)).to(device)
    seen = values.view(pages, 64, row)[order].reshape(-1, row)[:context]
    q = _random((2, c.num_heads, row), device, seed=4)
    lengths = torch.tensor([context, max(1, context // 2)], dtype=torch.int32, device=device)
    table = order.to(torch.int32).expand(2, -1).contiguous()
    have = mla_decode(q[..., :rank], q[..., rank:], storage, table, lengths, row**-0.5, num_splits=splits)
    limit = {"f32": 1e-5, "f16": 3e-3, "q8": 3e-3, "bf16": 2e-2}[cache]
    share = 0.0
    for token, length in enumerate(lengths.tolist()):
        weights = torch.softmax(q[token].double() @ seen[:length].T * row**-0.5, dim=-1)
        want = weights @ seen[:length, :rank]
        share = max(share, float((have[token].double() - want).norm() / want.norm()) / limit)
    return share


def _router(c: ModelConfig, device: torch.device) -> float:
    """Of equals the lower number wins: logits that are rounded to quarters."""
    logits = np.round(4 * np.random.default_rng(5).standard_normal((64, c.num_experts))).astype(np.float32) / 4
    bias = np.zeros(c.num_experts, np.float32)
    ids, weights = reference.route(logits, bias, c.num_experts_used, (1, 1), True, True, c.expert_weights_scale)
    to = partial(torch.as_tensor, device=device)
    routes = route(to(logits), to(bias), c.num_experts_used, scale=c.expert_weights_scale)
    if not np.array_equal(routes.ids.cpu().numpy(), ids):
        return float("inf")
    return float(np.abs(routes.weights.cpu().numpy() - weights).max()) / 1e-5


def _small(c: ModelConfig, device: torch.device) -> float:
    """Norms, rotation, SwiGLU, weighted sums, rows of the cache: each against float64."""
    x, y = _random((5, c.hidden_size), device, 6), _random((5, c.hidden_size), device, 7)
    wide = x.double()
    shares = [_far(swiglu(x, y), torch.nn.functional.silu(wide) * y.double())]
    weight = _random((c.hidden_size,), device, 8)
    normed = wide * torch.rsqrt((wide * wide).mean(1, keepdim=True) + c.rms_norm_eps) * weight.double()
    shares.append(_far(rms_norm(x, weight, c.rms_norm_eps), normed))
    rows, weights = (
        _random((5, c.num_experts_used, c.hidden_size), device, 9),
        _random((5, c.num_experts_used), device, 2),
    )
    shares.append(_far(weighted_sum(rows, weights, x), (rows.double() * weights.double()[..., None]).sum(1) + wide))
    angles = _random((5, c.qk_rope_head_dim // 2), device, 11)
    heads = _random((5, c.num_heads, c.qk_rope_head_dim), device, 12)
    cos, sin = angles.cos(), angles.sin()
    want = _rotated(heads.double(), cos.double(), sin.double())
    shares.append(_far(rope(heads.clone(), cos, sin), want))
    kv = _random((5, c.kv_lora_rank + c.qk_rope_head_dim), device, 13)
    storage = torch.zeros((1, 64, kv.shape[1]), device=device)
    places = torch.tensor([5, 0, 63, -1, 7], device=device)
    norm = _random((c.kv_lora_rank,), device, 14)
    write_latent(kv, norm, c.rms_norm_eps, cos, sin, storage, places)
    latent = kv[:, : c.kv_lora_rank].double()
    latent = latent * torch.rsqrt((latent * latent).mean(1, keepdim=True) + c.rms_norm_eps) * norm.double()
    key = _rotated(kv[:, None, c.kv_lora_rank :].double(), cos.double(), sin.double())[:, 0]
    is_written = places >= 0
    shares.append(_far(storage[0, places[is_written]], torch.cat([latent, key], 1)[is_written]))
    return max(shares)


def _far(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have.double() - want).abs().max() / want.abs().max()) / FLOAT32


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
