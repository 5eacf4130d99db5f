"""Muon's update is torch's own; QK-Clip bounds what it must and touches nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.tools.train.model import Model, named_weights
from kimi_lite.tools.train.muonclip import Muon, MuonClip, balance, clip_logits, is_hidden, orthogonalize
from tests.tools.train.small import SMALL, small_model


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 9)])
def test_updates_equal_those_of_torch(shape):
    """Bit for bit of bfloat16's rounding: sums of products may be ordered otherwise in a batched product."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    muon = Muon([ours], lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    assert (ours - theirs).abs().max() < 0.01 * (theirs - 1).abs().max()


def test_stacked_experts_are_matrices_of_their_own():
    stack = torch.randn(5, 24, 16, generator=torch.Generator().manual_seed(1))
    together = orthogonalize(stack)
    assert all(torch.equal(together[i], orthogonalize(stack[i])) for i in range(5))
    spectra = torch.linalg.svdvals(together.float())
    assert spectra.min() > 0.6 and spectra.max() < 1.3
    weight = torch.nn.Parameter(torch.zeros(5, 24, 16))
    weight.grad = stack
    Muon([weight], lr=1.0, weight_decay=0.0).step()
    rms = weight.detach().square().mean((1, 2)).sqrt()
    assert rms == pytest.approx([0.2] * 5, rel=0.15)  # as AdamW's updates


def test_who_trains_what():
    model = small_model()
    hidden = {name.rpartition(".")[2] for name, _ in model.named_parameters() if is_hidden(name)}
    assert hidden >= {"attn_q_b", "attn_kv_b", "ffn_gate_exps", "ffn_gate_inp", "ffn_down_shexp", "attn_output"}
    rest = {name.rpartition(".")[2] for name, _ in model.named_parameters() if not is_hidden(name)}
    assert rest == {"token_embd", "output", "output_norm", "attn_norm", "ffn_norm", "attn_q_a_norm", "attn_kv_a_norm"}
    trained = {
        id(p) for o in MuonClip.of(model, "muonclip", 0.1).optimizers for g in o.param_groups for p in g["params"]
    }
    assert trained == {id(parameter) for parameter in model.parameters()}


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.floats(1.0, 30.0),
    tau=st.floats(0.5, 200.0),
    q_lora_rank=st.sampled_from([0, 24]),
    heads=st.integers(1, 5),
    nope=st.sampled_from([4, 16]),
    rope=st.sampled_from([2, 8]),
)
def test_clipped_heads_end_at_tau_and_the_others_stay(seed, size, tau, q_lora_rank, heads, nope, rope):
    """Layer 0 sees the same input before and after: its logits are bounded exactly, whatever the sizes."""
    config = replace(SMALL, q_lora_rank=q_lora_rank, num_heads=heads, qk_nope_head_dim=nope, qk_rope_head_dim=rope)
    model = Model(config).initialize(seed)
    ids = torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        query = model.blk[0].attn_q_b if q_lora_rank else model.blk[0].attn_q
        for weight in (query, model.blk[0].attn_kv_b, model.blk[0].attn_kv_a_mqa):
            weight.mul_(size)
        before = {name: weight.clone() for name, weight in named_weights(model)}
        seen = model(ids).max_logits
        num_clipped = clip_logits(model, seen, tau)
        after = model(ids).max_logits
    assert num_clipped == int((seen > tau).sum())
    assert torch.allclose(after[0], seen[0].clamp(max=tau), rtol=1e-4, atol=1e-4)
    changed = {name for name, weight in named_weights(model) if not torch.equal(weight, before[name])}
    may_change = {"attn_q_b.weight" if q_lora_rank else "attn_q.weight", "attn_kv_b.weight"}
    assert {name.partition(".")[2].partition(".")[2] for name in changed} <= may_change
    for layer, layer_seen in enumerate(seen):
        weight, old = model.blk[layer].attn_kv_b, before[f"blk.{layer}.attn_kv_b.weight"]
        by_head = (weight != old).view(heads, config.kv_head_dim, -1).any(-1)
        assert not by_head[:, nope:].any()  # values
        assert not by_head[layer_seen <= tau].any()


def test_balance_moves_biases_towards_less_loaded_experts():
    model = small_model()
    loads = torch.tensor([[9, 1, 4, 2], [4, 4, 4, 4]])
    balance(model, loads)
    assert model.blk[1].exp_probs_b.tolist() == pytest.approx([-1e-3, 1e-3, 0, 1e-3])
    assert model.blk[2].exp_probs_b.tolist() == [0, 0, 0, 0]
    assert math.isclose(float(model.blk[1].exp_probs_b.sum()), 1e-3, rel_tol=1e-5)
