"""Every slash command: what it does, what it says, what it refuses."""

import itertools
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.apps.chat.commands.registry import _ELSEWHERE, all_commands, is_command
from kimi_lite.apps.chat.parameters import PARAMETERS
from kimi_lite.apps.remote.session import RemoteSession
from kimi_lite.apps.swarm.journal import read as read_journal
from kimi_lite.apps.swarm.runs import RunStore
from kimi_lite.apps.tools.box import ToolBox
from kimi_lite.engine.types import SamplingParams
from kimi_lite.options import Options
from tests.apps.chat.test_tool_loop import WithControls, written
from tests.apps.fake_openai import FakeOpenAI, call_delta, sse
from tests.apps.talk import Talk
from tests.engine.fakes import fake_vision, scripted_logits
from tests.engine.test_conversation import says
from tests.media.pictures import encoded, pixels


@pytest.fixture
def talk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Talk]:
    one = Talk(tmp_path / "sessions", capsys)
    yield one
    one.chat.autosave.close()


def said(talk: Talk) -> list[str]:
    """The turns of the record, for short."""
    return [turn.text for turn in talk.session.turns]


def test_help_has_every_command_and_explains_one(talk: Talk) -> None:
    shown = talk.say("/help")
    assert all(f"/{command.names[0]}" in shown for command in all_commands().commands)
    assert "Alt-Enter" in shown
    assert "same as before" not in talk.say("/help undo")
    assert talk.say("/help /undo").strip().startswith("/undo")
    assert "There is no command /nothing" in talk.say("/help nothing")


@pytest.mark.parametrize(
    ("typed", "nearest"), [("/exlt", "/exit"), ("/regenn", "/regen"), ("/sesions", "/sessions"), ("/tink", "/think")]
)
def test_unknown_commands_suggest_the_nearest(talk: Talk, typed: str, nearest: str) -> None:
    assert f"unknown command {typed} - did you mean {nearest}?" in talk.say(typed)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("/foo", "/help lists them"), ("/?x", "/help lists them"), ("/stop", "Ctrl-C stops"), ("/model", "chat -m FILE")],
)
def test_nothing_is_suggested_that_is_not_alike(talk: Talk, typed: str, hint: str) -> None:
    shown = talk.say(typed)
    assert "did you mean" not in shown
    assert hint in shown


def test_hints_for_commands_of_other_programs_name_commands_that_exist() -> None:
    known = {f"/{name}" for name in all_commands().by_name}
    for name, hint in _ELSEWHERE.items():
        assert f"/{name}" not in known
        assert set(re.findall(r"(?<!\w)/[a-z]+", hint)) <= known


@pytest.mark.parametrize("line", ["/* a comment */", "/home/me/a.png what is it?", "//", " /help me", "/ help"])
def test_lines_that_only_begin_like_commands_are_messages(talk: Talk, line: str) -> None:
    assert not is_command(line)
    talk.say(line)
    assert said(talk)[0] == line.strip()


@pytest.mark.parametrize("command", ["/exit", "/quit", "/bye"])
def test_exit_leaves_and_the_conversation_is_saved(talk: Talk, command: str) -> None:
    talk.say("hi", command, "never read")
    assert said(talk) == ["hi", "you said: hi"]
    assert talk.store.exists(talk.chat.autosave.name)


def test_clear_begins_anew_and_keeps_the_old_one_saved(talk: Talk) -> None:
    talk.say("/system be brief", "hi")
    old = talk.chat.autosave.name
    assert f"saved as {old}" in talk.say("/clear")
    assert (said(talk), talk.session.system) == ([], "be brief")
    talk.say("there")
    assert [one.num_exchanges for one in talk.store.summaries()] == [1, 1]


def test_system_is_shown_set_and_taken_away(talk: Talk) -> None:
    assert "no system prompt" in talk.say("/system")
    assert "system prompt: be\nbrief" in talk.say("/system be\nbrief")
    assert "no system prompt" in talk.say("/system off")


