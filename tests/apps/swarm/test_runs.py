from pathlib import Path

import pytest

from kimi_lite.apps.swarm.events import RunEnded, RunResumed, RunStarted, Totals, Warned
from kimi_lite.apps.swarm.journal import FILE_NAME, Journal
from kimi_lite.apps.swarm.runs import RunStore
from kimi_lite.errors import KimiLiteError


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "swarm")


def begin(store: RunStore, task: str = "task", *, is_ended: bool = False) -> Path:
    folder = store.create()
    with Journal(folder) as journal:
        journal(RunStarted(0.0, folder.name, task, {}, "1"))
        if is_ended:
            journal(RunEnded(1.0, "completed", "42", Totals()))
    return folder


def test_runs_of_one_second_have_names_of_their_own_and_are_private(store: RunStore) -> None:
    folders = [begin(store) for _ in range(3)]
    assert len({folder.name for folder in folders}) == 3
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_a_run_is_finished_interrupted_or_running(store: RunStore) -> None:
    ended, cut, resumed, damaged = (
        begin(store, is_ended=True),
        begin(store),
        begin(store, is_ended=True),
        store.create(),
    )
    with Journal(resumed) as journal:
        journal(RunResumed(1.0, "1"))
    (damaged / FILE_NAME).write_bytes(b"\xff\x00\n")
    with Journal(begin(store, "now")) as journal:
        journal(Warned(1.0, "x"))
        states = {one.run_id: one for one in store.summaries()}
    assert [states[folder.name].state for folder in (ended, cut, resumed, damaged)] == [
        "finished",
        "interrupted",
        "interrupted",
        "damaged",
    ]
    (running,) = (one for one in states.values() if one.state == "running")
    assert running.task == "now" and states[ended.name].ended.answer == "42"


def test_a_run_is_found_by_the_beginning_of_its_name(store: RunStore) -> None:
    with pytest.raises(KimiLiteError, match="There is no run in"):
        store.find()
    first, second = begin(store), begin(store)
    first.rename(store.folder / "alpha"), second.rename(store.folder / "alpha-2")
    assert store.find("alpha").name == "alpha" and store.find("alpha-").name == "alpha-2"
    with pytest.raises(KimiLiteError, match=r"2 runs begin with 'al'.\nalpha, alpha-2"):
        store.find("al")
    with pytest.raises(KimiLiteError, match="There is no run 'beta'"):
        store.find("beta")
    with Journal(store.folder / "alpha") as journal:
        journal(Warned(9.0, "later"))
    assert store.find().name == "alpha"


@pytest.mark.parametrize("name", ["..", "../swarm", "/", "a/b", "\x1b[31m", "a\n", "x" * 101, ".hidden", "*"])
def test_a_name_leads_nowhere_else(store: RunStore, name: str) -> None:
    begin(store)
    with pytest.raises(KimiLiteError, match="not the name of a run"):
        store.find(name)


def test_a_run_is_deleted_with_its_board_but_not_while_it_goes_on(store: RunStore) -> None:
    folder, other = begin(store), begin(store)
    (folder / "board").mkdir()
    (folder / "board" / "notes").write_text("x")
    with Journal(folder), pytest.raises(KimiLiteError, match="is going on"):
        store.delete(folder)
    store.delete(folder)
    assert not folder.exists() and [one.run_id for one in store.summaries()] == [other.name]
