"""How `tests.checkpoints` puts a model on disk: as transformers saves it, as K2.5's INT4 experts, as DeepSeek's block
FP8.

The two quantized writers round the model's own weights to what the files hold, so the model stays the exact reference.
"""

import copy
import json
from pathlib import Path

_SHARD_BYTES = 4_000_000  # small, so that every checkpoint has several shards and an index
_GROUP = 32
_FP8_BLOCK = 128


def write_plain(path: Path, model, dtype: str) -> None:
    """As `save_pretrained` writes it: weights in `dtype`, the router bias float32 as in the real checkpoints."""
    import torch

    stored = copy.deepcopy(model)
    for parameter in stored.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    stored.config.dtype = dtype
    stored.save_pretrained(path, max_shard_size=_SHARD_BYTES)


def write_int4(path: Path, model) -> None:
    """K2.5's folder: text model under `language_model.`, routed experts pack-quantized in groups of 32, all else
    bf16."""
    import torch

    tensors = {"vision_tower.patch_embed.proj.bias": torch.ones(8, dtype=torch.bfloat16)}
    for name, weight in _original_tensors(model):
        stored = f"language_model.{name}"
        if ".experts." in name:
            tensors |= _pack_int4(stored.removesuffix(".weight"), weight)
        else:
            tensors[stored] = weight if name.endswith("e_score_correction_bias") else weight.to(torch.bfloat16)
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": _GROUP,
        "symmetric": True,
        "dynamic": False,
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    }
    text = _published_config(model, "kimi_k2") | {"quantization_config": quantization}
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": text["bos_token_id"] + 1,  # the real K2.5 file names [EOS], generation_config.json <|im_end|>
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {"patch_size": 14},
    }
    _write_folder(path, tensors, config)


def write_fp8(path: Path, model) -> None:
    """DeepSeek-V3's folder: every projection FP8 e4m3 with one float32 factor for each 128 x 128 block."""
    import torch

    tensors = {}
    for name, weight in _original_tensors(model):
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = _to_fp8(weight)
        else:
            tensors[name] = weight if name.endswith("e_score_correction_bias") else weight.to(torch.bfloat16)
    config = _published_config(model, "deepseek_v3") | {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    }
    _write_folder(path, tensors, config)


def _original_tensors(model):
    """Yields (published name, float32 weight); a weight is a view, so writing into it changes the model."""
    for name, weight in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            width = weight.shape[1] // 2
            for expert, both in enumerate(weight):
                stem = name.replace("gate_up_proj", str(expert))
                yield f"{stem}.gate_proj.weight", both[:width]
                yield f"{stem}.up_proj.weight", both[width:]
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(weight):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
        else:
            yield name, weight


def _pack_int4(stem: str, weight) -> dict:
    """Rounds `weight` (N, M) in place to INT4 codes -7..7 times bf16 scales, and returns its three tensors."""
    import torch
    from compressed_tensors.compressors import pack_to_int32

    groups = weight.unflatten(-1, (-1, _GROUP))  # (N, M / 32, 32)
    scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16)  # (N, M / 32)
    codes = (groups / scales.float()[..., None]).round().clamp(-7, 7).to(torch.int8)
    weight.copy_((codes * scales.float()[..., None]).flatten(-2))
    return {
        f"{stem}.weight_packed": pack_to_int32(codes.flatten(-2), 4),
        f"{stem}.weight_scale": scales,
        f"{stem}.weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def _to_fp8(weight):
    """Rounds `weight` (N, M) in place to FP8 blocks; returns the codes (N, M) and the factors (ceil(N/128),
    ceil(M/128))."""
    import torch

    factors = torch.empty(-(-weight.shape[0] // _FP8_BLOCK), -(-weight.shape[1] // _FP8_BLOCK))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            block = slice(i * _FP8_BLOCK, (i + 1) * _FP8_BLOCK), slice(j * _FP8_BLOCK, (j + 1) * _FP8_BLOCK)
            factors[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / factors[i, j]).to(torch.float8_e4m3fn)
            weight[block] = codes[block].float() * factors[i, j]
    return codes, factors


def _published_config(model, model_type: str) -> dict:
    """config.json with the older keys that Moonshot and DeepSeek publish: `rope_theta` and `rope_scaling`."""
    config = model.config.to_dict()
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    return config | {"model_type": model_type, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _write_folder(path: Path, tensors: dict, config: dict) -> None:
    """Two shards of alternating tensors with their index, and config.json."""
    from safetensors.torch import save_file

    shards: list[dict] = [{}, {}]
    for number, (name, tensor) in enumerate(tensors.items()):
        shards[number % 2][name] = tensor.contiguous()
    weight_map = {}
    for number, shard in enumerate(shards):
        file_name = f"model-{number + 1:05}-of-000002.safetensors"  # five digits of six, as K2.5's shards are named
        save_file(shard, path / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
