"""The engine around a model that answers only from what it reads back out of the cache (tests.engine.fakes)."""

import threading
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loop_guard import LoopLimits
from kimi_lite.engine.types import Request, SamplingParams, Token
from kimi_lite.errors import KimiLiteError
from kimi_lite.kv.host import HostPages
from kimi_lite.model.batch import Cancelled
from tests.engine.fakes import VOCAB_SIZE, fake_engine, hashed_logits, scripted_logits


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 256, length).tolist())


def request(name: str, prompt: tuple[int, ...], num_tokens: int = 8, **sampling) -> Request:
    return Request(name, prompt, SamplingParams(**{"seed": 5, "max_tokens": num_tokens, **sampling}))


def ids_of(tokens: list[Token], name: str | None = None) -> list[int]:
    return [token.id for token in tokens if token.id is not None and name in (None, token.request_id)]


def run(engine: Engine, *requests: Request) -> list[Token]:
    return list(engine.generate(requests))


def assert_idle(engine: Engine) -> None:
    kv = engine.scheduler.kv
    assert kv.num_available == kv.num_pages
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not engine._live


def greedy_by_hand(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """The fake model's answer without any cache."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(int(hashed_logits(context).argmax()))
    return context[len(prompt) :]


def test_greedy_decoding_is_what_the_model_says() -> None:
    engine = fake_engine()
    tokens = run(engine, request("a", prompt_of(150), 70, temperature=0))
    assert ids_of(tokens) == greedy_by_hand(prompt_of(150), 70)
    assert [token.finish_reason for token in tokens if token.finish_reason] == ["length"]
    assert tokens[-1].finish_reason == "length"
    assert_idle(engine)


@pytest.mark.parametrize("max_step_tokens", [1, 7, 64, 100, 512])
def test_the_chunk_size_of_the_prefill_changes_nothing(max_step_tokens: int) -> None:
    """prefill(n) = n x decode(1)."""
    engine = fake_engine(max_step_tokens=max_step_tokens)
    tokens = run(engine, request("a", prompt_of(200)))
    assert ids_of(tokens) == ids_of(run(fake_engine(), request("a", prompt_of(200))))
    assert max(len(batch.token_ids) for batch in engine.model.batches) == min(max_step_tokens, 200)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 130), st.integers(1, 40)), min_size=1, max_size=5),
    max_step_tokens=st.sampled_from([5, 64, 300]),
    num_pages=st.sampled_from([6, 9, 40]),
)
def test_a_batch_of_sequences_equals_one_by_one(
    lengths: list[tuple[int, int, int]], max_step_tokens: int, num_pages: int
) -> None:
    """Common beginnings, too few pages for all, small steps: each request still gets the tokens that it gets alone."""
    engine = fake_engine(context_length=384, num_pages=num_pages, max_step_tokens=max_step_tokens)
    requests = []
    for i, (length, num_common, num_tokens) in enumerate(lengths):
        prompt = (prompt_of(num_common, seed=99) + prompt_of(length, seed=i))[:330]
        requests.append(request(str(i), prompt, num_tokens, seed=i, ignore_eos=True))
    together = run(engine, *requests)
    assert_idle(engine)
    for one in requests:
        assert ids_of(together, one.id) == ids_of(run(fake_engine(), one)), one.id


def test_a_restored_prefix_equals_a_fresh_one() -> None:
    engine = fake_engine()
    prompt = prompt_of(300)
    run(engine, request("a", prompt))
    longer = prompt + prompt_of(100, seed=1)
    again = run(engine, request("b", longer))
    assert again[-1].stats.cached_tokens == 300
    assert ids_of(again) == ids_of(run(fake_engine(), request("b", longer)))


def test_the_answer_too_is_found_again_but_for_its_last_token() -> None:
    engine = fake_engine()
    prompt = prompt_of(100)
    answer = ids_of(run(engine, request("a", prompt, 50)))
    follow_up = run(engine, request("b", (*prompt, *answer, 1, 2, 3)))
    assert follow_up[-1].stats.cached_tokens == 149
    assert follow_up[-1].stats.prompt_tokens == 153


def test_requests_with_a_common_beginning_compute_it_once() -> None:
    engine = fake_engine(context_length=2048, num_pages=64)
    common = prompt_of(640)
    tokens = run(engine, *[request(str(i), common + prompt_of(20, seed=i), 4) for i in range(5)])
    cached = {token.request_id: token.stats.cached_tokens for token in tokens}
    assert cached == {"0": 0, "1": 640, "2": 640, "3": 640, "4": 640}


def test_decoding_is_not_held_up_by_another_prompt() -> None:
    engine = fake_engine(context_length=2048, num_pages=64, max_step_tokens=64)
    engine.add(request("a", prompt_of(20), 100, ignore_eos=True))
    engine.step()
    engine.add(request("b", prompt_of(640, seed=1), 1))
    for _ in range(10):
        assert [token.request_id for token in engine.step()].count("a") == 1
    assert engine.model.batches[-1].wants_logits.sum() == 1


def test_a_prompt_that_never_fits_is_refused_and_leaves_nothing_behind() -> None:
    engine = fake_engine(context_length=128)
    with pytest.raises(KimiLiteError, match=r"need a context of 129 tokens; it has 128") as refusal:
        run(engine, request("fits", prompt_of(5)), request("not", prompt_of(128)))
    assert "-c " in refusal.value.hint
    assert_idle(engine)
    assert len(ids_of(run(engine, request("just", prompt_of(127))))) == 1


def test_a_full_context_ends_the_answer() -> None:
    engine = fake_engine(context_length=128)
    tokens = run(engine, request("a", prompt_of(100), num_tokens=10_000))
    assert (len(ids_of(tokens)), tokens[-1].finish_reason) == (28, "length")
    assert_idle(engine)


def test_more_requests_than_pages_wait_for_each_other() -> None:
    engine = fake_engine(context_length=256, num_pages=4)
    requests = [request(str(i), prompt_of(150, seed=i), 60, ignore_eos=True) for i in range(4)]
    tokens = run(engine, *requests)
    assert all(len(ids_of(tokens, one.id)) == 60 for one in requests)
    assert_idle(engine)


def test_what_had_to_leave_the_cache_returns_from_ram() -> None:
    """Conversations in turns, more than there are pages for: with pages in RAM nothing is computed twice."""
    computed = {}
    for num_host_pages in (0, 12):
        engine = fake_engine(context_length=256, num_pages=4)
        if num_host_pages:
            engine.kv.host = HostPages(num_host_pages, engine.kv.storage)
        for turn in range(3):
            for name in range(3):
                one = request(f"{name}.{turn}", prompt_of(150 + 20 * turn, seed=name), 4)
                assert ids_of(run(engine, one)) == ids_of(run(fake_engine(), one))
        computed[num_host_pages] = sum(len(batch.token_ids) for batch in engine.model.batches)
    assert engine.counters()["kv_returned"] == 12, "two pages of each of three conversations, at two turns"
    assert computed[12] <= computed[0] - 6 * 128


def test_cancelling_in_decode_keeps_what_was_said() -> None:
    engine = fake_engine()
    tokens = []
    for token in engine.generate([request("a", prompt_of(100), 500)]):
        tokens.append(token)
        if len(ids_of(tokens)) == 20:
            engine.cancel("a")
    assert tokens[-1].finish_reason == "cancelled"
    assert len(ids_of(tokens)) == 20
    assert_idle(engine)
    again = run(engine, request("b", (*prompt_of(100), *ids_of(tokens), 7), 8))
    assert again[-1].stats.cached_tokens == 119
    assert ids_of(again) == ids_of(run(fake_engine(), request("b", (*prompt_of(100), *ids_of(tokens), 7), 8)))


def test_cancelling_between_the_layers_of_a_prefill_keeps_only_what_was_computed() -> None:
    engine = fake_engine(max_step_tokens=100)

    def cancel_late(batch, layer: int) -> None:
        if batch.positions[0] == 100 and layer == 2:
            engine.cancel("a")

    engine.model.before_layer = cancel_late
    tokens = run(engine, request("a", prompt_of(300)))
    assert [(token.id, token.finish_reason) for token in tokens] == [(None, "cancelled")]
    assert_idle(engine)
    engine.model.before_layer = lambda batch, layer: None
    again = run(engine, request("b", prompt_of(300)))
    assert again[-1].stats.cached_tokens == 100
    assert ids_of(again) == ids_of(run(fake_engine(), request("b", prompt_of(300))))


def test_a_cancel_may_come_before_the_request_and_from_another_thread() -> None:
    engine = fake_engine()
    thread = threading.Thread(target=engine.cancel, args=("a",))
    thread.start()
    thread.join()
    assert [token.finish_reason for token in run(engine, request("a", prompt_of(10)))] == ["cancelled"]
    assert run(engine, request("a", prompt_of(10)))[-1].finish_reason == "length"  # and is used up


def test_one_cancelled_request_does_not_disturb_the_others() -> None:
    engine = fake_engine(context_length=2048, num_pages=64, max_step_tokens=100)
    others = [request(str(i), prompt_of(30, seed=i), 30, ignore_eos=True) for i in range(2)]
    tokens = []
    for token in engine.generate([*others, request("long", prompt_of(900, seed=9))]):
        tokens.append(token)
        if len(tokens) == 5:
            engine.cancel("long")
    for one in others:
        assert ids_of(tokens, one.id) == ids_of(run(fake_engine(), one))
    assert [token.finish_reason for token in tokens if token.request_id == "long"] == ["cancelled"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_stopping_anywhere_leaves_a_valid_cache(data: st.DataObject) -> None:
    """Cancelled between any two layers, closed, or interrupted by an exception: the next answer is the right one."""
    engine = fake_engine(max_step_tokens=data.draw(st.sampled_from([16, 64, 150]), label="max_step_tokens"))
    prompt = prompt_of(data.draw(st.integers(1, 250), label="prompt"))
    stop_at = data.draw(st.integers(0, 40), label="layer calls before the stop")
    how = data.draw(st.sampled_from(["cancel", "raise", "close"]), label="how")
    num_calls = 0

    def stop(batch, layer: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == stop_at and how == "cancel":
            engine.cancel("a")
        if num_calls == stop_at and how == "raise":
            raise KeyboardInterrupt

    engine.model.before_layer = stop
    tokens = engine.generate([request("a", prompt, 12, ignore_eos=True)])
    try:
        for token in tokens:
            if how == "close" and num_calls >= stop_at:
                break
            assert token.request_id == "a"
    except KeyboardInterrupt:
        assert how == "raise"
    tokens.close()
    assert_idle(engine)
    engine.model.before_layer = lambda batch, layer: None
    follow_up = request("b", prompt + prompt_of(30, seed=3), 6, ignore_eos=True)
    assert ids_of(run(engine, follow_up)) == ids_of(run(fake_engine(), follow_up))


def test_a_model_that_stops_by_itself_is_asked_again() -> None:
    """`Cancelled` without a cancelled request (a spurious one) costs the step, not the answer."""
    engine = fake_engine()
    num_stops = 2

    def stop_twice(batch, layer: int) -> None:
        nonlocal num_stops
        if num_stops and layer == 1:
            num_stops -= 1
            raise Cancelled

    engine.model.before_layer = stop_twice
    assert ids_of(run(engine, request("a", prompt_of(100)))) == ids_of(run(fake_engine(), request("a", prompt_of(100))))


def test_the_model_ends_its_turn() -> None:
    engine = fake_engine()
    engine.model.next_logits = scripted_logits(engine.tokenizer, lambda prompt: ("hmm", "hello world"))
    prompt = engine.template.encode([{"role": "user", "content": "hi"}], thinking=True)
    tokens = run(engine, Request("a", tuple(prompt.ids), SamplingParams(), prompt.starts_in_reasoning))
    texts = defaultdict(str)
    for token in tokens:
        texts[token.kind] += token.text
    assert texts == {"reasoning": "hmm", "content": "hello world"}
    assert tokens[-1].finish_reason == "stop"
    assert ids_of(tokens)[-1] == engine.tokenizer.special["<|im_end|>"]
    ignoring = request("b", tuple(prompt.ids), 30, ignore_eos=True)
    engine.model.next_logits = lambda context: (
        np.eye(VOCAB_SIZE, dtype=np.float32)[engine.tokenizer.special["<|im_end|>"]] * 99
    )
    assert len(ids_of(run(engine, ignoring))) == 30


def test_a_stop_text_ends_the_answer_before_it() -> None:
    engine = fake_engine()
    engine.model.next_logits = scripted_logits(engine.tokenizer, lambda prompt: ("wor", "hello world and more"))
    prompt = engine.template.encode([{"role": "user", "content": "hi"}], thinking=True)
    sampling = SamplingParams(stop=("world", "xyz"))
    tokens = run(engine, Request("a", tuple(prompt.ids), sampling, prompt.starts_in_reasoning))
    assert "".join(token.text for token in tokens if token.kind == "content") == "hello "
    assert tokens[-1].finish_reason == "stop"
    assert_idle(engine)


def test_tool_calls_are_named_and_end_with_their_own_reason() -> None:
    engine = fake_engine()
    special = engine.tokenizer.special
    ids = [
        special["<|tool_calls_section_begin|>"], special["<|tool_call_begin|>"],
        *engine.tokenizer.encode("functions.add:0"),
        special["<|tool_call_argument_begin|>"], *engine.tokenizer.encode('{"a": 1}'), special["<|tool_call_end|>"],
        special["<|tool_calls_section_end|>"], special["<|im_end|>"],
    ]  # fmt: skip
    prompt = engine.template.encode([{"role": "user", "content": "hi"}], thinking=False)
    engine.model.next_logits = lambda context: (
        np.eye(VOCAB_SIZE, dtype=np.float32)[ids[len(context) - len(prompt.ids)]] * 99
    )
    tokens = run(engine, Request("a", tuple(prompt.ids)))
    assert ids_of(tokens) == ids
    assert [token.call.name for token in tokens if token.call] == ["add"]
    assert {token.call_index for token in tokens if token.kind == "tool_call" and (token.call or token.text)} == {0}
    assert not any(token.error for token in tokens)
    assert "".join(token.text for token in tokens if token.kind == "tool_call") == '{"a": 1}'
    assert tokens[-1].finish_reason == "tool_calls"


def answer_of(engine: Engine, *texts: str, tools: tuple = ()) -> list[Token]:
    """The tokens of an instant answer that is these texts, the odd ones control tokens by name."""
    ids = [
        i
        for n, text in enumerate(texts)
        for i in ([engine.tokenizer.special[text]] if n % 2 == 0 else engine.tokenizer.encode(text))
    ]
    prompt = engine.template.encode([{"role": "user", "content": "hi"}], thinking=False)
    engine.model.next_logits = lambda context: (
        np.eye(VOCAB_SIZE, dtype=np.float32)[ids[len(context) - len(prompt.ids)]] * 99
    )
    return run(engine, Request("a", tuple(prompt.ids), tools=tools))


def test_malformed_tool_calls_say_so() -> None:
    begin, arguments, end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    tokens = answer_of(
        fake_engine(), begin, "functions.add:0", arguments, '{"a": '
                                                            '1', end, "", begin, "functions.add:1", arguments, "{}",
                                                            end,
        "", "<|im_end|>",
    )  # fmt: skip
    errors = [(token.call_index, token.error) for token in tokens if token.error]
    assert errors == [
        (0, "Tool call functions.add:0 has arguments that are not a JSON object (malformed, or cut off).")
    ]
    assert [token.call_index for token in tokens if token.call] == [0, 1]
    assert all(token.call_index is None for token in tokens if token.kind != "tool_call")


def test_declared_tools_name_a_call_that_has_only_a_number() -> None:
    begin, arguments, end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}
    tokens = answer_of(fake_engine(), begin, "0", arguments, '{"a": 1}', end, "", "<|im_end|>", tools=(tool,))
    assert [token.call.id for token in tokens if token.call] == ["functions.add:0"]


def test_closing_ends_everything_once() -> None:
    class Holding:
        num_closed = 0

        def close(self) -> None:
            self.num_closed += 1

    holding = Holding()
    with fake_engine(max_step_tokens=50) as engine:
        engine._holdings = [holding]
        engine.add(request("a", prompt_of(100)))
        engine.step()
        engine.close()
    assert_idle(engine)
    assert (engine.model.num_closed, holding.num_closed, engine.is_closed) == (1, 1, True)


def test_counters_are_of_the_cache_and_of_the_model() -> None:
    engine = fake_engine()
    engine.add(request("a", prompt_of(100)))
    engine.step()
    assert engine.counters()["kv_pages_held"] == 2
    engine.model.counters = lambda: {"expert_hits": 3.0}
    assert engine.counters()["expert_hits"] == 3


def test_a_step_is_never_longer_than_the_model_takes() -> None:
    assert fake_engine().scheduler.max_step_tokens == 512
    with pytest.raises(AssertionError, match="513"):
        fake_engine(max_step_tokens=513)


def test_statistics_count_tokens_and_time() -> None:
    engine = fake_engine(max_step_tokens=50)
    now_s = 100.0
    engine.clock_s = lambda: now_s

    def tick(batch, layer: int) -> None:
        nonlocal now_s
        now_s += 1.0 if layer == 0 else 0.0

    engine.model.before_layer = tick
    stats = [
        token.stats
        for token in engine.generate([request("a", prompt_of(150), 5, ignore_eos=True)])
        if token.id is not None
    ]
    assert [s.generated_tokens for s in stats] == [1, 2, 3, 4, 5]
    last = stats[-1]
    assert (last.prompt_tokens, last.cached_tokens, last.prompt_s, last.time_to_first_token_s) == (150, 0, 3.0, 3.0)
    assert (last.generation_s, last.prompt_tok_s, last.generation_tok_s) == (4.0, 50.0, 1.0)


def test_prefill_reports_its_progress() -> None:
    engine = fake_engine(max_step_tokens=100)
    run(engine, request("a", prompt_of(100)))
    reports = []
    prompt = prompt_of(100) + prompt_of(150, seed=1)
    list(engine.generate([request("b", prompt, 3)], lambda *report: reports.append(report)))
    assert reports[0] == ("b", 100, 250)
    assert [done for _, done, _ in reports] == [100, 133, 166, 200, 216, 233], (
        "three layers a chunk: of 100, then of 50 tokens"
    )


def test_padding_rows_of_the_output_are_never_sampled() -> None:
    """A model may have more output rows than the tokenizer has tokens."""
    engine = fake_engine()
    engine.model.forward = _padded(engine.model.forward)
    assert max(ids_of(run(engine, request("a", prompt_of(10), 20, ignore_eos=True)))) < VOCAB_SIZE


def _padded(forward):
    def padded(batch, should_stop=None) -> np.ndarray:
        logits = forward(batch, should_stop)
        return np.pad(logits, ((0, 0), (0, 4)), constant_values=99.0)

    return padded


def test_log_probabilities_go_with_the_tokens_they_are_of() -> None:
    engine = fake_engine()
    tokens = list(engine.generate([request("a", (1, 2, 3), temperature=0, num_logprobs=2)]))
    with_ids = [token for token in tokens if token.id is not None]
    assert all(token.logprobs.chosen.token_id == token.id == token.logprobs.top[0].token_id for token in with_ids)
    assert all(len(token.logprobs.top) == 2 for token in with_ids)
    assert not any(token.logprobs for token in tokens if token.id is None)


class OnlyEven:
    """A grammar of even ids, which after three of them allows the end alone."""

    def __init__(self, eos_id: int) -> None:
        self.eos_id, self.ids = eos_id, []

    def allowed(self) -> np.ndarray:
        ids = [self.eos_id] if len(self.ids) == 3 else range(0, 256, 2)
        bits = np.zeros(10, np.uint32)
        for i in ids:
            bits[i // 32] |= np.uint32(1) << np.uint32(i % 32)
        return bits

    def accept(self, token_id: int) -> None:
        self.ids.append(token_id)


def test_a_grammar_decides_what_may_come_and_begins_behind_the_reasoning() -> None:
    engine = fake_engine()
    eos_id = min(engine.tokenizer.eos_ids)
    grammars = []

    def make() -> OnlyEven:
        grammars.append(OnlyEven(eos_id))
        return grammars[-1]

    plain = replace(request("a", (1, 2, 3), 50), constraint=make)
    ids = [token.id for token in engine.generate([plain]) if token.id is not None]
    assert len(ids) == 4 and ids[-1] == eos_id and not any(i % 2 for i in ids[:3]), ids
    thinking = replace(plain, id="b", starts_in_reasoning=True, max_reasoning_tokens=6)
    ids = [token.id for token in engine.generate([thinking]) if token.id is not None]
    end = engine.tokenizer.special["</think>"]
    assert ids[6] == end and ids[-1] == eos_id and len(ids) == 11 and any(i % 2 for i in ids[:6]), ids
    assert [len(grammar.ids) for grammar in grammars] == [4, 4]  # one for each request, fed its answer alone


def test_an_answer_in_a_loop_ends_and_says_so() -> None:
    def always(context: list[int]) -> np.ndarray:
        logits = np.full(VOCAB_SIZE, -50.0, np.float32)
        logits[[65, 66, 67][len(context) % 3]] = 1.0
        return logits

    engine = fake_engine(always)
    limits = LoopLimits(num_repeats=4, num_tokens=48, max_period=8)
    tokens = list(engine.generate([replace(request("a", (1, 2), 200, temperature=0), loop_limits=limits)]))
    assert tokens[-1].finish_reason == "repetition" and tokens[-1].stats.generated_tokens == 64
    free = list(engine.generate([request("b", (1, 2), 200, temperature=0)]))
    assert free[-1].finish_reason == "length" and free[-1].stats.generated_tokens == 200


def test_a_broken_row_of_logits_ends_its_own_request_only() -> None:
    def broken_for_some(context: list[int]) -> np.ndarray:
        logits = hashed_logits(context)
        if context[0] == 9 and len(context) > 6:
            logits[0] = np.nan
        return logits

    engine = fake_engine(broken_for_some)
    good, bad = request("good", (1, 2, 3), 12), request("bad", (9, 2, 3), 12)
    engine.add(good), engine.add(bad)
    tokens = []
    while not {"good", "bad"} <= {token.request_id for token in tokens if token.finish_reason}:
        tokens += engine.step()
    last = {token.request_id: token for token in tokens if token.finish_reason}
    assert (last["good"].finish_reason, last["bad"].finish_reason) == ("length", "error")
    assert "not a number" in last["bad"].failure.message
    with pytest.raises(KimiLiteError, match="not a number"):
        list(engine.generate([request("again", (9, 2, 3), 12)]))