def test_set_changes_what_answers_are_made_with(talk: Talk) -> None:
    shown = talk.say("/set")
    assert all(parameter.name in shown for parameter in PARAMETERS)
    talk.say(
        "/set temp 0.7",
        "/set top_p=0.5",
        "/set seed 4",
        "/set max-tokens 9",
        "/set stop END",
        "/set think off",
        "/set min-p 0.1",
    )
    settings = talk.session.settings
    assert settings.params == SamplingParams(temperature=0.7, top_p=0.5, seed=4, max_tokens=9, stop=("END",), min_p=0.1)
    assert not settings.is_thinking
    talk.say("/set temp default", "/set max-tokens -1", "/set stop none", "/set think on", "/set think-budget 5")
    assert talk.session.settings.params == SamplingParams(temperature=1.0, top_p=0.5, seed=4, min_p=0.1)
    assert talk.session.settings.thinking_budget == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temp hot", "temp is 'hot'; it must be a number, 0 or more"),
        ("/set temp -1", "temp is '-1'"),
        ("/set top-p 3", "top-p is '3'; it must be a number above 0, at most 1"),
        ("/set tempp 1", "Did you mean temp?"),
        ("/set think maybe", "think is 'maybe'; it must be on or off"),
        ("/set think-budget -7", "think-budget is '-7'"),
        ("/retry-with temp", "is not name=value"),
        ("/retry-with", "is not name=value"),
        ("/think maybe", "It is /think on, off"),
        ("/regen", "no message yet"),
        ("/undo", "no message yet"),
        ("/edit", "no message yet"),
        ("/instant", "There is no message"),
        ("/save", "nothing to save"),
        ("/export", "nothing to export"),
        ("/load", "There is no name"),
        ("/load nobody", "no conversation 'nobody'"),
        ("/load ../../etc/passwd", "is not a valid name"),
        ("/sessions delete nobody", "no conversation 'nobody'"),
        ("/sessions burn", "no saved conversation has 'burn'"),
        ("/sessions delete", "There is no name"),
        ("/export html x", "There is no format 'html'"),
        ("/export html", "There is no format 'html'"),
        ("/set num_ctx 8192", "kimi-lite chat -c 64K"),
        ("/set model x", "kimi-lite chat -m FILE"),
        ("/ctx drop", "nothing in the context"),
        ("/ctx burn", "/ctx burn is not known"),
        ("/ctx 64K", "kimi-lite chat -c 64K --continue"),
        ("/stats", "no answer yet"),
        ("/tokens", "no answer yet"),
        ("/read no/such", "cannot be read"),
        ("/read /tmp", "is a folder"),
        ("/image a.png", "needs a vision tower"),
        ("/video a.mp4", "needs a vision tower"),
    ],
)
def test_mistakes_are_sentences(talk: Talk, line: str, message: str) -> None:
    assert message in " ".join(talk.say(line).split())
    assert said(talk) == []


def test_think_switches_limits_shows_and_hides(talk: Talk) -> None:
    assert "thinking off (temp 0.6, top-p 0.95)" in talk.say("/think off")
    talk.say("hi")
    assert "came without reasoning" in talk.say("/think show")
    assert "at most 3 tokens" in talk.say("/think on", "/think budget 3")
    assert talk.session.settings.thinking_budget == 3
    talk.say("/think budget", "hi")
    assert talk.session.settings.thinking_budget is None
    assert "about it" in talk.say("/think show")
    talk.chat.shows_reasoning = True
    assert "hidden" in talk.say("/think hide")
    assert not talk.chat.shows_reasoning


def test_instant_and_reason_are_for_one_message(talk: Talk) -> None:
    talk.say("/instant hi", "/reason there")
    assert [turn.is_thinking for turn in talk.session.turns[1::2]] == [False, True]
    assert talk.session.settings.is_thinking
    assert "0.6" not in talk.say("/think")


def test_regen_and_retry_with_answer_again(talk: Talk) -> None:
    talk.say("hi", "/regen")
    assert said(talk) == ["hi", "you said: hi"]
    seen = []
    add = talk.session.engine.add
    talk.session.engine.add = lambda request: seen.append(request) or add(request)
    talk.say("/retry-with temp=0.7 top-k=3", "/regen")
    assert [(request.sampling.temperature, request.sampling.top_k) for request in seen] == [(0.7, 3), (1.0, 0)]


