"""The models of the family by name, with their exact dimensions: a plan needs no download.

Numbers: each model's published config.json. `quantize` reads the same facts from a checkpoint, a test compares them.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches

from kimi_lite.arch.config import ModelConfig, RopeConfig
from kimi_lite.arch.moonvit import MoonViT
from kimi_lite.errors import KimiLiteError

_K2_ROPE = RopeConfig(50_000.0, "yarn", 64.0, 4096, 32.0, 1.0, 0.1)
_K2_THINKING_ROPE = replace(_K2_ROPE, beta_fast=1.0)
_V3_ROPE = RopeConfig(10_000.0, "yarn", 40.0, 4096, 32.0, 1.0, 0.1)
K2_5_TOWER = MoonViT(
    projector="kimik25",
    hidden=1152,
    feed_forward=4304,
    layers=27,
    heads=16,
    patch=14,
    height=64,
    width=64,
    time=4,
    merge=2,
    eps=1e-5,
    text_hidden=7168,
)
KIMI_VL_TOWER = replace(K2_5_TOWER, projector="kimivl", time=1, text_hidden=2048)

K2_5 = ModelConfig(
    architecture="deepseek2",
    name="Kimi K2.5",
    num_layers=61,
    hidden_size=7168,
    num_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    feed_forward_size=18_432,
    num_dense_layers=1,
    num_experts=384,
    num_experts_used=8,
    num_shared_experts=1,
    expert_feed_forward_size=2048,
    expert_weights_scale=2.827,
    is_expert_weights_norm=True,
    expert_gating="sigmoid",
    num_expert_groups=1,
    num_expert_groups_used=1,
    rms_norm_eps=1e-5,
    vocab_size=163_840,
    context_length=262_144,
    rope=_K2_ROPE,
)
_V3 = replace(
    K2_5,
    name="DeepSeek-V3",
    num_heads=128,
    num_dense_layers=3,
    num_experts=256,
    num_expert_groups=8,
    num_expert_groups_used=4,
    expert_weights_scale=2.5,
    rms_norm_eps=1e-6,
    vocab_size=129_280,
    context_length=163_840,
    rope=_V3_ROPE,
)
_MOONLIGHT = replace(
    K2_5,
    name="Moonlight-16B-A3B",
    num_layers=27,
    hidden_size=2048,
    num_heads=16,
    q_lora_rank=0,
    feed_forward_size=11_264,
    num_experts=64,
    num_experts_used=6,
    num_shared_experts=2,
    expert_feed_forward_size=1408,
    expert_weights_scale=2.446,
    context_length=8192,
    rope=RopeConfig(50_000.0),
)
_V2_LITE = replace(
    _MOONLIGHT,
    name="DeepSeek-V2-Lite",
    feed_forward_size=10_944,
    expert_weights_scale=1.0,
    is_expert_weights_norm=False,
    expert_gating="softmax",
    rms_norm_eps=1e-6,
    vocab_size=102_400,
    context_length=163_840,
    rope=replace(_V3_ROPE, log_multiplier=0.0707),
)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """`aliases` are other names that people type; `tower`: its vision tower, if it has one."""

    config: ModelConfig
    aliases: tuple[str, ...] = ()
    tower: MoonViT | None = None
    has_int4_experts: bool = False  # published with 4-bit experts, so `q4_0-lossless` keeps them exactly

    @property
    def vision_bytes(self) -> int:
        """Of the tower in bfloat16, as it is published; 0 without one."""
        return 2 * self.tower.num_weights if self.tower else 0


KNOWN: dict[str, KnownModel] = {
    "kimi-k2.5": KnownModel(K2_5, ("k2.5", "kimi-k25"), K2_5_TOWER, True),
    "kimi-k2.6": KnownModel(replace(K2_5, name="Kimi K2.6"), ("k2.6", "kimi-k26"), K2_5_TOWER, True),
    "kimi-k2.7-code": KnownModel(replace(K2_5, name="Kimi K2.7 Code"), ("k2.7-code", "k2.7"), K2_5_TOWER, True),
    "kimi-k2-thinking": KnownModel(
        replace(K2_5, name="Kimi K2 Thinking", rope=_K2_THINKING_ROPE), ("k2-thinking",), has_int4_experts=True
    ),
    "kimi-k2": KnownModel(
        replace(
            K2_5,
            name="Kimi K2 Instruct",
            rms_norm_eps=1e-6,
            context_length=131_072,
            rope=replace(_K2_THINKING_ROPE, factor=32.0),
        ),
        ("k2", "kimi-k2-instruct"),
    ),
    "moonlight": KnownModel(_MOONLIGHT, ("moonlight-16b-a3b",)),
    "kimi-vl": KnownModel(
        replace(_MOONLIGHT, name="Kimi-VL-A3B", context_length=131_072, rope=RopeConfig(800_000.0)),
        ("kimi-vl-a3b",),
        KIMI_VL_TOWER,
    ),
    "deepseek-v3": KnownModel(_V3, ("v3", "deepseek-v3.1")),
    "deepseek-r1": KnownModel(replace(_V3, name="DeepSeek-R1"), ("r1",)),
    "deepseek-v2-lite": KnownModel(_V2_LITE, ("v2-lite",)),
}


def slice_of(
    config: ModelConfig, num_dense_layers: int, num_moe_layers: int, num_experts: int, vocab_size: int
) -> ModelConfig:
    """The model with fewer layers, experts or tokens: one of its layers costs what a layer of the whole model does.
    Raises KimiLiteError where the numbers contradict each other."""
    num_layers = num_dense_layers + num_moe_layers
    return replace(
        config,
        name=f"{config.name}, random slice of {num_layers} layers",
        num_layers=num_layers,
        num_dense_layers=num_dense_layers,
        num_experts=num_experts,
        vocab_size=vocab_size,
    )


def find_known(name: str) -> KnownModel | None:
    """The model that a user means by `name`, in any case; None where it is none."""
    wanted = name.strip().lower().replace("_", "-").removesuffix("-gguf")
    return next((known for key, known in KNOWN.items() if wanted in (key, *known.aliases)), None)


def unknown_model(name: str) -> KimiLiteError:
    """Says that `name` is neither a file nor a model, and what is near it."""
    near = get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]}? " if near else ""
    return KimiLiteError(
        f"{name} is no file or folder, and no model known by name.", f"{guess}Known are {', '.join(KNOWN)}."
    )
