"""MoonViT in numpy: random weights under the names of K2.5's and Kimi-VL's checkpoints, and what the tower makes of an
image."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, FEED_FORWARD, LAYERS, HEADS, GRID, TEXT_HIDDEN = 64, 96, 2, 4, 8, 256
_PROJECTOR = {
    "kimi_k25": ("mm_projector", "proj.0", "proj.2"),
    "kimi_vl": ("multi_modal_projector", "linear_1", "linear_2"),
}


def make_weights(kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every vision tensor of the checkpoint, float32."""
    d, tensors = HIDDEN, {}
    projector, first, second = _PROJECTOR[kind]
    matrices = {
        "vision_tower.patch_embed.proj": (d, 3, 14, 14),
        f"{projector}.{first}": (4 * d, 4 * d),
        f"{projector}.{second}": (TEXT_HIDDEN, 4 * d),
    }
    norms = ["vision_tower.encoder.final_layernorm", f"{projector}.pre_norm"]
    for layer in range(LAYERS):
        block = f"vision_tower.encoder.blocks.{layer}."
        norms += [f"{block}norm0", f"{block}norm1"]
        shapes = {"wqkv": (3 * d, d), "wo": (d, d), "mlp.fc0": (FEED_FORWARD, d), "mlp.fc1": (d, FEED_FORWARD)}
        matrices |= {block + name: shape for name, shape in shapes.items()}
    for name, shape in matrices.items():
        tensors[f"{name}.weight"] = rng.standard_normal(shape) * 1.5 / np.prod(shape[1:]) ** 0.5
        tensors[f"{name}.bias"] = rng.standard_normal(shape[0]) * 0.1
    for name in norms:
        tensors[f"{name}.weight"] = 1 + 0.1 * rng.standard_normal(d)
        tensors[f"{name}.bias"] = 0.1 * rng.standard_normal(d)
    tensors["vision_tower.patch_embed.pos_emb.weight"] = rng.standard_normal((GRID, GRID, d)) * 0.5
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_folder(folder: Path, kind: str, weights: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    vision = {"patch_size": 14, "init_pos_emb_height": GRID, "init_pos_emb_width": GRID, "merge_kernel_size": [2, 2]}
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    if kind == "kimi_k25":
        sizes = {f"vt_{name}": size for name, size in sizes.items()} | {
            "init_pos_emb_time": 4,
            "projector_ln_eps": 1e-5,
        }
    config = {"model_type": kind, "text_config": {"hidden_size": TEXT_HIDDEN}, "vision_config": vision | sizes}
    (folder / "config.json").write_text(json.dumps(config))


def encode_image(kind: str, weights: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """uint8 (112, 112, 3), as many patches as the position table has: (16, TEXT_HIDDEN). GELU by tanh throughout, as
    llama.cpp has it; the vendor's projector uses the exact one."""
    patches = (image / 127.5 - 1).reshape(GRID, 14, GRID, 14, 3).transpose(0, 2, 4, 1, 3).reshape(GRID * GRID, -1)
    filters = weights["vision_tower.patch_embed.proj.weight"].reshape(HIDDEN, -1)
    x = patches @ filters.T + weights["vision_tower.patch_embed.proj.bias"]
    x = x + weights["vision_tower.patch_embed.pos_emb.weight"].reshape(-1, HIDDEN)
    for layer in range(LAYERS):
        block = f"vision_tower.encoder.blocks.{layer}."
        x = x + _linear(
            _attend(_linear(_norm(x, weights, f"{block}norm0"), weights, f"{block}wqkv")), weights, f"{block}wo"
        )
        inner = _gelu(_linear(_norm(x, weights, f"{block}norm1"), weights, f"{block}mlp.fc0"))
        x = x + _linear(inner, weights, f"{block}mlp.fc1")
    projector, first, second = _PROJECTOR[kind]
    x = _norm(_norm(x, weights, "vision_tower.encoder.final_layernorm"), weights, f"{projector}.pre_norm")
    merged = x.reshape(GRID // 2, 2, GRID // 2, 2, HIDDEN).swapaxes(1, 2).reshape(-1, 4 * HIDDEN)
    return _linear(_gelu(_linear(merged, weights, f"{projector}.{first}")), weights, f"{projector}.{second}")


def _linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attend(qkv: np.ndarray) -> np.ndarray:
    """Every patch attends to every patch; pairs turn by column and row of the patch in turns."""
    head = HIDDEN // HEADS
    queries, keys, values = qkv.reshape(-1, 3, HEADS, head).swapaxes(0, 1)
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    frequencies = 10000.0 ** (-4 * np.arange(head // 4) / head)
    angles = np.stack([columns[:, None] * frequencies, rows[:, None] * frequencies], axis=-1).reshape(len(rows), 1, -1)
    queries, keys = (_rotate(each, np.exp(1j * angles)) for each in (queries, keys))
    scores = np.einsum("qhd,khd->hqk", queries, keys) / head**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, values).reshape(len(rows), -1)


def _rotate(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """x: (patches, heads, d) as pairs of neighbours; turns: complex (patches, 1, d / 2)."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
