"""Multi-head latent attention in files: its sizes in GGUF metadata and config.json, and the joint weight of its keys
and values.

Since the MLA tensors (2025) a GGUF file's key_length and value_length are the latent's, and the `_mla` keys are the
heads'. llama.cpp keeps the keys' half of `kv_b_proj` transposed, head by head; older files have the joint matrix.
"""

from typing import TYPE_CHECKING, TypeVar

from kimi_lite.arch.reader import Reader
from kimi_lite.gguf.metadata import Value, u32

if TYPE_CHECKING:
    from kimi_lite.arch.config import ModelConfig

_MAX_WIDTH, _MAX_HEADS = 1 << 20, 4096  # far beyond what exists: more is damage
_Array = TypeVar("_Array")  # numpy's or torch's
_JSON = (  # ModelConfig's name, config.json's, least and most
    ("num_heads", "num_attention_heads", 1, _MAX_HEADS),
    ("kv_lora_rank", "kv_lora_rank", 1, _MAX_WIDTH),
    ("qk_nope_head_dim", "qk_nope_head_dim", 1, _MAX_WIDTH),
    ("qk_rope_head_dim", "qk_rope_head_dim", 2, _MAX_WIDTH),
    ("v_head_dim", "v_head_dim", 1, _MAX_WIDTH),
)


def read_metadata(read: Reader) -> dict[str, int]:
    """The fields of ModelConfig from GGUF metadata. Raises KimiLiteError."""
    num_heads = read.integer("attention.head_count", 1, _MAX_HEADS)
    kv_lora_rank = read.integer("attention.kv_lora_rank", 1, _MAX_WIDTH)
    rope_dim = read.integer("rope.dimension_count", 2, _MAX_WIDTH)
    key_mla = read.integer("attention.key_length_mla", 0, _MAX_WIDTH, default=0)
    value_mla = read.integer("attention.value_length_mla", 0, _MAX_WIDTH, default=0)
    is_mla = key_mla > 0 and value_mla > 0
    if (key_mla or value_mla) and not is_mla:
        missing = "key" if value_mla else "value"
        raise read.error(f"attention.{missing}_length_mla", 0, "above 0, because the other of the two _mla keys is")
    needs = {"attention.head_count_kv": 1 if is_mla else num_heads}
    if is_mla:
        needs |= {"attention.key_length": kv_lora_rank + rope_dim, "attention.value_length": kv_lora_rank}
    for key, need in needs.items():
        if (have := read.integer(key, 1, _MAX_WIDTH, default=need)) != need:
            raise read.error(key, have, f"{need:,} in a file {'with' if is_mla else 'without'} the _mla keys")
    key_length = key_mla or read.integer("attention.key_length", 1, _MAX_WIDTH)
    if key_length <= rope_dim or rope_dim % 2:
        raise read.error(
            "rope.dimension_count", rope_dim, f"even and less than the key length of a head, {key_length:,}"
        )
    return {
        "num_heads": num_heads,
        "q_lora_rank": read.integer("attention.q_lora_rank", 0, _MAX_WIDTH, default=0),
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": key_length - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": value_mla or read.integer("attention.value_length", 1, _MAX_WIDTH),
    }


def read_json(read: Reader) -> dict[str, int]:
    """The fields of ModelConfig from config.json. Raises KimiLiteError."""
    sizes = {name: read.integer(json, low, high) for name, json, low, high in _JSON}
    return sizes | {"q_lora_rank": read.integer("q_lora_rank", 0, _MAX_WIDTH, default=0)}


def metadata(config: "ModelConfig") -> dict[str, Value]:
    """GGUF keys below the architecture's prefix: one key head as wide as the cached latent, and the heads' own
    sizes."""
    keys = {
        "attention.head_count": u32(config.num_heads),
        "attention.head_count_kv": u32(1),
        "attention.kv_lora_rank": u32(config.kv_lora_rank),
        "attention.key_length": u32(config.kv_latent_size),
        "attention.value_length": u32(config.kv_lora_rank),
        "attention.key_length_mla": u32(config.qk_head_dim),
        "attention.value_length_mla": u32(config.v_head_dim),
    }
    return keys | ({"attention.q_lora_rank": u32(config.q_lora_rank)} if config.q_lora_rank else {})


def json_fields(config: "ModelConfig") -> dict[str, object]:
    """The same in config.json's words."""
    return {json: getattr(config, name) for name, json, _, _ in _JSON} | {"q_lora_rank": config.q_lora_rank or None}


def split_kv_b(joint: _Array, num_heads: int, nope: int) -> tuple[_Array, _Array]:
    """A joint `attn_kv_b` (heads * (nope + v), row) as its keys (heads, nope, row) and values (heads, v, row): views of
    any array, whatever its rows are encoded as."""
    by_head = joint.reshape(num_heads, -1, joint.shape[-1])  # (H, nope + v, row)
    return by_head[:, :nope], by_head[:, nope:]
