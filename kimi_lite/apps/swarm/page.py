"""A run as one HTML page that needs nothing else: no script, no network, and no text in it that could be either.

The page's policy lets it use its own style sheet, known by its digest, and nothing more. Task, answer, results and
what agents said are Markdown without HTML and pictures; names, prompts and arguments are text.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from kimi_lite.apps.swarm.overview import Agent, Call, Overview
from kimi_lite.apps.swarm.runs import RunSummary
from kimi_lite.apps.swarm.timeline import timeline
from kimi_lite.apps.swarm.view import CRITICAL_PATH, called, conflict, duration, outcome_name, totals
from kimi_lite.apps.tools.tool import shortened
from kimi_lite.terminal import harmless
from kimi_lite.units import counted, one_line

_LONGEST_RESULT = 4_000  # characters of a tool's result: the journal has them whole
_LONGEST_MARKDOWN = 50_000  # characters; longer texts stay as they are
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
pre { font: 13px/1.45 ui-monospace, monospace; }
.text, .said { background: #8881; border-radius: 6px; padding: .5rem .8rem; overflow-wrap: anywhere; }
.picture { overflow-x: auto; background: #fff; border-radius: 6px; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .15rem .7rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: normal; color: #888; } .number { text-align: right; white-space: nowrap; }
.bad { color: #d0453a; } .critical { color: #c2507a; font-weight: bold; } .pale { color: #888; }
p { margin: .4rem 0; }
summary { cursor: pointer; } details { margin: .4rem 0; } details details { margin-left: 1rem; }
.said p:first-child { margin-top: 0; } .said p:last-child { margin-bottom: 0; }
"""


def page(summary: RunSummary, overview: Overview, journal_problems: list[str]) -> str:
    """The page, whole."""
    return "\n".join([*_head(summary), *_body(summary, overview, journal_problems), "</body>", "</html>", ""])


def _head(summary: RunSummary) -> Iterator[str]:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    yield "<!DOCTYPE html>"
    yield '<html lang="en">'
    yield '<head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="referrer" content="no-referrer">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{_line(summary.task or summary.run_id, 80)}</title>"
    yield f"<style>{_STYLE}</style></head>"
    yield "<body>"


def _body(summary: RunSummary, overview: Overview, journal_problems: list[str]) -> Iterator[str]:
    started = overview.started
    yield f"<h1>{_line(started.task if started else summary.run_id, 200)}</h1>"
    yield f'<p class="pale">{" · ".join(_facts(summary, overview))}</p>'
    if started is not None and len(started.task) > 100:
        yield f"<h2>Task</h2>\n{_text(started.task)}"
    if overview.ended is not None:
        yield f"<h2>Answer</h2>\n{_markdown(overview.ended.answer or '(none)')}"
    yield f"<h2>Timeline</h2>\n<div class=picture>{timeline(overview)}</div>"
    wrong = list(_wrong(overview, journal_problems))
    if wrong:
        yield "<h2>What went wrong</h2>\n<ul>" + "\n".join(f"<li>{one}</li>" for one in wrong) + "</ul>"
    yield f"<h2>Agents</h2>\n{_table(overview)}"
    if overview.created:
        yield "<h2>Kinds of agents</h2>"
    for created in overview.created.values():
        yield f"<details><summary>{_line(created.name, 80)}</summary>{_text(created.system_prompt)}</details>"
    yield "<h2>Their work</h2>"
    for number, agent in enumerate(overview.all_agents):
        yield from _work(agent, number)


def _facts(summary: RunSummary, overview: Overview) -> Iterator[str]:
    ended, started = overview.ended, overview.started
    state = summary.state if ended is None else outcome_name(ended.outcome)
    yield f"<b>{_line(state, 40)}</b>" + (f": {_line(ended.reason, 400)}" if ended is not None and ended.reason else "")
    yield _line(totals(overview.totals), 400)
    if started is not None:
        yield _line(f"run {summary.run_id}, begun {started.started or '?'} with kimi-lite {started.version}", 200)


def _wrong(overview: Overview, journal_problems: list[str]) -> Iterator[str]:
    for number, agent in enumerate(overview.all_agents):
        if agent.ended is not None and agent.ended.outcome != "completed":
            what = f"{outcome_name(agent.ended.outcome)}: {agent.ended.reason}"
            yield f'<a href="#agent-{number}">{_line(agent.label, 80)}</a>: {_line(what, 2000)}'
    for refused in overview.conflicts:
        yield f"{duration(refused.t_s)}: {_line(conflict(refused), 400)}"
    for warned in overview.warnings:
        yield f"{duration(warned.t_s)}: {_line(warned.text, 2000)}"
    yield from (_line(problem, 400) for problem in journal_problems)