def test_undo_takes_back_what_was_said_last(talk: Talk) -> None:
    assert "removed: two (1 exchange left)" in talk.say("one", "two", "/undo")
    assert said(talk) == ["one", "you said: one"]
    assert [one.num_exchanges for one in talk.store.summaries()] == [1]


def test_edit_brings_the_message_back_and_replaces_it_only_when_sent(talk: Talk) -> None:
    talk.say("one", "/edit", None)
    assert talk.input.drafts == ["", "", "one", ""]
    assert said(talk) == ["one", "you said: one"]
    talk.say("/edit", "two")
    assert said(talk) == ["two", "you said: two"]
    talk.say("/edit three", is_interactive=False)
    assert said(talk) == ["three", "you said: three"]
    assert "Use /edit TEXT" in talk.say("/edit", is_interactive=False)
    assert "it has 2,048" in talk.say("/edit " + "long " * 2000)
    assert said(talk) == ["three", "you said: three"]


def test_ctx_shows_drops_and_summarises(talk: Talk) -> None:
    talk.say("/think off", "one", "two", "three")
    assert "of 2,048 tokens" in talk.say("/ctx")
    assert "3 exchanges" in talk.say("/ctx")
    shown = talk.say("/ctx drop 1")
    assert "the oldest exchange is no longer sent" in shown
    assert "2 exchanges · 1 older dropped" in shown
    shown = talk.say("/ctx summarise 1")
    assert "replaced by this summary" in shown
    assert talk.session.summary.startswith("you said: Summarise our conversation")
    assert len(said(talk)) == 6
    assert "is not a number of exchanges from 1 to 1" in talk.say("/ctx drop 7")


def test_stats_and_tokens_and_experts_tell_what_happened(talk: Talk) -> None:
    talk.say("/think off", "hi", "there")
    shown = talk.say("/stats")
    for word in ("answers", "cached", "generated", "first token", "memory", "thinking off"):
        assert word in shown
    tokens = talk.say("/tokens")
    ids = talk.session.turns[-1].ids
    assert all(str(i) in tokens for i in ids)
    assert "'<|im_end|>'" in tokens
    talk.session.turns[-1] = replace(talk.session.turns[-1], ids=())
    assert "not known here" in talk.say("/tokens")
    shown = talk.say("/experts")
    assert "pages" not in shown
    assert "counted only with a GPU or with --ram below" in shown


def test_experts_shows_hit_rates_and_heat_where_there_are_some(talk: Talk) -> None:
    model = talk.session.engine.model
    model.counters = lambda: {
        "expert_hits": 30,
        "expert_late": 4,
        "expert_misses": 6,
        "disk_bytes": 3 << 30,
        "disk_busy_s": 1.5,
    }
    model.heat = lambda: np.outer(np.ones(4), [100.0, 1, 0, 0])
    shown = talk.say("/experts")
    assert [line.split() for line in shown.splitlines() if line.split()[0] in ("time", "expert")] == [
        ["time", "the", "disk", "was", "busy", "1.50", "s"],
        ["expert", "hit", "rate", "75.0", "%"],
    ]
    assert "found in RAM, but late" in shown
    assert "3.0 GiB" in shown
    assert "█" in shown
    assert "hottest … coldest of 4 experts a layer" in shown
    model.counters = lambda: {"promotion_budget": 4, "promotion_cost_s": 4e-4, "promotion_gain_s": 12e-4}
    shown = " ".join(talk.say("/experts").split())
    assert "copied to VRAM while it answers up to 4 a step: a copy costs 0.40 ms and saves about 1.20 ms" in shown
    assert "time that a copy to VRAM costs 0.40 ms" in shown


