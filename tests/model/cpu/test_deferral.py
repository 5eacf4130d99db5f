"""Expert deferral on the CPU path: against plain sums in numpy, and where it must change nothing."""

import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.kv.pages import KVCache
from kimi_lite.model.batch import Batch, SequenceSlice
from kimi_lite.model.cpu.layers import Layers
from kimi_lite.model.cpu.ops import make_program
from kimi_lite.native.cpu.defer import divide_op
from kimi_lite.native.cpu.matrix import dequantize
from kimi_lite.native.cpu.program import Program
from kimi_lite.native.cpu.run import RunTable
from kimi_lite.native.cpu.threads import Team
from tests.model.runner import Runner, relative_error
from tests.tiny import write_tiny_gguf

SHAPES = {"kimi": {}, "no shared": {"num_shared_experts": 0}, "two dense": {"num_dense_layers": 2, "num_layers": 5}}


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 290, 24)


def path_of(tmp_path, **sizes):
    return write_tiny_gguf(
        tmp_path / "tiny.gguf", np.random.default_rng(0), **{"num_layers": 4, "num_experts_used": 4} | sizes
    )


def decode_by_hand(path, ids, num_deferred):
    """Hidden states behind the last layer of each token, (T, D): attention and routers as they are, and the experts
    that the router ranks last in numpy, one layer later."""
    with Runner(path, num_threads=1) as runner:
        store, config = runner.store, runner.config
        layers = Layers(store, config, KVCache(config.num_layers, config.kv_latent_size, 4, "f32"), 1)
        found = [_token_by_hand(layers, store, config, int(token), i, num_deferred) for i, token in enumerate(ids)]
        layers.close()
    return np.stack(found)


def _token_by_hand(layers, store, config, token, position, num_deferred):
    pages = np.arange(4, dtype=np.int32)
    whole = (SequenceSlice(0, 1, pages, is_generated=True),)
    layers.prepare(Batch(np.array([token], np.int32), np.array([position], np.int32), np.ones(1, bool), whole))
    layers.team.run(make_program(layers.embedding_ops()))
    x, owed = layers.buffers.x, 0.0
    for layer in range(config.num_layers):
        layers.team.run(make_program(layers.attention_ops(layer)))
        feed_forward = layers.feed_forward[layer]
        if feed_forward.is_dense:
            layers.team.run(make_program(feed_forward.ops(layers.run, layers.buffers)))
            continue
        layers.team.run(make_program(feed_forward.choice_ops(layers.run, x, layers.buffers.router)))
        router = layers.buffers.router
        normed = router.normed.values[0].astype(np.float64)
        parts = [
            w * expert(store, layer, int(e), normed) for e, w in zip(router.ids[0], router.weights[0], strict=True)
        ]
        num_now = len(parts) - (num_deferred if layer < config.num_layers - 1 else 0)
        shared = shared_expert(store, layer, normed) if config.num_shared_experts else 0.0
        x[0] += (sum(parts[:num_now]) + shared + owed).astype(np.float32)
        owed = sum(parts[num_now:]) if num_now < len(parts) else 0.0
    return x[0].copy()


def matrices_of(store, names):
    """float64 (experts, rows, columns), or without the first where there are none."""
    found = []
    for tensor in map(store.tensor, names):
        rows = dequantize(np.ascontiguousarray(tensor.data).reshape(-1, tensor.data.shape[-1]), tensor.layout.name)
        found.append(rows.reshape(*tensor.data.shape[:-1], -1).astype(np.float64))
    return found


def expert(store, layer, number, normed):
    gate, up, down = matrices_of(store, [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")])
    return feed_forward(gate[number], up[number], down[number], normed)


def shared_expert(store, layer, normed):
    return feed_forward(
        *matrices_of(store, [f"blk.{layer}.ffn_{p}_shexp.weight" for p in ("gate", "up", "down")]), normed
    )


def feed_forward(gate, up, down, normed):
    g = gate @ normed
    return down @ (g / (1 + np.exp(-g)) * (up @ normed))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_deferred_is_added_one_layer_later(shape, tmp_path, ids):
    path = path_of(tmp_path, **SHAPES[shape])
    for num_deferred in (1, 2):
        with Runner(path, num_threads=2, num_deferred_experts=num_deferred, defers_on_cpu=True) as runner:
            have = []
            for i in range(6):
                runner.decode(ids[i : i + 1], start=i)
                have.append(runner.transformer._buffers.x[0].copy())
        want, plain = decode_by_hand(path, ids[:6], num_deferred), decode_by_hand(path, ids[:6], 0)
        assert relative_error(np.stack(have), want) < 1e-4
        assert relative_error(np.stack(have), plain) > 1e-3, "it changes something"


def test_prompts_are_the_same_and_so_are_other_sequences_batches(tmp_path, ids):
    """Only generated tokens are deferred, also where prompts run with them; and alone or together is the same."""
    path = path_of(tmp_path)
    with Runner(path) as plain:
        want_prompt = plain.prefill(ids[:20])
    with Runner(path, num_deferred_experts=2, defers_on_cpu=True) as runner:
        assert np.array_equal(runner.prefill(ids[:20]), want_prompt)
        alone = runner.decode(ids[20:22], start=20)
        other = np.arange(4, 8, dtype=np.int32)
        runner.prefill(ids[:20])
        first = runner.forward((ids[20:21], 20, runner.pages), (ids[:3], 0, other), num_generated=1)
        second = runner.forward((ids[21:22], 21, runner.pages), (ids[3:6], 3, other), num_generated=1)
        assert np.array_equal(first[0], alone[0]) and np.array_equal(second[0], alone[1])
        assert np.array_equal(np.concatenate([first[1:], second[1:]])[:3], want_prompt[:3])


def test_one_layer_of_experts_has_no_later_one(tmp_path, ids):
    path = path_of(tmp_path, num_layers=2, num_dense_layers=1)
    with Runner(path) as plain, Runner(path, num_deferred_experts=1, defers_on_cpu=True) as runner:
        assert np.array_equal(runner.decode(ids[:4]), plain.decode(ids[:4]))


def test_on_the_cpu_alone_it_is_not_done(tmp_path, ids):
    """Nothing would be gained; and a token keeps at least one expert of its layer."""
    path = path_of(tmp_path)
    with Runner(path) as plain, Runner(path, num_deferred_experts=1) as runner:
        assert np.array_equal(runner.decode(ids[:4]), plain.decode(ids[:4]))
    with pytest.raises(KimiLiteError, match="--defer-experts is 4"):
        Runner(path, num_deferred_experts=4, defers_on_cpu=True)


def test_choices_are_divided():
    rng, top_k = np.random.default_rng(0), 5
    run, team = RunTable(9, 2, 64), Team(2)
    chosen = rng.integers(0, 99, (9, top_k)).astype(np.int32)
    for num_deferred, num_tokens, num_generated in ((1, 9, 9), (4, 9, 3), (2, 4, 0)):
        now, later = np.full((2, 9, top_k), -7, np.int32)
        run.set_tokens(np.zeros(num_tokens, np.int32), num_generated)
        team.run(Program([divide_op(run, chosen, now, later, num_deferred)]))
        is_later = (np.arange(top_k) >= top_k - num_deferred) & (np.arange(num_tokens) < num_generated)[:, None]
        assert np.array_equal(now[:num_tokens], np.where(is_later, -1, chosen[:num_tokens]))
        assert np.array_equal(later[:num_tokens], np.where(is_later, chosen[:num_tokens], -1))
        assert (now[num_tokens:] == -7).all() and (later[num_tokens:] == -7).all()
    team.close()
