"""The walk through layers: every matrix's inputs beside what transformers feeds the same modules."""

import numpy as np
import pytest

from kimi_lite.arch.config import ModelConfig
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.model.cpu.walk import LayerWalk
from kimi_lite.native.reference_types import dequantize
from kimi_lite.quantize.convert import convert
from tests.checkpoints import VOCAB_SIZE, make_checkpoint

CHUNKS = [np.arange(7, 107, dtype=np.int32) * 3 % VOCAB_SIZE, np.arange(40, dtype=np.int32) * 5 % 97]


class Kept:
    """Copies of the inputs by tensor and chunk: values (rows, k) in the order of the matrices, and the rows of each
    matrix."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[tuple[np.ndarray, np.ndarray | None, int]]] = {}

    def __call__(self, inputs) -> None:
        rows = slice(None) if inputs.rows is None else inputs.rows
        for name in inputs.weights:
            item = (inputs.values[rows].copy(), inputs.starts, inputs.num_tokens)
            self.inputs.setdefault(name, []).append(item)


@pytest.fixture(scope="module", params=["kimi", "moonlight"])
def walked(request, tmp_path_factory):
    """(transformers model, store, what the walk showed, layers it yielded)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_checkpoint(folder / "model", request.param, dtype="float32")
    convert(folder / "model", folder / "model.gguf", "f32")
    store = GGUFStore.open(folder / "model.gguf")
    walk = LayerWalk(store, ModelConfig.from_metadata(store.metadata), num_threads=2)
    kept = Kept()
    layers = list(walk.layers(CHUNKS, kept))
    walk.close()
    return model, store, kept.inputs, layers


def hook_inputs(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of every Linear, and of `norm` its output, by module name; float32 (T, k)."""
    import torch

    found = {}

    def keep(name: str):
        def hook(module, inputs, output):
            found[name] = inputs[0].detach().reshape(len(ids), -1).numpy()
            found[f"{name}>"] = (
                (output[0] if isinstance(output, tuple) else output).detach().reshape(len(ids), -1).numpy()
            )

        return hook

    wanted = [
        (name, module)
        for name, module in model.named_modules()
        if name.split(".")[-1].endswith(("_proj", "mqa", "norm", "mlp"))
    ]
    handles = [module.register_forward_hook(keep(name)) for name, module in wanted]
    with torch.no_grad():
        model(torch.from_numpy(ids.astype(np.int64))[None])
    for handle in handles:
        handle.remove()
    return found


def close(have: np.ndarray, want: np.ndarray) -> bool:
    return have.shape == want.shape and bool(np.abs(have - want).max() < 2e-3 * np.abs(want).max())


def test_linear_inputs(walked):
    model, _, shown, layers = walked
    assert layers == [0, 1, 2, 3]
    names = {
        "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj", "attn_q": "self_attn.q_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }  # fmt: skip
    for index, ids in enumerate(CHUNKS):
        want = hook_inputs(model, ids)
        num_compared = 0
        for layer in range(3):
            for ours, theirs in names.items():
                if f"model.layers.{layer}.{theirs}" in want:
                    values, starts, num_tokens = shown[f"blk.{layer}.{ours}.weight"][index]
                    assert starts is None and num_tokens == len(ids)
                    assert close(values, want[f"model.layers.{layer}.{theirs}"]), (layer, ours)
                    num_compared += 1
        assert num_compared >= 3 * 3 + 3 + 2 * 2
        assert close(shown["output.weight"][index][0], want["model.norm>"])


def test_expert_inputs(walked):
    """Each expert sees the tokens that chose it: its slots are its own tokens' normed states, and what SwiGLU makes of
    them."""
    model, _, shown, _ = walked
    for index, ids in enumerate(CHUNKS):
        want = hook_inputs(model, ids)
        for layer in (1, 2):
            mlp = model.model.layers[layer].mlp
            states = want[f"model.layers.{layer}.mlp"]
            values, starts, _ = shown[f"blk.{layer}.ffn_up_exps.weight"][index]
            hidden, hidden_starts, _ = shown[f"blk.{layer}.ffn_down_exps.weight"][index]
            assert starts[-1] == 3 * len(ids) and (starts == hidden_starts).all()
            gate_up = mlp.experts.gate_up_proj.detach().numpy()
            for expert in range(8):
                mine = values[starts[expert] : starts[expert + 1]]
                tokens = [int(np.abs(states - row).max(axis=1).argmin()) for row in mine]
                assert tokens == sorted(set(tokens))  # each token at most once, in order
                assert close(mine, states[tokens])
                gate, up = np.split(mine @ gate_up[expert].T, 2, axis=1)
                assert close(hidden[starts[expert] : starts[expert + 1]], gate / (1 + np.exp(-gate)) * up)


def test_head_inputs(walked):
    """attn_k_b takes the queries' unrotated part; attn_v_b what it makes attn_output's inputs of, for the last rows."""
    model, store, shown, _ = walked
    for index, ids in enumerate(CHUNKS):
        want = hook_inputs(model, ids)
        for layer in range(3):
            attention = f"model.layers.{layer}.self_attn."
            queries = want[f"{attention}q_b_proj>" if f"{attention}q_b_proj" in want else f"{attention}q_proj>"]
            values, starts, num_tokens = shown[f"blk.{layer}.attn_k_b.weight"][index]
            assert list(starts) == [len(ids) * head for head in range(5)] and num_tokens == len(ids)
            by_head = queries.reshape(len(ids), 4, -1)[:, :, :32]
            assert close(values, by_head.swapaxes(0, 1).reshape(-1, 32))
            contexts, starts, num_rows = shown[f"blk.{layer}.attn_v_b.weight"][index]
            view = store.tensor(f"blk.{layer}.attn_v_b.weight")
            v_b = dequantize(view.data.reshape(-1, view.data.shape[-1]), "F32").reshape(4, 32, -1)
            heads = want[f"{attention}o_proj"][-num_rows:].reshape(num_rows, 4, 32)
            for head in range(4):
                assert close(contexts[starts[head] : starts[head + 1]] @ v_b[head].T, heads[:, head])