def _table(overview: Overview) -> str:
    names = ("", "agent", "stage", "outcome", "began", "took", "steps", "tokens read", "cached", "generated")
    critical = set(overview.critical_path.values())
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for number, agent in enumerate(overview.all_agents):
        used, is_critical = agent.usage, agent.id in critical
        end_s = agent.ended.t_s if agent.ended is not None else overview.now_s
        share = f"{100 * used.cached_tokens / used.prompt_tokens:.0f} %" if used.prompt_tokens else ""
        cells = [
            "<td class=critical>●</td>" if is_critical else "<td></td>",
            f'<td><a href="#agent-{number}">{_line(agent.label, 60)}</a></td>',
            _number(agent.started.stage + 1 if agent.started is not None else ""),
            _outcome(agent),
            *map(_number, (duration(agent.begin_s), duration(end_s - agent.begin_s), f"{agent.num_steps:,}")),
            *map(_number, (f"{used.prompt_tokens:,}", share, f"{used.generated_tokens:,}")),
        ]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    note = f"<p class=critical>● {CRITICAL_PATH}</p>" if critical else ""
    return "<table>\n" + "\n".join(rows) + f"\n</table>{note}"


def _outcome(agent: Agent) -> str:
    if agent.ended is None:
        return "<td></td>"
    style = "" if agent.ended.outcome == "completed" else " class=bad"
    return f"<td{style}>{_line(outcome_name(agent.ended.outcome), 40)}</td>"


def _work(agent: Agent, number: int) -> Iterator[str]:
    """What one agent was given, did and said; closed until it is wanted."""
    amount = f"{counted(agent.num_steps, 'step')}, {counted(len(agent.calls), 'call')}"
    yield f'<details id="agent-{number}">'
    yield f"<summary><b>{_line(agent.label, 80)}</b> <span class=pale>{amount}</span></summary>"
    if agent.started is not None:
        yield f"<p class=pale>prompt</p>{_text(agent.started.prompt)}"
    for step, event in sorted(agent.steps.items()):
        tokens = f"{event.usage.prompt_tokens:,} tok read, {event.usage.generated_tokens:,} generated"
        yield f"<details><summary>step {step + 1} <span class=pale>{duration(event.t_s)} · {tokens}</span></summary>"
        yield from _message(event.message)
        yield "</details>"
    if agent.calls:
        yield f"<details><summary>{counted(len(agent.calls), 'call')} of tools</summary>"
        yield from map(_call, agent.calls)
        yield "</details>"
    if agent.ended is not None:
        reason = f": {_line(agent.ended.reason, 2000)}" if agent.ended.reason else ""
        yield f"<p class=pale>{_line(outcome_name(agent.ended.outcome), 40)}{reason}</p>"
        yield _markdown(agent.ended.result or "(no result)")
    yield "</details>"


def _message(message: Mapping[str, Any]) -> Iterator[str]:
    for key, name in (("reasoning_content", "thinking"), ("content", "says")):
        text = message.get(key)
        if isinstance(text, str) and text.strip():
            yield f"<p class=pale>{name}</p>{_text(text) if name == 'thinking' else _markdown(text)}"
    for name, arguments in called(message):
        yield f"<p class=pale>calls {_line(name, 80)}</p>{_text(arguments)}"


def _call(call: Call) -> str:
    ended, started = call.ended, call.started
    head = f"{duration(started.t_s)} · <b>{_line(started.tool, 80)}</b> {_line(started.arguments, 400)}"
    if ended is None:
        return f"<p>{head} <span class=bad>was cut off</span></p>"
    style = " class=bad" if ended.outcome == "failed" else " class=pale"
    how = f"<span{style}>{_line(ended.outcome, 20)}, {duration(ended.seconds)}</span>"
    return f"<p>{head} {how}</p>{_text(shortened(ended.result, _LONGEST_RESULT))}"


def _number(value: object) -> str:
    return f"<td class=number>{escape(str(value))}</td>"


def _line(text: str, most: int) -> str:
    return escape(one_line(text, most))


def _text(text: str) -> str:
    """As it is, but for what acts on a reader's screen."""
    return f"<div class=text dir=auto>{escape(harmless(text))}</div>"


def _markdown(text: str) -> str:
    """Without HTML and pictures; links go where a reader sends them, and only to the web."""
    if len(text) > _LONGEST_MARKDOWN:
        return _text(text)
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.disable(["image", "html_block", "html_inline"])
    return f"<div class=said dir=auto>{parser.render(harmless(text))}</div>"
