"""The report of a run: on the terminal, as a timeline, as a page in a real Chromium; with any text in any event."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from typer.testing import CliRunner

from kimi_lite.apps.swarm import journal
from kimi_lite.apps.swarm.events import Event, RunEnded, Totals
from kimi_lite.apps.swarm.journal import Journal
from kimi_lite.apps.swarm.overview import Overview
from kimi_lite.apps.swarm.page import page
from kimi_lite.apps.swarm.report import delete_runs, list_runs, print_report, show_run
from kimi_lite.apps.swarm.runs import RunStore, RunSummary, summarise
from kimi_lite.apps.swarm.timeline import tick_step, timeline
from kimi_lite.cli import app
from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import Console
from tests.apps.screen import Screen
from tests.apps.server.browser import browser, needs_browser
from tests.apps.swarm.made import HOSTILE, events
from tests.apps.swarm.plausible import Run
from tests.apps.swarm.test_view import CONTROL, resumed_run

BREAKING = """</title></style></svg><script>document.title='broken'</script><img src=x onerror="document.title=1">
[press](javascript:document.title='broken') ![picture](https://example.org/track.png) <svg onload=document.title=1>"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setenv("KIMI_LITE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "100")
    return RunStore()


def keep(store: RunStore, run: Run, is_whole: bool = True) -> Path:
    folder = store.create()
    with Journal(folder) as kept:
        for event in run.events(is_whole):
            kept(event)
    return folder


def reported(run: Run, width: int = 100) -> list[str]:
    out, overview = io.StringIO(), Overview(run.events())
    print_report(Console(file=out, width=width), RunSummary("run", "finished", 0.0, "", overview.ended), overview, [])
    return [row.rstrip() for row in out.getvalue().splitlines()]


def test_the_report_says_who_did_what_when_and_what_went_wrong() -> None:
    lines = reported(Run(3, 2, seed=4))
    assert lines[0].endswith("  completed")
    assert lines[2:4] == [
        "Task",
        "Compare the memory that ten mixture-of-experts models need, and say which fit into 256 GB",
    ]
    assert lines[5].split()[-5:] == ["took", "steps", "tokens", "read", "generated"]
    table = lines[6:13]
    assert [row.split()[1 if row.startswith("●") else 0] for row in table] == [
        "orchestrator",
        *(f"a{i}" for i in range(1, 7)),
    ]
    assert sum(row.startswith("● ") for row in table) == 2  # one for each stage
    num_failed = sum("completed" not in row for row in table[1:])
    wrong = lines[lines.index("What went wrong") + 1 :]
    assert num_failed > 0 and sum(bool(re.match(r"- a\d", row)) for row in wrong) == num_failed
    assert lines[-4:] == ["Answer", "Three fit: **A**, B and C.", "", "- as said"]


@pytest.mark.parametrize("width", [40, 64, 80, 100, 140])
def test_no_number_of_the_table_is_cut(width: int) -> None:
    lines = reported(Run(12, 2), width)
    head = next(i for i, row in enumerate(lines) if row.startswith("agent "))
    rows = lines[head : head + 26]
    assert all(cell_len(row) <= width and not re.search(r"\d…", row) for row in rows)


@settings(max_examples=40, deadline=None)
@given(happened=st.lists(events, max_size=25), is_whole=st.booleans(), seed=st.integers(0, 99))
def test_any_events_in_any_order_give_a_picture_and_a_page_that_are_text_alone(
    happened: list[Event], is_whole: bool, seed: int
) -> None:
    overview = Overview([*Run(3, 1, seed).events(is_whole), *happened])
    summary = RunSummary("run", "interrupted", 0.0, "task", overview.ended)
    require_only_a_picture(timeline(overview))
    require_only_text(page(summary, overview, ["x"]))
    print_report(Console(file=io.StringIO(), width=80), summary, overview, [])


@pytest.mark.parametrize("text", [*HOSTILE, BREAKING])
def test_text_of_strangers_is_text(text: str, store: RunStore) -> None:
    run = Run(4, 1, names=(text, "b"), text=text)
    folder = keep(store, run)
    overview = Overview(journal.read(folder).events)
    require_only_a_picture(timeline(overview))
    require_only_text(page(summarise(folder), overview, [text]))
    screen = Screen(70, 400)
    print_report(screen.console, summarise(folder), overview, [text])
    assert not CONTROL.search(re.sub(r"\x1b\[[0-9;]*m|\t", "", screen.raw.getvalue()))


def require_only_a_picture(svg: str) -> None:
    """Well-formed, without anything that acts or loads."""
    assert svg.isprintable() or not CONTROL.search(svg)
    for element in ElementTree.fromstring(svg).iter():
        assert element.tag.removeprefix("{http://www.w3.org/2000/svg}") in (
            "svg",
            "rect",
            "text",
            "title",
            "line",
            "path",
        )
        assert not any(name.startswith("on") or "href" in name or name == "style" for name in element.attrib)


class Tags(HTMLParser):
    """What is in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]


def require_only_text(html: str) -> None:
    assert not CONTROL.search(html.replace("\t", ""))
    html.encode()
    tags = Tags(html)
    assert not tags.names & {"script", "img", "iframe", "object", "embed", "link", "form", "input", "base", "video"}
    for tag, name, value in tags.attributes:
        assert not name.startswith("on") and name not in ("src", "style", "srcdoc", "action"), (tag, name)
        if name == "href":
            assert re.match(r"#agent-\d+$|https?:|mailto:|(?![\w+.-]+:)", value or ""), value


@needs_browser
def test_the_page_in_a_browser_runs_and_loads_nothing(store: RunStore, tmp_path: Path) -> None:
    keep(store, Run(5, 2, names=("writer", BREAKING), text=BREAKING))
    show_run("", html=tmp_path / "run.html")
    with browser() as window:
        window.open((tmp_path / "run.html").as_uri())
        assert window.run("return document.title").startswith("</title></style></svg><script>")
        assert window.run("return document.querySelectorAll('svg rect').length") > 20
        assert (
            window.run("return getComputedStyle(document.querySelector('.number')).textAlign") == "right"
        )  # its style
        window.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert window.run("return performance.getEntriesByType('resource').length") == 0
        assert window.run("return document.documentElement.scrollWidth <= innerWidth") is True
        assert "broken" not in window.run("return document.title").split("<script>")[0]
        assert window.problems() == []


def test_files_are_written_instead_of_the_report(
    store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = keep(store, Run(2, 1))
    show_run("", svg=tmp_path / "a.svg", html=tmp_path / "a.html")
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("written to") == 2
    assert (tmp_path / "a.svg").read_text() in (tmp_path / "a.html").read_text()
    with pytest.raises(KimiLiteError, match="cannot be written"):
        show_run("", svg=tmp_path / "missing" / "a.svg")
    (folder / "board" / "a").mkdir(parents=True)
    (folder / "board" / "a" / "notes\x1b[2J.md").write_text("x")
    show_run("")
    out = capsys.readouterr().out
    assert "Three fit: **A**" in out and out.endswith(
        f"The board has 1 file, in {folder / 'board'}:\na/notes\\x1b[2J.md\n"
    )


def test_runs_are_listed_with_their_states_and_deleted(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    list_runs()
    assert "There is no run" in capsys.readouterr().err
    done, cut = keep(store, Run(2, 1)), keep(store, Run(2, 1), is_whole=False)
    done.rename(store.folder / "done"), cut.rename(store.folder / "cut")
    with Journal(store.folder / "cut"):
        list_runs()
        assert re.search(r"^cut +\d\d \w{3} \d\d:\d\d +running ", capsys.readouterr().out, re.M)
        with pytest.raises(KimiLiteError, match="nothing was deleted"):
            delete_runs(["done", "cut"])
    list_runs()
    lines = capsys.readouterr().out.splitlines()
    assert sorted(re.sub(r"\d\d \w{3} \d\d:\d\d", "when", row)[:30] for row in lines) == [
        "cut  when  interrupted  Compar",
        "done  when  completed    Compa",
    ]
    delete_runs(["done", "done"])
    assert [one.run_id for one in store.summaries()] == ["cut"]


def test_a_run_that_was_interrupted_says_how_to_go_on(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    folder = keep(store, Run(2, 1), is_whole=False)
    with open(folder / journal.FILE_NAME, "ab") as file:
        file.write(b'garbage\n{"event":"Later","t_s":1}\n')
    show_run(folder.name)
    out = capsys.readouterr().out
    assert f"kimi-lite swarm resume {folder.name}" in out
    assert "- 1 line of the journal damaged and left out:" in out and "- 1 event of a newer version" in out


def test_the_timeline_marks_the_agent_that_its_stage_waited_for() -> None:
    overview = Overview([*resumed_run(), RunEnded(10.0, "completed", "x", Totals())])
    svg = timeline(overview)
    assert "● a1 writer" in svg and "● a2 writer" not in svg and "resumed" in svg and ">stage 1<" in svg


@given(st.floats(1e-3, 1e6))
def test_an_axis_has_a_few_ticks(end_s: float) -> None:
    assert 1 <= end_s / tick_step(end_s) <= 10.001 or end_s < 1e-3


def test_the_commands(store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = keep(store, Run(2, 1))

    def typed(*words: str) -> int:
        done = CliRunner().invoke(app, ["swarm", *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        capsys.readouterr()
        return done.exit_code

    assert typed("show", folder.name[:10], "--svg", str(tmp_path / "a.svg"), "--html", str(tmp_path / "a.html")) == 0
    assert (tmp_path / "a.svg").exists() and (tmp_path / "a.html").exists()
    assert typed("show") == typed("list") == 0
    with pytest.raises(KimiLiteError, match="swarm show --help lists the options"):
        typed("show", "a", "b")
    with pytest.raises(KimiLiteError, match="There is no run 'x'"):
        typed("delete", folder.name, "x")
    assert typed("delete", folder.name) == 0 and store.summaries() == []
