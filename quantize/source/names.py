"""Hugging Face names and GGUF names of the deepseek family.

A GGUF tensor is made of parts of one or many checkpoint tensors: `attn_k_b` and `attn_v_b` are the two halves of
`kv_b_proj` for each head, and the experts of a layer are stacked. `list_sources` says which; `quantize.convert` reads
them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_GLOBALS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_LOW_RANK_QUERY = {
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
}
_PLAIN_QUERY = {"attn_q.weight": "self_attn.q_proj.weight"}
_DENSE = {f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
_SHARED = {f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
_ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight"}
_ROUTER_BIAS = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
VISION_PREFIXES = ("vision_tower.", "mm_projector.", "multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one checkpoint weight (rows counted over all axes but the last); `is_transposed` turns them
    round."""

    weight: str
    start: int
    stop: int
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A GGUF tensor, the shape it must have, and the parts it is made of, each giving the same number of rows."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def canonical_name(name: str) -> str | None:
    """The name as a bare text model has it, `model.layers.N...`; None for vision tensors. K2.5 writes
    `language_model.model.layers.N`, some exports `language_model.layers.N` or `model.language_model.layers.N`."""
    bare = name.removeprefix("model.") if name.startswith(("model.vision_tower.", "model.mm_projector.")) else name
    if bare.startswith(VISION_PREFIXES):
        return None
    bare = re.sub(r"^(model\.)?language_model\.", "", bare)
    return f"model.{bare}" if bare.startswith(("layers.", "embed_tokens.", "norm.")) else bare


def layer_number(name: str) -> int:
    """The layer of a canonical name, or -1 outside the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def file_order(name: str) -> int:
    """Where a GGUF tensor comes in the order in which a model runs: the embedding, layer after layer, the rest."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else (-1 if name == "token_embd.weight" else 1 << 30)


def list_sources(config: Mapping, names: Mapping[str, tuple[int, ...]]) -> Iterator[Source]:
    """Every tensor of the GGUF file in its order. `names` has the checkpoint's canonical names and shapes; a source may
    ask for one that is not there, which the caller reports."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    is_tied = config.get("tie_word_embeddings") and _GLOBALS["output.weight"] not in names
    output = _GLOBALS["token_embd.weight" if is_tied else "output.weight"]
    yield _whole("token_embd.weight", _GLOBALS["token_embd.weight"], (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        yield from _list_layer(config, names, layer)
    yield _whole("output_norm.weight", _GLOBALS["output_norm.weight"], (hidden,))
    yield _whole("output.weight", output, (vocab, hidden))


def _list_layer(config: Mapping, names: Mapping, layer: int) -> Iterator[Source]:
    stem, blk = f"model.layers.{layer}.", f"blk.{layer}."
    is_dense = layer < config["first_k_dense_replace"]
    shapes = _shapes(config)
    table = _ATTENTION | (_LOW_RANK_QUERY if config.get("q_lora_rank") else _PLAIN_QUERY)
    table |= _DENSE if is_dense else _SHARED | _ROUTER
    if not is_dense and stem + _ROUTER_BIAS["exp_probs_b.bias"] in names:
        table |= _ROUTER_BIAS
    for ours, theirs in table.items():
        yield _whole(blk + ours, stem + theirs, shapes[ours])
    yield from _split_kv_b(config, f"{stem}self_attn.kv_b_proj.weight", blk)
    if not is_dense:
        yield from _stack_experts(config, names, f"{stem}mlp.experts.", blk)


def _shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    hidden, heads, dense, expert = (config[key] for key in _SIZE_KEYS)
    latent, rope, q_lora = config["kv_lora_rank"], config["qk_rope_head_dim"], config.get("q_lora_rank") or 0
    queries = heads * (config["qk_nope_head_dim"] + rope)
    shared, num_experts = expert * config["n_shared_experts"], config["n_routed_experts"]
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (queries, hidden),
        "attn_q_a.weight": (q_lora, hidden),
        "attn_q_a_norm.weight": (q_lora,),
        "attn_q_b.weight": (queries, q_lora),
        "attn_kv_a_mqa.weight": (latent + rope, hidden),
        "attn_kv_a_norm.weight": (latent,),
        "attn_output.weight": (hidden, heads * config["v_head_dim"]),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (dense, hidden),
        "ffn_up.weight": (dense, hidden),
        "ffn_down.weight": (hidden, dense),
        "ffn_gate_shexp.weight": (shared, hidden),
        "ffn_up_shexp.weight": (shared, hidden),
        "ffn_down_shexp.weight": (hidden, shared),
        "ffn_gate_inp.weight": (num_experts, hidden),
        "exp_probs_b.bias": (num_experts,),
    }


_SIZE_KEYS = ("hidden_size", "num_attention_heads", "intermediate_size", "moe_intermediate_size")


def _whole(name: str, weight: str, shape: tuple[int, ...]) -> Source:
    return Source(name, shape, (Part(weight, 0, shape[0] if len(shape) > 1 else 1),))


def _split_kv_b(config: Mapping, weight: str, blk: str) -> Iterator[Source]:
    """`kv_b_proj` has for each head its nope key rows, then its value rows. llama.cpp keeps the keys transposed."""
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    starts = range(0, heads * (nope + value), nope + value)
    keys = tuple(Part(weight, start, start + nope, is_transposed=True) for start in starts)
    values = tuple(Part(weight, start + nope, start + nope + value) for start in starts)
    yield Source(f"{blk}attn_k_b.weight", (heads, latent, nope), keys)
    yield Source(f"{blk}attn_v_b.weight", (heads, value, latent), values)


def _stack_experts(config: Mapping, names: Mapping, stem: str, blk: str) -> Iterator[Source]:
    """The experts of a layer one after another; read from `experts.E.gate_proj`, or from transformers' own stacked
    tensors, where an expert's gate rows come before its up rows."""
    num, hidden, width = config["n_routed_experts"], config["hidden_size"], config["moe_intermediate_size"]
    is_stacked = f"{stem}gate_up_proj" in names
    for part, (rows, row) in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
        if is_stacked:
            weight, stride = (f"{stem}down_proj", hidden) if part == "down" else (f"{stem}gate_up_proj", 2 * width)
            first = width if part == "up" else 0
            parts = tuple(Part(weight, first + stride * e, first + stride * e + rows) for e in range(num))
        else:
            parts = tuple(Part(f"{stem}{e}.{part}_proj.weight", 0, rows) for e in range(num))
        yield Source(f"{blk}ffn_{part}_exps.weight", (num, rows, row), parts)
