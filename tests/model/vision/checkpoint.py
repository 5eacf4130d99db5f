"""Random Kimi K2.5 checkpoints of transformers with a small tower, and what transformers makes of patches."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

from kimi_lite.model.vision.patches import Grid, Patches

HIDDEN, HEADS, TEXT_HIDDEN, SIDE = 96, 4, 64, 8
_TEXT = {
    "model_type": "deepseek_v3",
    "hidden_size": TEXT_HIDDEN,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 300,
}
_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


@cache
def oracle(hidden: int = HIDDEN, heads: int = HEADS) -> Kimi_K25ForConditionalGeneration:
    """The same weights at every call, in float32."""
    vision = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "pos_emb_height": SIDE,
        "pos_emb_width": SIDE,
    }
    config = Kimi_K25Config(text_config=_TEXT, vision_config=vision, projection_hidden_size=hidden, **_TOKENS)
    model = Kimi_K25ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_gain = "norm" in name and name.endswith("weight")
            scale = 1.5 * weight[0].numel() ** -0.5 if weight.ndim > 1 and "pos_emb" not in name else 0.1
            weight.copy_(is_gain + noise * (0.5 if "pos_emb" in name else scale))
    return model


def write_checkpoint(folder: Path, **sizes: int) -> Path:
    oracle(**sizes).save_pretrained(folder)
    return folder


def random_patches(grid: Grid, seed: int = 0) -> Patches:
    pixels = np.random.default_rng(seed).integers(0, 256, (grid.num_patches, 3, 14, 14))
    return Patches(pixels.astype(np.uint8), grid)


@torch.no_grad()
def features(items: list[Patches], **sizes: int) -> list[np.ndarray]:
    """float32 (tokens, TEXT_HIDDEN) of each item, all of them in one batch."""
    model = oracle(**sizes).model
    pixels = np.concatenate([(item.pixels.astype(np.float32) / 255 - 0.5) / 0.5 for item in items])
    grids = torch.tensor([list(item.grid) for item in items])
    pooled = model.vision_tower(torch.from_numpy(pixels), grid_thw=grids).pooler_output
    rows = model.mm_projector(pooled).reshape(-1, TEXT_HIDDEN).numpy()
    counts = [Grid(*item.grid).num_tokens() for item in items]
    return np.split(rows, np.cumsum(counts)[:-1])
