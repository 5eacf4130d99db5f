"""What GGUF metadata says about a `deepseek2` model, read key by key: missing, of the wrong type or absurd is one
sentence.

Key names and types are llama.cpp's (llama-arch.cpp, gguf-py), the meaning of a missing key is what its loader does
(models/deepseek2.cpp), where nothing else is said.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kimi_lite.errors import KimiLiteError

ARCHITECTURE = "deepseek2"
METADATA_HINT = (
    "Its metadata is damaged or from an unknown converter: fetch the file again, or make it with kimi-lite quantize."
)

_FAMILY = "Kimi K2, K2-Thinking, K2.5, K2.6, Moonlight, Kimi-VL, DeepSeek-V2-Lite, V3 and R1"
_GATING = {1: "softmax", 2: "sigmoid"}  # llama.cpp's expert_gating_func; 0 is "not stated"
_SCALING = {"none": "none", "linear": "linear", "yarn": "yarn"}
_MAX_LAYERS, _MAX_WIDTH, _MAX_HEADS, _MAX_EXPERTS = (
    1024,
    1 << 20,
    4096,
    65_536,
)  # far beyond what exists: more is damage
_MAX_VOCAB, _MAX_CONTEXT = 1 << 24, 1 << 30


def read_deepseek2(metadata: Mapping[str, object], source: str) -> dict[str, object]:
    """The fields of ModelConfig by name (`rope` as a dict of RopeConfig's); `source` starts every sentence of
    KimiLiteError."""
    _check_architecture(metadata, source)
    read = MetadataReader(metadata, f"{ARCHITECTURE}.", source)
    num_blocks = read.integer("block_count", 1, _MAX_LAYERS)
    num_layers = num_blocks - read.integer("nextn_predict_layers", 0, num_blocks - 1, default=0)
    vocab_size = _vocab_size(read)
    return {
        "architecture": ARCHITECTURE,
        "name": "".join(filter(str.isprintable, str(metadata.get("general.name", ""))[:80])),  # it will be shown
        "num_layers": num_layers,
        "hidden_size": read.integer("embedding_length", 1, _MAX_WIDTH),
        **_attention_fields(read),
        "feed_forward_size": read.integer("feed_forward_length", 1, _MAX_WIDTH),
        **_expert_fields(read, num_layers, _default_gating(num_blocks, vocab_size)),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        "vocab_size": vocab_size,
        "context_length": read.integer("context_length", 1, _MAX_CONTEXT),
        "rope": _rope_fields(read),
    }


@dataclass(frozen=True, slots=True)
class MetadataReader:
    """Reads keys below `prefix` ("deepseek2."); `source` names the file in the sentences."""

    metadata: Mapping[str, object]
    prefix: str
    source: str

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`. An array of equal numbers (one for each layer) is that number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, value, f"a whole number from {low:,} to {high:,}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`."""
        value = self._value(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise self.error(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Mapping, default: object = None) -> object:
        """What `choices` holds for the value."""
        value = self._value(key, default)
        if not isinstance(value, (str, int)) or value not in choices:
            known = (
                str(choice) if choice == meaning else f"{choice} ({meaning})" for choice, meaning in choices.items()
            )
            raise self.error(key, value, f"one of {', '.join(known)}")
        return choices[value]

    def error(self, key: str, value: object, need: str) -> KimiLiteError:
        """`key` holds `value`, and must be `need`."""
        return KimiLiteError(
            f"{self.source}: {self.prefix}{key} is {_shown(value)}, and must be {need}.", METADATA_HINT
        )

    def _value(self, key: str, default: object) -> object:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise KimiLiteError(f"{self.source}: the metadata key {self.prefix}{key} is missing.", METADATA_HINT)
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.size and (value == value[0]).all():
            return value[0].item()
        return value


def _check_architecture(metadata: Mapping[str, object], source: str) -> None:
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if architecture is None:
        raise KimiLiteError(f"{source}: the metadata key general.architecture is missing.", METADATA_HINT)
    if not isinstance(kind, str) or kind != "model":
        problem = f"{source}: general.type is {_shown(kind)}, and a language model says 'model'"
        raise KimiLiteError(f"{problem}.", "Open the model itself; a vision part (mmproj) lies beside it.")
    if not isinstance(architecture, str) or architecture != ARCHITECTURE:
        problem = (
            f"{source}: general.architecture is {_shown(architecture)}, and {ARCHITECTURE!r} is the one that runs here"
        )
        raise KimiLiteError(f"{problem}.", f"That is {_FAMILY}. Other models run in llama.cpp.")


def _shown(value: object) -> str:
    """A value from a file as it may be printed: short, control characters escaped."""
    return repr(value[:80]) if isinstance(value, str) else str(value)[:80].replace("\n", " ")


def _vocab_size(read: MetadataReader) -> int:
    """The stated size, else the number of tokens (as llama.cpp does)."""
    tokens = read.metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) and tokens else None
    size = read.integer("vocab_size", 1, _MAX_VOCAB, default=num_tokens)
    if num_tokens is not None and num_tokens > size:
        raise read.error("vocab_size", size, f"at least the {num_tokens:,} entries of tokenizer.ggml.tokens")
    return size


def _attention_fields(read: MetadataReader) -> dict[str, int]:
    """Per-head sizes. Since the MLA tensors (2025) key_length and value_length are the latent's, and `_mla` keys the
    heads'."""
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


def _default_gating(num_blocks: int, vocab_size: int) -> str:
    """Files older than the gating key are softmax, but for GLM-4.7-Flash, which llama.cpp knows by its size."""
    return "sigmoid" if num_blocks in (47, 48) and vocab_size == 154_880 else "softmax"


def _expert_fields(read: MetadataReader, num_layers: int, default_gating: str) -> dict[str, object]:
    num_experts = read.integer("expert_count", 0, _MAX_EXPERTS, default=0)
    has_experts = num_experts > 0
    default = None if has_experts else 0  # a model without experts need not say anything about them
    low = 1 if has_experts else 0
    num_groups = read.integer("expert_group_count", 0, _MAX_EXPERTS, default=0) or 1
    used_groups = read.integer("expert_group_used_count", 0, _MAX_EXPERTS, default=0 if num_groups == 1 else None)
    states_gating = read.integer("expert_gating_func", 0, 255, default=0) > 0
    return {
        "num_dense_layers": read.integer("leading_dense_block_count", 0, num_layers, default=0),
        "num_experts": num_experts,
        "num_experts_used": read.integer("expert_used_count", low, _MAX_EXPERTS, default=default),
        "num_shared_experts": read.integer("expert_shared_count", 0, _MAX_EXPERTS, default=default),
        "expert_feed_forward_size": read.integer("expert_feed_forward_length", low, _MAX_WIDTH, default=default),
        "expert_weights_scale": read.number("expert_weights_scale", 0, 1e6, default=0.0) or 1.0,  # 0 says "off"
        "is_expert_weights_norm": read.flag("expert_weights_norm", default=False),
        "expert_gating": read.choice("expert_gating_func", _GATING) if states_gating else default_gating,
        "num_expert_groups": num_groups,
        "num_expert_groups_used": used_groups if num_groups > 1 else 1,
    }


def _rope_fields(read: MetadataReader) -> dict[str, object]:
    """The scaling keys as llama.cpp reads them, but for YaRN's betas, which it ignores and the original model code does
    not."""
    plain = {"freq_base": read.number("rope.freq_base", 1.0001, 1e12, default=10_000.0)}
    factor = read.number("rope.scaling.factor", 0, 1e6, default=0.0) or 1.0  # 0 says "off"
    scaling = read.choice("rope.scaling.type", _SCALING, default="linear")
    if scaling == "none" or (scaling == "linear" and factor == 1):
        return plain
    if scaling == "linear":
        return plain | {"scaling": scaling, "factor": factor}
    if (attention_factor := read.number("rope.scaling.attn_factor", -1e6, 1e6, default=1.0)) != 1:
        raise read.error("rope.scaling.attn_factor", attention_factor, "1, as in every model of the family")
    return plain | {
        "scaling": scaling,
        "factor": read.number("rope.scaling.factor", 1, 1e6),
        "original_context_length": read.integer("rope.scaling.original_context_length", 1, _MAX_CONTEXT),
        "beta_fast": read.number("rope.scaling.yarn_beta_fast", 1e-6, 1e6, default=32.0),
        "beta_slow": read.number("rope.scaling.yarn_beta_slow", 1e-6, 1e6, default=1.0),
        "log_multiplier": read.number("rope.scaling.yarn_log_multiplier", 0, 1e3, default=0.0),
    }