def test_read_puts_files_into_the_next_message_only(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "my notes.md"
    path.write_text("```\nsecret\n```\n")
    assert "my notes.md (3 lines), about" in talk.say(f"/read {path}")
    assert "my notes.md" in talk.say("/read")
    talk.say("what is it?", "and now?")
    assert said(talk)[0] == "what is it?\n\nFile `my notes.md`:\n````\n```\nsecret\n```\n````"
    assert said(talk)[2] == "and now?"
    talk.say(f"/read {path}", "/read off", "plain")
    assert said(talk)[-2] == "plain"
    (tmp_path / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    assert "is not UTF-8 text" in talk.say(f"/read {tmp_path / 'latin'}")


def test_a_refused_message_comes_back_into_the_prompt_with_its_files(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * 4000)
    assert "it has 2,048" in talk.say(f"/read {tmp_path / 'long'}", "what?")
    assert talk.input.drafts[-1] == "what?"
    assert len(talk.chat.attachments) == 1
    assert said(talk) == []


def test_save_load_sessions_and_delete(talk: Talk) -> None:
    talk.say("one", "/save first", "/clear", "two", "/save second")
    assert "There is a conversation 'first' already" in talk.say("/save first")
    shown = talk.say("/sessions")
    assert "first" in shown
    assert [line.split()[0] for line in shown.splitlines() if "this one" in line] == ["second"]
    assert "one" in shown
    assert len(talk.store.summaries()) == 2
    assert "first: 1 exchange, the last about: one" in talk.say("/load first")
    talk.say("more")
    assert said(talk) == ["one", "you said: one", "more", "you said: more"]
    assert "is the conversation you are in" in talk.say("/sessions delete first")
    talk.say("/sessions delete second")
    assert [one.name for one in talk.store.summaries()] == ["first"]


def test_a_loaded_conversation_prefills_only_what_is_new(talk: Talk) -> None:
    talk.say("/think off", "a message of some length, so that there is something to find", "/save first")
    last = talk.session.turns[-1].stats
    talk.say("/clear", "else", "/load first", "and now")
    assert talk.session.turns[-1].stats.cached_tokens == last.prompt_tokens + last.generated_tokens - 1


def test_export_writes_both_forms(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    talk.say(
        "/system be brief",
        "one",
        "two",
        "/ctx drop 1",
        "/export md out.md",
        "/export json out.json",
        "/export",
        "/export a.json",
    )
    text = (tmp_path / "out.md").read_text()
    for part in (
        "# A conversation with fake",
        "> be brief",
        "## You\n\none",
        "you said: two",
        "<summary>Reasoning</summary>",
        "no longer",
    ):
        assert part in text
    document = json.loads((tmp_path / "out.json").read_text())
    assert [turn["content"] for turn in document["turns"]] == said(talk)
    assert (tmp_path / f"{talk.chat.autosave.name}.md").read_text() == text
    assert (tmp_path / "a.json").exists()
    assert "exists already" in talk.say("/export md out.md", is_interactive=False)
    (tmp_path / "out.md").write_text("mine")
    assert "not written" in talk.say("/export md out.md", answers="c")
    assert (tmp_path / "out.md").read_text() == "mine"
    talk.say("/export md out.md", answers="o")
    assert (tmp_path / "out.md").read_text() == text
    assert "There is no format" in talk.say("/export out.docx")
    assert "cannot be written" in talk.say("/export md no/such/folder/x.md")


def test_a_full_context_is_never_cut_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tmp_path, capsys, context_length=512)
    talk.say("/think off", *["word " * 30] * 2)
    shown = talk.say("word " * 70, answers="c")
    assert "of 512 tokens; an answer needs 64 more" in shown
    assert len(talk.session.exchanges) == 2
    assert talk.input.drafts[-1].startswith("word")
    assert "Send /ctx drop" in talk.say("word " * 70, is_interactive=False)
    talk.say("word " * 70, answers="d")
    assert talk.session.num_dropped > 0
    assert len(talk.session.exchanges) >= 1
    assert "older dropped" in talk.say("/ctx")


def test_a_context_that_fills_up_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tmp_path, capsys, context_length=256)
    shown = talk.say("/think off", "abcdefgh " * 12)
    assert "% full" in shown


def test_the_full_context_can_be_summarised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tmp_path, capsys, context_length=1024)
    talk.say("/think off", *["word " * 40] * 4)
    shown = talk.say("word " * 100, answers="s")
    assert "replaced by this summary" in shown
    assert talk.session.summary
    assert said(talk)[-1].startswith("you said: word")


