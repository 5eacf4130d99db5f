"""The architecture in plain torch, differentiable: multi-head latent attention, YaRN, sigmoid routing, a shared expert.

    model = load_model(Path("demo.gguf"))           # or a Hugging Face folder, in any precision that quantize reads
    model(ids).logits                               # (B, T, vocab_size)
    save_checkpoint(model, Path("folder"))          # what transformers and kimi-lite quantize open

Parameters carry their GGUF names, `blk.3.ffn_up_exps`; which there are, in which shapes, and what they are called in
checkpoints is the architecture's table. Keys' and values' half of a head lie in one matrix, `attn_kv_b`, as in
checkpoints and as Muon takes them. Formulas: DeepSeek-V3 (arXiv 2412.19437), sections 2.1 and 4.2 of its code.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from kimi_lite.arch.architecture import Row, find_row, role_of
from kimi_lite.arch.checkpoint import read_checkpoint_config
from kimi_lite.arch.config import ModelConfig
from kimi_lite.arch.known import K2_5
from kimi_lite.arch.mla import split_kv_b
from kimi_lite.arch.recipe import choose
from kimi_lite.arch.rope import RopeConfig, rope_attention_factor, rope_inverse_frequencies
from kimi_lite.arch.tensors import file_name, tensor_shapes
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file
from kimi_lite.gguf.metadata import Value
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.convert import open_model
from kimi_lite.quantize.source.model import RowReader, SourceModel
from kimi_lite.quantize.source.names import list_sources
from kimi_lite.quantize.source.tokenizer import TOKENIZER_FILES
from kimi_lite.quantize.write.writer import Tensor as FileTensor
from kimi_lite.quantize.write.writer import write_gguf

_INITIAL_STD = 0.02
_ROW_STEP = 64  # of an expert: few shapes of products, which oneDNN prepares once each
_KEYS, _VALUES, _JOINT = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"
_GATE_UP, _HALVES = "ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight")
_BIAS = "exp_probs_b.bias"


class Output(NamedTuple):
    """`max_logits` is the largest q . k * scale that each head of each layer saw, float32 (L, H); `loads` how many
    pairs of token and expert each expert of each such layer had, int64 (L', E)."""

    logits: Tensor  # (B, T, V)
    max_logits: Tensor
    loads: Tensor


class Rotation(NamedTuple):
    """float32 (T, rope / 2) both."""

    cos: Tensor
    sin: Tensor


class _TokenClip(torch.autograd.Function):
    """The identity, x (B, T, D); no token's gradient is longer than `bound` times the median one."""

    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        norms = gradient.float().norm(dim=-1, keepdim=True)  # (B, T, 1)
        return gradient * (ctx.bound * norms.median() / norms.clamp(min=1e-30)).clamp(max=1).to(gradient.dtype), None


class Model(nn.Module):
    """All weights are parameters, but for the routers' selection biases: buffers, which `muonclip.balance` moves.
    `token_clip`: how many times the median token's gradient another's may be after each layer, which goes back through
    deep models of large activations with a few tokens 10^4 times as long as with the others; 0: as it comes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.expert_gating != "sigmoid":
            raise KimiLiteError(f"{config.name} routes by {config.expert_gating}.", "Only sigmoid routing is trained.")
        self.config, self.token_clip = config, 0.0
        _register(self, config, [row for row in config.table.conversion_rows if row.layers == "none"])
        self.blk = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))

    def forward(self, ids: Tensor) -> Output:
        """ids int64 (B, T), each sequence from position 0."""
        rotation = make_rotation(self.config, ids.shape[1])
        x = embedding(ids, self.token_embd)  # (B, T, D)
        max_logits, loads = [], []
        for layer in self.blk:
            x, layer_logits, load = layer(x, rotation)
            x = _TokenClip.apply(x, self.token_clip) if self.token_clip else x
            max_logits.append(layer_logits)
            loads += [load] if load is not None else []
        logits = linear(rms_norm(x, self.output_norm, self.config.rms_norm_eps), self.output)  # (B, T, V)
        return Output(logits, torch.stack(max_logits), torch.stack(loads) if loads else torch.zeros(0, 0))

    def initialize(self, seed: int) -> "Model":
        """Random weights: norms one, all else N(0, 0.02)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1)
                else:
                    parameter.normal_(0, _INITIAL_STD, generator=generator)
            for buffer in self.buffers():
                buffer.zero_()
        return self


