import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_lite.apps.swarm import journal
from kimi_lite.apps.swarm.events import (
    AgentEnded,
    AgentProgress,
    AgentStep,
    Emitter,
    Event,
    RunEnded,
    Totals,
    Usage,
    Warned,
    from_line,
    to_line,
)
from kimi_lite.apps.swarm.journal import Journal, is_running
from kimi_lite.errors import KimiLiteError
from tests.apps.swarm.made import events


@settings(deadline=None)
@given(events)
def test_an_event_is_one_line_of_strict_json_and_comes_back(event: Event) -> None:
    line = to_line(event)
    assert line.isascii() and line.isprintable()
    json.loads(line, parse_constant=pytest.fail)
    assert from_line(line) == event


def test_numbers_that_json_does_not_have_become_null() -> None:
    assert from_line(to_line(AgentProgress(1.0, "a1", "generating", decode_tok_s=float("inf")))) == AgentProgress(
        1.0, "a1", "generating"
    )
    message = {"content": [float("nan"), {"x": (1.5, float("-inf"))}]}
    read = from_line(to_line(AgentStep(1.0, "a1", 0, message, Usage())))
    assert read.message == {"content": [None, {"x": [1.5, None]}]}


def test_fields_and_kinds_of_newer_versions_do_not_disturb() -> None:
    line = json.loads(to_line(AgentEnded(2.0, "a1", "completed", "", "42", Usage(3, 2, 1), 4)))
    assert from_line(json.dumps(line | {"mood": "good", "usage": line["usage"] | {"images": 2}})) == AgentEnded(
        2.0, "a1", "completed", "", "42", Usage(3, 2, 1), 4
    )
    assert from_line(json.dumps(line | {"outcome": "superseded"})).outcome == "superseded"
    assert from_line('{"event":"AgentRenamed","t_s":1}') is None


@settings(deadline=None)
@given(data=st.data())
def test_a_field_of_another_type_is_a_value_error_that_names_it(data: st.DataObject) -> None:
    event = json.loads(to_line(data.draw(events)))
    name = data.draw(st.sampled_from([name for name in event if name != "event"]))
    wrong = data.draw(st.sampled_from([True, [1], [None]]))
    with pytest.raises(ValueError, match=name if name not in ("usage", "totals") else "Usage|Totals"):
        from_line(json.dumps(event | {name: wrong}))


@pytest.mark.parametrize("line", ["", "null", "[]", '{"t_s":1}', '{"event":3}', "[" * 10_000, '{"event":"Warned"}'])
def test_lines_without_an_event(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        from_line(line)


def test_speed_up_is_the_agents_own_time_over_the_time_that_passed() -> None:
    assert Totals(seconds=10.0, sequential_s=25.0).speed_up == 2.5
    assert Totals().speed_up is None


@settings(deadline=None, max_examples=40)
@given(written=st.lists(events, max_size=5), cut=st.integers(0, 10**9))
def test_a_journal_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    written: list[Event], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with Journal(folder) as first:
        for event in written:
            first(event)
    path = folder / journal.FILE_NAME
    kept = journal.read(folder).events
    data = path.read_bytes()
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert journal.read(folder) == (kept[:whole], [], 0)
    with Journal(folder) as second:
        second(Warned(1.0, "on"))
    assert journal.read(folder).events == [*kept[:whole], Warned(1.0, "on")]


def test_damaged_and_unknown_lines_are_told_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [to_line(Warned(1.0, "a")), "\x00garbage", '{"event":"Later","t_s":1}', to_line(Warned(2.0, "b"))]
    (tmp_path / journal.FILE_NAME).write_text("\n".join(lines) + "\n")
    assert journal.read(tmp_path) == ([Warned(1.0, "a"), Warned(2.0, "b")], [2], 1)


def test_of_progress_changes_of_state_are_kept_and_one_each_second(tmp_path: Path) -> None:
    with Journal(tmp_path) as kept:
        for tenth in range(25):
            kept(AgentProgress(tenth / 10, "a1", "generating", generated_tokens=tenth))
            kept(AgentProgress(tenth / 10, "a2", "reading" if tenth < 12 else "generating"))
    read = journal.read(tmp_path).events
    assert [event.t_s for event in read if event.agent_id == "a1"] == [0.0, 1.0, 2.0]
    assert [(event.t_s, event.state) for event in read if event.agent_id == "a2"] == [
        (0.0, "reading"),
        (1.0, "reading"),
        (1.2, "generating"),
        (2.2, "generating"),
    ]


def test_a_run_belongs_to_one_writer(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with Journal(tmp_path):
        assert is_running(tmp_path)
        with pytest.raises(KimiLiteError, match="going on"):
            Journal(tmp_path)
    assert not is_running(tmp_path)
    Journal(tmp_path).close()


def test_what_comes_after_the_end_is_not_kept(tmp_path: Path) -> None:
    kept = Journal(tmp_path)
    kept(Warned(1.0, "x"))
    kept.close()
    kept(Warned(2.0, "late"))
    kept.close()
    assert journal.read(tmp_path).events == [Warned(1.0, "x")]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path) as kept:
        kept(Warned(1.0, "before"))
        write = journal.os.write

        def half(file: int, data: bytes) -> int:
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return write(file, data[: len(data) // 2])

        monkeypatch.setattr(journal.os, "write", half)
        with pytest.raises(KimiLiteError, match="No space left"):
            kept(Warned(2.0, "lost"))
        monkeypatch.undo()
        kept(Warned(3.0, "after"))
    assert journal.read(tmp_path).events == [Warned(1.0, "before"), Warned(3.0, "after")]


def test_emitted_events_come_in_one_order_with_times_of_the_run() -> None:
    now, seen, also = iter([100.0, 101.0, 102.5]), [], []
    emitter = Emitter([seen.append, also.append], start_s=7.0, clock=lambda: next(now))
    emitter.emit(lambda t_s: Warned(t_s, "x"))
    emitter.emit(lambda t_s: RunEnded(t_s, "completed", "42", Totals()))
    assert seen == also == [Warned(8.0, "x"), RunEnded(9.5, "completed", "42", Totals())]


def test_a_listener_that_cannot_go_on_does_not_end_the_run() -> None:
    seen: list[Event] = []

    def full(event: Event) -> None:
        raise KimiLiteError("The disk is full.", "Free space.")

    emitter = Emitter([full, seen.append], clock=lambda: 5.0)
    emitter.emit(lambda t_s: Warned(t_s, "x"))
    emitter.emit(lambda t_s: Warned(t_s, "y"))
    assert [event.text.partition(" The run")[0] for event in seen] == ["The disk is full.", "x", "y"]