def test_tools_are_listed_and_may_be_allowed(talk: Talk, tmp_path: Path) -> None:
    assert "--tools FOLDER" in talk.say("/tools")
    with ToolBox.open(tmp_path) as box:
        talk.chat.tools = box
        name = next(iter(box.tools))
        assert "asks" in talk.say("/tools")
        assert "runs ·" in talk.say(f"/tools {name} on")
        assert "runs ·" not in talk.say(f"/tools {name} ask")
        assert "There is no tool 'nothing'" in talk.say("/tools nothing on")
        assert "is not known" in talk.say(f"/tools {name} off")


def test_a_tool_call_is_asked_about_run_and_answered(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("forty-two")
    call = (
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "functions.read_file:0",
        "<|tool_call_argument_begin|>",
    )
    says(
        talk.session, "", *call, '{"path": "note.txt"}', "<|tool_call_end|>", "<|tool_calls_section_end|>", "<|im_end|>"
    )
    scripted = talk.session.engine.model.next_logits
    done = scripted_logits(
        talk.session.engine.tokenizer, lambda prompt: ("", f"it says {prompt.rpartition('forty')[1]}")
    )
    talk.session.engine.model.next_logits = lambda ids: (
        done(ids) if talk.session.turns[-1].role == "tool" else scripted(ids)
    )
    talk.session.set_thinking(False)
    with ToolBox.open(tmp_path) as box:
        talk.chat.tools = box
        talk.say("what does note.txt say?", answers="y")
    assert "run read_file?" in talk.input.questions[0]
    assert [turn.role for turn in talk.session.turns] == ["user", "assistant", "tool", "assistant"]
    assert "forty-two" in talk.session.turns[2].text
    assert talk.session.turns[3].text == "it says forty"


def test_images_go_with_the_message_where_the_model_sees(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(pixels(28, 28)))
    shown = talk.say(f"what is {tmp_path}/a.png")
    assert "has no vision tower here" in shown
    assert isinstance(talk.session.turns[0].content, str)
    talk.session.engine.vision = fake_vision()
    assert "a.png (image, 1 token) goes with your next message" in talk.say(f"/image {tmp_path}/a.png")
    talk.say("look")
    image, text = talk.session.messages[-2]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "look"}
    assert "a.png (image, 1 token) goes with this message" in talk.say(f"and {tmp_path}/a.png")
    assert len(talk.session.messages[-2]["content"]) == 2


def test_an_endpoint_that_says_little_is_told_as_it_is(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.say("hi")
    for name, value in (("count_tokens", lambda *a, **k: None), ("counters", dict), ("pieces", lambda ids: None)):
        monkeypatch.setattr(talk.session, name, value)
    talk.session.context_length = None
    assert "a context whose length the endpoint does not say" in talk.say("/ctx")
    assert "the endpoint does not say where its experts lie" in talk.say("/experts")
    assert "not known here" in talk.say("/tokens")
    talk.say("more")
    assert said(talk)[-1] == "you said: more"


def test_every_command_is_tested_here() -> None:
    source = Path(__file__).read_text()
    assert [command.names[0] for command in all_commands().commands if f'"/{command.names[0]}' not in source] == []


def led(prompt: str) -> tuple[str, str]:
    """An orchestrator with two agents."""
    if "You lead a team" not in prompt:
        return "", "the second part " * 8 if "second" in prompt else "part 1"
    if "<|tool_call_begin|>" in prompt.rpartition("Divide it")[2]:
        return "", "All parts: **12**"
    made = [("create_subagent", {"name": "worker", "system_prompt": "Work."})]
    made += [("assign_task", {"agent": "worker", "prompt": f"Do the {which} part."}) for which in ("first", "second")]
    return "", written([(name, json.dumps(arguments)) for name, arguments in made], 0)


@pytest.fixture
def leading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Talk]:
    """A chat whose model can lead a swarm."""
    monkeypatch.setenv("KIMI_LITE_STATE", str(tmp_path / "state"))
    talk = Talk(tmp_path / "sessions", capsys, context_length=32768)
    engine = talk.session.engine
    engine.model.next_logits = scripted_logits(WithControls(engine.tokenizer), led)
    yield talk
    talk.chat.autosave.close()