class Layer(nn.Module):
    """One layer; attributes are the tensors of `blk.N` without ".weight"."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.is_dense = config, layer < config.num_dense_layers
        _register(self, config, layer_rows(config, layer))

    def forward(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, T, D) -> the same after this layer, its heads' largest logits (H,), its experts' loads (E,)."""
        eps = self.config.rms_norm_eps
        attended, max_logits = self.attend(rms_norm(x, self.attn_norm, eps), rotation)
        x = x + attended
        inner = rms_norm(x, self.ffn_norm, eps)
        factor = as_factor(inner)
        if self.is_dense:
            return x + feed_forward(factor, self.ffn_gate, self.ffn_up, self.ffn_down), max_logits, None
        routed, load = self.route(inner.flatten(0, 1), factor.flatten(0, 1))
        x = x + routed.view_as(x)
        if self.config.num_shared_experts:
            x = x + feed_forward(factor, self.ffn_gate_shexp, self.ffn_up_shexp, self.ffn_down_shexp)
        return x, max_logits, load

    def attend(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Causal latent attention: x (B, T, D) -> (B, T, D), and the largest logit of each head (H,)."""
        c, (batch, length, _) = self.config, x.shape
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        if c.q_lora_rank:
            q = linear(rms_norm(linear(x, self.attn_q_a), self.attn_q_a_norm, c.rms_norm_eps), self.attn_q_b)
        else:
            q = linear(x, self.attn_q)
        q_nope, q_rope = q.view(batch, length, c.num_heads, -1).transpose(1, 2).split([nope, rope], -1)  # (B, H, T, .)
        c_kv, k_rope = linear(x, self.attn_kv_a_mqa).split([c.kv_lora_rank, rope], -1)
        kv = linear(rms_norm(c_kv, self.attn_kv_a_norm, c.rms_norm_eps), self.attn_kv_b)
        k_nope, v = kv.view(batch, length, c.num_heads, -1).transpose(1, 2).split([nope, c.v_head_dim], -1)
        k_rope = rotate_pairs(k_rope[:, None], rotation).expand(-1, c.num_heads, -1, -1)  # one key for all heads
        q = torch.cat([q_nope, rotate_pairs(q_rope, rotation)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        scores = (q @ k.transpose(-1, -2)).float() * c.softmax_scale  # (B, H, T, T)
        is_future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(is_future, -torch.inf)
        mixed = scores.softmax(-1).to(v.dtype) @ v  # (B, H, T, v)
        return linear(mixed.transpose(1, 2).flatten(2), self.attn_output), scores.detach().amax((0, 2, 3))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token of x (N, D) and what they weigh: int64 and float32 (N, K). The bias chooses and
        weighs nothing."""
        c = self.config
        with torch.autocast("cpu", enabled=False):
            scores = linear(x.float(), self.ffn_gate_inp.float()).sigmoid()  # (N, E)
        choice = scores.detach() + self.exp_probs_b
        if c.num_expert_groups > 1:
            groups = choice.view(len(x), c.num_expert_groups, -1)
            kept = groups.topk(2).values.sum(-1).topk(c.num_expert_groups_used).indices  # (N, groups used)
            is_kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, kept, True)
            choice = groups.masked_fill(~is_kept[..., None], -torch.inf).flatten(1)
        ids = choice.topk(c.num_experts_used).indices  # (N, K)
        weights = scores.gather(1, ids)
        if c.is_expert_weights_norm and c.num_experts_used > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * c.expert_weights_scale

    def route(self, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D), and the same as products take it -> the weighted sum of its experts' outputs float32 (N, D), and
        the loads (E,). Pairs are sorted by expert; each expert's rows are filled up with token 0 at weight 0."""
        ids, weights = self.choose(x)
        pairs = ids.numel()
        expert, order = ids.flatten().sort(stable=True)  # (P,) both
        load = expert.bincount(minlength=self.config.num_experts)  # (E,)
        num_rows = -(-load // _ROW_STEP) * _ROW_STEP  # (E,)
        filled = (num_rows - load).cumsum(0) - (num_rows - load)  # rows that fill up the experts in front of this one
        place = torch.arange(pairs) + filled[expert]  # (P,)
        rows = int(num_rows.sum())
        token = torch.zeros(rows, dtype=torch.int64).index_copy_(0, place, order // ids.shape[1])
        weight = weights.new_zeros(rows).index_copy(0, place, weights.flatten().index_select(0, order))[:, None]
        total = torch.zeros_like(x)
        experts = zip(self.ffn_gate_exps.unbind(), self.ffn_up_exps.unbind(), self.ffn_down_exps.unbind(), strict=True)
        cuts = num_rows.tolist()
        gathered = factor.index_select(0, token).split(cuts)  # E x (rows, D)
        for of_expert, at, share, (gate, up, down) in zip(
            gathered, token.split(cuts), weight.split(cuts), experts, strict=True
        ):
            inner = silu(linear(of_expert, gate)) * linear(of_expert, up) * share  # (rows, F): F is less than D
            total.index_add_(0, at, linear(inner, down).float())
        return total, load


def is_factor(name: str) -> bool:
    """Whether products alone take the parameter: a matrix, but for the embedding, and the router, which is float32."""
    row = find_row(f"{name}.weight")
    assert row is not None, name
    return row.part not in ("embedding", "router") and len(row.shape) > 1


def as_factor(x: Tensor) -> Tensor:
    """x in the precision that products take it in: bfloat16 under autocast."""
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x)."""
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def make_rotation(config: ModelConfig, length: int) -> Rotation:
    """Of the positions 0..length-1, as `arch.rope` has the frequencies."""
    angles = np.outer(np.arange(length), rope_inverse_frequencies(config))  # float64 (T, rope / 2)
    factor = rope_attention_factor(config)
    return Rotation(*(torch.from_numpy((turn(angles) * factor).astype(np.float32)) for turn in (np.cos, np.sin)))


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """x (..., T, rope): pair (x[2i], x[2i + 1]) turned by angle i."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = rotation
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def layer_rows(config: ModelConfig, layer: int) -> list[Row]:
    """The table's rows of a layer in the form that is trained: keys and values of a head in one matrix."""
    table = config.table
    rows = [row for row in table.conversion_rows if row.applies(config) and row.is_in_layer(config, layer)]
    return [table.by_name[_JOINT] if row.name == _KEYS else row for row in rows if row.name != _VALUES]


def small_config(
    name: str, vocab_size: int, num_layers: int, hidden_size: int, num_heads: int, num_experts: int, top: int
) -> ModelConfig:
    """A model like Kimi K2 in all but its sizes, with rows that every GGUF type's blocks fit."""
    return replace(
        K2_5,
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        q_lora_rank=256,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        feed_forward_size=4 * hidden_size,
        num_experts=num_experts,
        num_experts_used=top,
        expert_feed_forward_size=256,
        rms_norm_eps=1e-6,  # where transformers and vLLM agree about the norms of latents
        vocab_size=vocab_size,
        context_length=4096,
        rope=RopeConfig(50_000.0),
    )


def _register(module: nn.Module, config: ModelConfig, rows: list[Row]) -> None:
    for row in rows:
        weight = torch.empty(row.shape_in(config))
        stem, _, kind = row.name.partition(".")
        if kind == "bias":
            module.register_buffer(stem, weight)
        else:
            module.register_parameter(stem, nn.Parameter(weight))


def load_model(path: Path) -> Model:
    """From a Hugging Face folder or a GGUF file, as float32. Raises KimiLiteError."""
    source = open_model(path)
    model = Model(_read_config(path, source))
    tensors = {tensor.role: tensor for tensor in source.tensors}

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise KimiLiteError(f"{path} has no {name}.", "Fetch it again, or take another model.")
        tensor = tensors[name]
        return tensor.open_rows()(0, tensor.num_weights // tensor.shape[-1]).reshape(tensor.shape)

    def read_or_make(name: str) -> np.ndarray:
        """Also where files have it in other pieces than it is trained in, or need not have it."""
        role = role_of(name)
        stem = name.removesuffix(role)
        if name in tensors:
            return read(name)
        if role == _JOINT:
            keys, values = read(stem + _KEYS).swapaxes(1, 2), read(stem + _VALUES)
            return np.concatenate([keys, values], axis=1).reshape(-1, keys.shape[-1])
        if role in _HALVES and stem + _GATE_UP in tensors:
            return np.split(read(stem + _GATE_UP), 2, axis=1)[_HALVES.index(role)]
        if role == _BIAS:
            return np.zeros(model.config.num_experts, np.float32)
        return read(name)  # which says that it is missing

    with torch.no_grad():
        for name, weight in named_weights(model):
            weight.copy_(torch.from_numpy(np.array(read_or_make(name), np.float32)))
    return model


def _read_config(path: Path, source: SourceModel) -> ModelConfig:
    if (path / "config.json").is_file():
        return read_checkpoint_config(path).config
    metadata = {key: value.value for key, value in source.make_metadata(BY_NAME["F32"]).items()}
    return ModelConfig.from_metadata(metadata, path.name)


def named_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Parameters and selection biases by the names that the architecture's table has."""
    for name, parameter in model.named_parameters():
        yield f"{name}.weight", parameter
    for name, buffer in model.named_buffers():
        yield f"{name}.bias", buffer


def file_tensors(model: Model) -> dict[str, np.ndarray]:
    """float32 arrays as GGUF files have them, in file order: keys transposed and apart from values."""
    config, ours = model.config, {name: weight.detach().numpy() for name, weight in named_weights(model)}
    for layer in range(config.num_layers):
        stem = f"blk.{layer}."
        keys, values = split_kv_b(ours.pop(stem + _JOINT), config.num_heads, config.qk_nope_head_dim)
        ours |= {stem + _KEYS: keys.swapaxes(1, 2), stem + _VALUES: values}
    return {name: np.ascontiguousarray(ours[name]) for name in tensor_shapes(config) if name in ours}


def save_checkpoint(model: Model, folder: Path, tokenizer: Path | None = None) -> None:
    """A Hugging Face folder in float32: config.json, model.safetensors, and the tokenizer's files of another folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file(checkpoint_weights(model), partial, {"format": "pt"})
    partial.replace(folder / "model.safetensors")
    with whole_file(folder / "config.json") as file:
        json.dump(checkpoint_config(model.config), file, indent=1)
    for name in TOKENIZER_FILES if tokenizer else ():
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)


def checkpoint_weights(model: Model) -> dict[str, np.ndarray]:
    """The same by the names that checkpoints have: `quantize.source.names` read backwards."""
    config, tensors = model.config, file_tensors(model)
    biases = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(config.num_layers)}
    parts: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for source in list_sources(config, biases):
        pieces = np.split(tensors[source.name], len(source.parts)) if len(source.parts) > 1 else [tensors[source.name]]
        for part, piece in zip(source.parts, pieces, strict=True):
            piece = piece[0] if len(source.parts) > 1 else piece
            parts[part.weight].append((part.start, piece.T if part.is_transposed else piece))
    joined = {name: [rows for _, rows in sorted(found, key=lambda each: each[0])] for name, found in parts.items()}
    return {name: np.ascontiguousarray(np.concatenate(rows)) for name, rows in joined.items()}


def checkpoint_config(config: ModelConfig) -> dict[str, object]:
    """config.json of a model of DeepSeek-V3's type, which every sigmoid-routed one of the family is."""
    fixed = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "float32"}
    fixed |= {"num_key_value_heads": config.num_heads, "num_nextn_predict_layers": 0, "tie_word_embeddings": False}
    return {"_name_or_path": config.name} | fixed | config.to_json()


def save_gguf(model: Model, path: Path, metadata: dict[str, Value]) -> None:
    """A GGUF of float32, with another file's metadata (its tokenizer); replaces what is there."""
    f32, table = BY_NAME["F32"], model.config.table
    tensors = [
        FileTensor(file_name(name, table), array.shape, choose(name, array.shape, f32).layout, _opener(array))
        for name, array in file_tensors(model).items()
    ]
    write_gguf(path, metadata | model.config.metadata(), tensors, is_overwriting=True)


def _opener(array: np.ndarray) -> Callable[[], RowReader]:
    rows = array.reshape(-1, array.shape[-1])
    return lambda: lambda start, stop: rows[start:stop]
