"""Which tokens run next: budget, order, waiting, and who makes room when the pages are used up."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.engine.scheduler import make_batch
from tests.engine.fakes import fake_engine
from tests.engine.test_engine import ids_of, prompt_of, request, run


def scheduled(engine) -> list[tuple[str, int]]:
    """(request, tokens) of the next step, which is then run."""
    seen = []
    forward = engine.model.forward

    def look(batch, should_stop=None):
        seen.extend(piece.length for piece in batch.sequences)
        return forward(batch, should_stop)

    engine.model.forward = look
    engine.step()
    engine.model.forward = forward
    return seen


def test_decodes_come_first_then_prompts_oldest_first_within_the_budget() -> None:
    engine = fake_engine(context_length=2048, num_pages=64, max_step_tokens=100)
    engine.add(request("a", prompt_of(90), 50, ignore_eos=True))
    assert scheduled(engine) == [90]
    engine.add(request("b", prompt_of(150, seed=1), 50, ignore_eos=True))
    engine.add(request("c", prompt_of(80, seed=2), 50, ignore_eos=True))
    assert scheduled(engine) == [1, 99]
    assert scheduled(engine) == [1, 51, 48]
    assert scheduled(engine) == [1, 1, 32]
    assert scheduled(engine) == [1, 1, 1]


@settings(max_examples=20, deadline=None)
@given(max_step_tokens=st.integers(1, 12), num_requests=st.integers(1, 20))
def test_no_step_is_larger_than_allowed(max_step_tokens: int, num_requests: int) -> None:
    engine = fake_engine(context_length=256, num_pages=80, max_step_tokens=max_step_tokens)
    run(engine, *[request(str(i), prompt_of(1 + i, seed=i), 5, ignore_eos=True) for i in range(num_requests)])
    assert max(len(batch.token_ids) for batch in engine.model.batches) <= max_step_tokens


def test_the_youngest_makes_room_and_goes_first_in_the_queue() -> None:
    engine = fake_engine(context_length=256, num_pages=5)
    for name in ("old", "young", "waiting"):
        engine.add(request(name, prompt_of(120, seed=len(name)), 80, ignore_eos=True))
    names = lambda sequences: [sequence.request.id for sequence in sequences]  # noqa: E731
    engine.step()
    assert (names(engine.scheduler.running), names(engine.scheduler.waiting)) == (["old", "young"], ["waiting"])
    while len(engine.scheduler.running) == 2:
        engine.step()
    assert (names(engine.scheduler.running), names(engine.scheduler.waiting)) == (["old"], ["young", "waiting"])
    young = engine.scheduler.waiting[0]
    num_generated = young.num_generated
    assert num_generated > 0
    assert young.pages is None
    while "young" in engine._live:
        ended = [token for token in engine.step() if token.request_id == "young"]
    assert ended[-1].stats.generated_tokens == 80
    assert ended[-1].stats.cached_tokens == 0  # its own prompt, found again after the wait, was not a saving


def test_a_sequence_that_was_sent_back_goes_on_where_it_was() -> None:
    requests = [
        request(str(i), prompt_of(100, seed=i), 100, ignore_eos=True, temperature=1.0, seed=i) for i in range(3)
    ]
    engine = fake_engine(context_length=256, num_pages=6)
    together = run(engine, *requests)
    prefills = [piece.length for batch in engine.model.batches for piece in batch.sequences if piece.length > 1]
    assert len(prefills) > 3  # some were sent back
    for one in requests:
        assert ids_of(together, one.id) == ids_of(run(fake_engine(), one))


def test_make_batch_lays_sequences_side_by_side() -> None:
    engine = fake_engine(max_step_tokens=80)
    engine.add(request("a", prompt_of(70)))
    engine.add(request("b", prompt_of(30, seed=1)))
    batch = make_batch(engine.scheduler.schedule())
    assert [(piece.start, piece.length, len(piece.pages)) for piece in batch.sequences] == [(0, 70, 2), (70, 10, 1)]
    assert batch.positions.tolist() == [*range(70), *range(10)]
    assert batch.token_ids.tolist() == [*prompt_of(70), *prompt_of(30, seed=1)[:10]]
    assert batch.wants_logits.tolist() == [False] * 69 + [True] + [False] * 10


def test_prompts_beside_running_answers_are_cut_to_the_gap_that_is_allowed() -> None:
    """The fake clock charges 1 s a step and 10 ms a prompt token: 3 s leave 2 s, three pages, for a prompt."""
    engine = fake_engine(context_length=4096, num_pages=200, max_step_tokens=512, max_gap_s=3.0)
    now_s, forward = [0.0], engine.model.forward

    def timed(batch, should_stop=None):
        prompt_tokens = sum(piece.length for piece in batch.sequences if piece.length > 1)
        now_s[0] += 1.0 + 0.01 * prompt_tokens
        return forward(batch, should_stop)

    engine.model.forward, engine.clock_s = timed, lambda: now_s[0]
    engine.add(request("running", prompt_of(20), 300, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.add(request("long", prompt_of(3000, seed=1), 3, ignore_eos=True))
    gaps = []
    while engine._live["long"].num_generated == 0:
        before = now_s[0]
        engine.step()
        gaps.append(now_s[0] - before)
    assert max(gaps[3:]) <= 3.0 and min(gaps[3:-1]) > 2.0, gaps  # the first steps learn
    alone = fake_engine(context_length=4096, num_pages=200, max_step_tokens=512, max_gap_s=3.0)
    alone.add(request("long", prompt_of(600, seed=1), 3, ignore_eos=True))
    assert scheduled(alone) == [512]  # nobody waits for it: a whole step


def test_clients_take_turns_and_no_more_run_than_allowed() -> None:
    engine = fake_engine(context_length=256, num_pages=80, max_running=2)
    for i in range(5):
        engine.add(replace(request(f"a{i}", prompt_of(10, seed=i), 6, ignore_eos=True), client="a"))
    for i in range(2):
        engine.add(replace(request(f"b{i}", prompt_of(10, seed=9 + i), 6, ignore_eos=True), client="b"))
    order = []
    while engine._live:
        engine.step()
        assert len(engine.scheduler.running) <= 2
        order += [s.request.id for s in engine.scheduler.running if s.request.id not in order]
    assert order[:4] == ["a0", "b0", "a1", "b1"] and sorted(order) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1"]


def started(engine) -> list[str]:
    return [sequence.request.id for sequence in engine.scheduler.running]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_clients_highest_priority_is_let_in_first_and_of_equal_ones_the_oldest(priorities: list[int]) -> None:
    engine = fake_engine(context_length=256, num_pages=64, max_running=1)
    for i, priority in enumerate(priorities):
        engine.add(replace(request(str(i), prompt_of(5, seed=i), 1), priority=priority))
    order = []
    while not engine.is_idle:
        order += [token.request_id for token in engine.step()]
    assert order == [str(i) for i in sorted(range(len(priorities)), key=lambda i: -priorities[i])]


def test_a_priority_does_not_go_before_the_turn_of_another_client() -> None:
    engine = fake_engine(context_length=256, num_pages=64, max_running=2)
    for name, client, priority in (("a", "A", 0), ("a2", "A", 9), ("b", "B", 0)):
        engine.add(replace(request(name, prompt_of(5, seed=len(name)), 50), client=client, priority=priority))
    engine.step()
    assert started(engine) == ["a2", "b"]


def test_the_prompt_of_the_highest_priority_is_read_first() -> None:
    engine = fake_engine(context_length=512, num_pages=64, max_step_tokens=100)
    engine.add(request("running", prompt_of(90), 50, ignore_eos=True))
    engine.step()
    engine.add(request("low", prompt_of(150, seed=1), 50, ignore_eos=True))
    assert scheduled(engine) == [1, 99]
    engine.add(replace(request("high", prompt_of(120, seed=2), 50, ignore_eos=True), priority=1))
    assert scheduled(engine) == [1, 99]
    assert scheduled(engine) == [1, 21, 51]  # the end of "high", then what was left of "low"
    assert scheduled(engine) == [1, 1, 1]


def test_the_lowest_priority_makes_way_and_of_equal_ones_the_youngest() -> None:
    engine = fake_engine(context_length=256, num_pages=5)
    engine.add(request("low", prompt_of(120, seed=1), 80, ignore_eos=True))
    engine.add(replace(request("high", prompt_of(120, seed=2), 80, ignore_eos=True), priority=1))
    while started(engine) != ["high"]:
        engine.step()
    assert [s.request.id for s in engine.scheduler.waiting] == ["low"]
    assert engine.scheduler.waiting[0].num_generated > 0