def test_a_swarm_answers_in_the_conversation(leading: Talk) -> None:
    engine = leading.session.engine
    shown = leading.say("/swarm Divide it")
    assert "orchestrator step 1: calls create_subagent, assign_task x 2" in shown
    assert "a2 worker begins: Do the second part." in shown and "completed · 2 agents · 4 steps (3 critical)" in shown
    assert leading.answers == "All parts: **12**\n" and said(leading) == ["Divide it", "All parts: **12**"]
    leading.say("hello")
    assert said(leading)[2:] == ["hello", "part 1"] and engine.scheduler.max_running is None
    (run,) = RunStore().summaries()
    assert run.state == "finished" and f"kimi-lite swarm show {run.run_id}" in shown
    saved = leading.store.read(leading.chat.autosave.name)
    assert [turn["content"] for turn in saved["turns"]] == said(leading)


def test_ctrl_c_ends_a_swarm_with_what_is_there_and_the_chat_goes_on(leading: Talk) -> None:
    engine, before = leading.session.engine, signal.getsignal(signal.SIGINT)
    num_steps = itertools.count()

    def interrupt(batch: object, layer: int) -> None:
        known = engine.tokenizer.decode(engine.scheduler.running[0].token_ids)
        if layer == 0 and "second" in known and "You lead a team" not in known and next(num_steps) == 60:
            os.kill(os.getpid(), signal.SIGINT)

    engine.model.before_layer = interrupt
    shown = leading.say("/swarm Divide it", "hello")
    assert re.search(r"a1 worker · .* completed", shown) and re.search(r"a2 worker · .* stopped", shown)
    assert "The task is not complete: " in shown
    assert said(leading) == ["Divide it", "All parts: **12**", "hello", "part 1"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_swarm_works_at_the_endpoint_of_the_chat(leading: Talk, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "a.txt").write_text("42")
    read = call_delta(0, '{"path": "a.txt"}', "read_file", "functions.read_file:0")
    with FakeOpenAI(sse(read, reason="tool_calls"), sse({"content": "It says 42."})) as fake:
        session = RemoteSession.open(fake.url)
        leading.chat.conversation = leading.chat.autosave.conversation = session
        session.system = "Be brief."
        leading.chat.options = Options(endpoint=fake.url, tools_folder=tmp_path / "shared", given={"endpoint": "-"})
        shown = leading.say("/swarm What does a.txt say?")
        session.close()
    assert leading.answers == "It says 42.\n" and "orchestrator ← read_file" in shown
    assert [turn.text for turn in session.turns] == ["What does a.txt say?", "It says 42."]
    first, second = fake.bodies
    assert first["messages"][0]["content"].endswith("Be brief.") and second["messages"][-1]["content"] == "42"
    names = {tool["function"]["name"] for tool in first["tools"]}
    assert {"assign_task", "read_file", "board_write_file"} <= names and not names & {"write_file", "run_python"}
    record = RunStore().summaries()[0]
    options = read_journal(RunStore().find(record.run_id)).events[0].settings["options"]
    assert options == {
        "endpoints": [fake.url],
        "model": "kimi-k2.5",
        "work_folder": str(tmp_path / "shared"),
    }  # so that it can be resumed


def test_a_swarm_needs_a_task_and_a_model_that_can_call(leading: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "There is no task" in leading.say("/swarm")
    monkeypatch.setattr(type(leading.session), "can_call", False)
    shown = leading.say("/swarm Divide it")
    assert "fake takes no tools, so it cannot start agents" in shown and "--plan FILE" in shown
    assert not said(leading) and not RunStore().summaries()


def test_a_swarm_that_has_no_answer_leaves_the_conversation_alone(leading: Talk) -> None:
    engine = leading.session.engine
    engine.model.next_logits = scripted_logits(engine.tokenizer, lambda prompt: ("", ""))
    shown = leading.say("/swarm Divide it")
    assert "The swarm has no answer: it said nothing" in shown and "kimi-lite swarm show" in shown
    assert said(leading) == []
