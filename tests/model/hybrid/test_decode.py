"""A decode step as one piece, in which the GPU and the CPU's experts take turns: as layer by layer, and what happens
when one of the two fails."""

import ctypes
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.arch.sizes import store_sizes
from kimi_lite.errors import KimiLiteError
from kimi_lite.experts.gpu_streams import GpuStreams
from kimi_lite.model.batch import Batch
from kimi_lite.model.hybrid import decode, transformer
from kimi_lite.model.hybrid.kernels import MAX_DECODE_TOKENS
from kimi_lite.model.hybrid.step import StepInputs, num_pages_seen
from kimi_lite.model.hybrid.turns import Turn
from kimi_lite.native.cpu import turns
from kimi_lite.native.cpu.program import Op, Program
from kimi_lite.native.cpu.turns import TurnTable, answer_op, wait_for_x_op
from kimi_lite.native.gpu.arguments import Routes
from kimi_lite.native.turn_cells import CHOICES_POSTED, X_POSTED
from kimi_lite.plan.workspace import pinned_block_bytes, pinned_bytes
from tests.model.hybrid import stand_in
from tests.model.hybrid.lazy_device import poison
from tests.model.hybrid.runner import CHUNK_TOKENS, DEVICE, HybridRunner
from tests.model.hybrid.stand_in import StandInKernels
from tests.model.hybrid.test_hybrid import _one_thread, only_rows  # noqa: F401
from tests.model.runner import NUM_PAGES
from tests.tiny import write_tiny_gguf

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="bit for bit, and with failures, on the stand-in alone")
SLICE = 2  # pages of a sequence of the stories


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Its experts read x in eight bits, which the CPU makes before it knows the choices."""
    sizes = {"num_layers": 4, "expert_feed_forward_size": 32, "hidden_size": 64, "num_heads": 2}
    sizes["types"] = {"_exps": "Q8_0"}
    return write_tiny_gguf(tmp_path_factory.mktemp("decode") / "tiny.gguf", np.random.default_rng(7), **sizes)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, 290, 200)


@pytest.fixture(scope="module")
def pair(path):
    """The same model twice: one decodes in whole steps, the other layer by layer, without slots."""
    with only_rows(HybridRunner(path, num_gpu_experts=7, num_threads=2)) as runner, HybridRunner(path) as plain:
        plain.transformer._forward_short = by_layer(only_rows(plain))
        yield runner, plain


def by_layer(runner: HybridRunner) -> Callable[[Batch, None], np.ndarray]:
    """The same padded step as a long batch goes: the host asks for each layer's experts."""
    model = runner.transformer

    def forward(batch: Batch, x: None) -> np.ndarray:
        shape = decode.rows_for(len(batch.token_ids)), decode.pages_for(num_pages_seen(batch))
        inputs = StepInputs(model.config, model._streams, *shape)
        inputs.set(model._embed(batch, shape[0]), model._maker.host_step(batch, (), *shape))
        inputs.upload()
        for layer in model.layers:
            layer.forward(inputs.x, inputs.step, model.experts)
        return model.head.forward(inputs.x)[: len(batch.token_ids)].numpy()

    return forward


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_a_step_equals_layer_by_layer(pair, ids, sizes, seed):
    """Bit for bit: steps of 1 to 16 tokens of one to six sequences, contexts that grow over a graph's pages, promotions
    at random and given up in between."""
    runner, plain = pair
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 90, NUM_PAGES // SLICE)
    slots, budget = runner.transformer.experts.slots, runner.transformer._adaptive._budget
    for size in sizes:
        counts = rng.multinomial(size, np.ones(len(starts)) / len(starts))
        parts = [
            (ids[start : start + count], int(start), np.arange(SLICE * i, SLICE * (i + 1), dtype=np.int32))
            for i, (start, count) in enumerate(zip(starts, counts, strict=True))
            if count
        ]
        assert np.array_equal(runner.forward(*parts), plain.forward(*parts)), (size, seed)
        starts = (starts + counts) % 100
        budget.budget = int(rng.integers(0, 5))
        if rng.random() < 0.2:
            slots.cancel()


def test_promotions_came_and_went(pair):
    """What the stories above are about has happened."""
    counters = pair[0].transformer.counters()
    assert counters["gpu_expert_hits"] > 20 and counters["gpu_expert_misses"] > 20
    assert counters["expert_promotions"] > 7 and counters["cpu_experts_s"] > 0


