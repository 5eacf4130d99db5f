"""Which tensors a model must have and in which shapes: checked against the file before any weight is read.

A header can be sound and still not fit its metadata (a damaged `embedding_length`, a file of another size): then the
kernels would read past their rows. Files differ in three ways: `attn_k_b` and `attn_v_b` or the older joint
`attn_kv_b`, one `attn_q` or the compressed pair, separate or fused `ffn_gate_up_exps`. Called where a store and its
configuration meet.
"""

from collections.abc import Collection

from kimi_lite.arch.config import ModelConfig
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore

Shapes = dict[str, tuple[int, ...]]  # tensor name -> numpy order, the last axis is the input


def check_tensors(store: GGUFStore, config: ModelConfig) -> None:
    """Raise KimiLiteError if a tensor is missing or its shape is not what the metadata asks for."""
    for name, shape in tensor_shapes(config, store.tensors).items():
        have = store.tensor(name).shape
        if have != shape:
            problem = f"{store.path}: tensor {name} has shape {have}, and the metadata asks for {shape}"
            raise KimiLiteError(f"{problem}.", "The file is damaged or its metadata was edited: fetch it again.")


def tensor_shapes(config: ModelConfig, names: Collection[str]) -> Shapes:
    """Every tensor that is needed, in the variant that `names` (those of the file) shows."""
    c = config
    shapes: Shapes = {
        "token_embd.weight": (c.vocab_size, c.hidden_size),
        "output_norm.weight": (c.hidden_size,),
        "output.weight": (c.vocab_size, c.hidden_size),
    }
    for layer in range(c.num_layers):
        block = f"blk.{layer}"
        shapes |= _attention_shapes(block, c, names)
        shapes[f"{block}.ffn_norm.weight"] = (c.hidden_size,)
        if layer < c.num_dense_layers:
            shapes |= _feed_forward_shapes(f"{block}.ffn", "", (), c.feed_forward_size, c)
        else:
            shapes |= _expert_shapes(f"{block}.ffn", c, names)
            if f"{block}.exp_probs_b.bias" in names:  # softmax routers have none
                shapes[f"{block}.exp_probs_b.bias"] = (c.num_experts,)
    return shapes


def _attention_shapes(block: str, c: ModelConfig, names: Collection[str]) -> Shapes:
    shapes: Shapes = {
        f"{block}.attn_norm.weight": (c.hidden_size,),
        f"{block}.attn_kv_a_mqa.weight": (c.kv_latent_size, c.hidden_size),
        f"{block}.attn_kv_a_norm.weight": (c.kv_lora_rank,),
        f"{block}.attn_output.weight": (c.hidden_size, c.num_heads * c.v_head_dim),
    }
    if c.q_lora_rank:
        shapes[f"{block}.attn_q_a.weight"] = (c.q_lora_rank, c.hidden_size)
        shapes[f"{block}.attn_q_a_norm.weight"] = (c.q_lora_rank,)
        shapes[f"{block}.attn_q_b.weight"] = (c.num_heads * c.qk_head_dim, c.q_lora_rank)
    else:
        shapes[f"{block}.attn_q.weight"] = (c.num_heads * c.qk_head_dim, c.hidden_size)
    if f"{block}.attn_kv_b.weight" in names and f"{block}.attn_k_b.weight" not in names:
        shapes[f"{block}.attn_kv_b.weight"] = (c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    else:
        shapes[f"{block}.attn_k_b.weight"] = (c.num_heads, c.kv_lora_rank, c.qk_nope_head_dim)
        shapes[f"{block}.attn_v_b.weight"] = (c.num_heads, c.v_head_dim, c.kv_lora_rank)
    return shapes


def _expert_shapes(ffn: str, c: ModelConfig, names: Collection[str]) -> Shapes:
    shapes: Shapes = {f"{ffn}_gate_inp.weight": (c.num_experts, c.hidden_size)}
    shapes |= _feed_forward_shapes(ffn, "_exps", (c.num_experts,), c.expert_feed_forward_size, c)
    if f"{ffn}_gate_up_exps.weight" in names:
        gate, up = shapes.pop(f"{ffn}_gate_exps.weight"), shapes.pop(f"{ffn}_up_exps.weight")
        shapes[f"{ffn}_gate_up_exps.weight"] = (c.num_experts, gate[1] + up[1], c.hidden_size)
    if c.num_shared_experts:
        shapes |= _feed_forward_shapes(ffn, "_shexp", (), c.num_shared_experts * c.expert_feed_forward_size, c)
    return shapes


def _feed_forward_shapes(ffn: str, suffix: str, experts: tuple[int, ...], size: int, c: ModelConfig) -> Shapes:
    return {
        f"{ffn}_gate{suffix}.weight": (*experts, size, c.hidden_size),
        f"{ffn}_up{suffix}.weight": (*experts, size, c.hidden_size),
        f"{ffn}_down{suffix}.weight": (*experts, c.hidden_size, size),
    }