def test_shapes_come_and_go(path, ids, monkeypatch):
    """More shapes than are kept, by tokens and by pages."""
    monkeypatch.setattr(transformer, "pages_for", lambda num_pages: num_pages)
    with only_rows(HybridRunner(path, num_gpu_experts=5)) as runner, only_rows(HybridRunner(path)) as plain:
        plain.transformer._forward_short = by_layer(plain)
        for start in (0, 70, 130, 0, 190, 64):
            for count in (1, 3, 9):
                parts = (np.resize(ids, start + count)[start:], start, np.arange(NUM_PAGES, dtype=np.int32))
                assert np.array_equal(runner.forward(parts), plain.forward(parts)), (start, count)
        assert len(runner.transformer._steps) == transformer.DECODE_SHAPES


def test_logits_of_all_shapes_come_in_one_block(path, ids, monkeypatch):
    """Pinned memory is what the plan says: for logits, inputs of as many shapes as are kept, and everything else."""
    shapes, pinned = [], GpuStreams.pinned

    def remember(streams: GpuStreams, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        shapes.append((shape, dtype.itemsize))
        return pinned(streams, shape, dtype)

    monkeypatch.setattr(GpuStreams, "pinned", remember)
    with only_rows(HybridRunner(path, num_gpu_experts=5)) as runner:
        pages = [np.array([i], np.int32) for i in range(NUM_PAGES)]
        for count in (1, 2, 4, 8, 3):
            runner.forward(*[(ids[i : i + 1], 0, pages[i]) for i in range(count)], num_generated=count)
        runner.prefill(ids)
        assert len(runner.transformer._steps) == 4
        sizes = store_sizes(runner.store, runner.config)
    num_words = runner.config.vocab_size
    assert [shape for shape, _ in shapes if shape[-1] == num_words] == [(MAX_DECODE_TOKENS, num_words)]
    taken = sum(pinned_block_bytes(math.prod(shape) * size) for shape, size in shapes)
    assert taken <= pinned_bytes(sizes, CHUNK_TOKENS)


class Failing(StandInKernels):
    """Raises at the n-th call that comes."""

    def __init__(self) -> None:
        self.left, self.error, self.num_calls = 0, None, 0

    def __getattribute__(self, name: str) -> object:
        found = super().__getattribute__(name)
        if callable(found) and not name.startswith("_"):
            self.num_calls += 1
            self.left -= 1
            if self.left == 0:
                raise self.error
        return found


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a driver's"), torch.OutOfMemoryError("CUDA")])
def test_a_launch_that_fails_leaves_nothing_behind(error, path, ids):
    """Wherever in the step it comes: no side waits, and the next step is as if nothing had been. Where memory ended
    that is the same step again."""
    kernels = Failing()
    with only_rows(HybridRunner(path, kernels=kernels, num_gpu_experts=5)) as runner:
        runner.transformer._adaptive._budget.most = 0
        want = runner.decode(ids[:4])
        kernels.num_calls = 0
        runner.decode(ids[:1])
        for number in range(1, kernels.num_calls + 1, 5):
            kernels.left, kernels.error = number, error
            if isinstance(error, torch.OutOfMemoryError):
                assert np.array_equal(runner.decode(ids[:1]), want[:1])
            else:
                with pytest.raises(type(error)):
                    runner.decode(ids[:1])
            assert kernels.left <= 0
        assert np.array_equal(runner.decode(ids[:4]), want)
        assert runner.transformer._passes.most_tokens == runner.transformer.max_batch_tokens, "prompts are as they were"


class Silent(StandInKernels):
    """A GPU that never gets to the experts of one layer. The CPU's patience ends then, and not before, however late
    everything else is."""

    turn = 0
    table: TurnTable | None = None

    def route(self, logits, bias, rule, residents=None, turn: Turn | None = None, out=None) -> Routes:
        is_silent = turn is not None and turn.number == self.turn
        if is_silent:
            self.table._table[turns._LIMIT_NS // 8] = 1
        return super().route(logits, bias, rule, residents, None if is_silent else turn, out)


def test_a_gpu_that_hangs_is_a_sentence(path, ids, monkeypatch):
    kernels = Silent()
    with only_rows(HybridRunner(path, kernels=kernels, num_gpu_experts=5, num_threads=2)) as runner:
        runner.transformer._adaptive._budget.most = 0
        want = runner.decode(ids[:4])
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_TURN_LIMIT_S", 3600.0)
            kernels.table = runner.transformer.experts.server._table
            for kernels.turn in (1, 3):
                problem = rf"GPU did not get to the experts of layer {kernels.turn} in time"
                with pytest.raises(KimiLiteError, match=problem):
                    runner.decode(ids[:1])
        kernels.turn = 0
        assert np.array_equal(runner.decode(ids[:4]), want)


def test_a_cpu_that_never_answers_is_a_sentence(path, ids, monkeypatch):
    """Its program waits for what does not come; the GPU gives up after a while, once."""
    with only_rows(HybridRunner(path, num_gpu_experts=5)) as runner:
        server = runner.transformer.experts.server
        want, whole = runner.decode(ids[:4]), server._whole
        with monkeypatch.context() as patch:
            patch.setattr(stand_in, "PATIENCE_S", 1.0)
            for turn in (1, 3):
                other = TurnTable(server._cells, 1)
                other.begin(1 << 40, 60)  # turns that never come
                answered = whole.ops[: 4 * (turn - 1) + 1]
                server._whole = Program([*answered, wait_for_x_op(server._buffers[0].run, other, 1)])
                with pytest.raises(KimiLiteError, match=rf"in vain for the CPU's experts of layer {turn}"):
                    runner.decode(ids[:1])
        server._whole = whole
        assert np.array_equal(runner.decode(ids[:4]), want)


def test_an_error_of_the_cpu_ends_the_step(path, ids, monkeypatch):
    """Whatever it is, on the thread that serves: it comes out of `forward`, and the next step is as before."""
    with only_rows(HybridRunner(path, num_gpu_experts=5)) as runner:
        runner.transformer._adaptive._budget.most = 0
        want, cpu = runner.decode(ids[:4]), runner.transformer.experts.cpu
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "team", lambda num_threads: 1 / 0)
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    runner.decode(ids[:1])
        assert np.array_equal(runner.decode(ids[:4]), want)


class Rushed(StandInKernels):
    """Poisons what is not there yet. Where a wait is left out, the other side comes as late as that allows."""

    def __init__(self, left_out: str) -> None:
        self.left_out = left_out
        self.has_come = threading.Semaphore(0)  # the side that does not wait

    def post(self, turn: Turn, ids: torch.Tensor, slots: torch.Tensor) -> None:
        chosen, missing, cells, first, number = turn.posting
        cells[X_POSTED : X_POSTED + len(ids)] = int(first) + number
        self.let_come("choices")
        poison(turn.memory.rows)
        chosen[: len(ids)], missing[: len(ids)] = ids, torch.where(slots < 0, ids, -1)
        cells[CHOICES_POSTED : CHOICES_POSTED + len(ids)] = int(first) + number

    def await_answer(self, turn: Turn) -> None:
        if self.left_out != "answer":
            super().await_answer(turn)
            poison(turn.memory.x)

    def rms_norm(self, *args: object, also: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor:
        if also is not None:
            self.let_come("x")
        return super().rms_norm(*args, also=also, **kwargs)

    def join(self, *args: object, **kwargs: object) -> torch.Tensor | None:
        result = super().join(*args, **kwargs)
        if self.left_out == "answer":
            self.has_come.release()
        return result

    def let_come(self, left_out: str) -> None:
        """Before something is there: until the side that does not wait for it has come."""
        if self.left_out == left_out:
            assert self.has_come.acquire(timeout=30)

    def ops(self, ops: Sequence[Op], table: TurnTable) -> list[Op]:
        """A step's program without the wait. Of each turn: wait for x, quantize, wait for the choices, compute."""
        changed, come, let_come = [], op_of(self.has_come.release), op_of(lambda: self.let_come("answer"))
        for first in range(0, len(ops) - 1, 4):
            wait_for_x, quantize, wait_for_choices, compute = ops[first : first + 4]
            answer = [answer_op(table, first // 4)] if first else []
            changed += {
                "nothing": [wait_for_x, quantize, wait_for_choices, compute],
                "x": [*answer, quantize, come, wait_for_choices, compute],
                "choices": [wait_for_x, quantize, compute, come],
                "answer": [wait_for_x, quantize, wait_for_choices, let_come, compute],
            }[self.left_out]
        return [*changed, ops[-1]]


def op_of(call: Callable[[], object]) -> Op:
    """An operation in Python."""
    callback = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(lambda *_: call() and None)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    return Op(address, np.zeros(1, np.int64), (callback,))


@pytest.mark.parametrize("left_out", ["nothing", "x", "choices", "answer"])
def test_every_wait_of_a_turn_is_needed(left_out, path, ids, monkeypatch):
    """Without one of them, results are others: the CPU's for x, its for the choices, the GPU's for the answer."""
    with only_rows(HybridRunner(path, num_gpu_experts=5)) as plain:
        want = plain.decode(ids[:3])
    kernels = Rushed(left_out)
    monkeypatch.setattr(stand_in, "post", kernels.post)
    with only_rows(HybridRunner(path, kernels=kernels, num_gpu_experts=5)) as runner:
        server = runner.transformer.experts.server
        server._whole = Program(kernels.ops(server._whole.ops, server._table))
        have = runner.decode(ids[:3])
    assert np.array_equal(have, want) == (left_out == "nothing")
