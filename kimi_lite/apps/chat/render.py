"""What a terminal shows: the answer as it comes, reasoning dim, progress, the statistics line, errors.

Two streams: `out` carries the answer and nothing else, `status` (a rich console, often stderr) everything about it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TextIO

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from kimi_lite.apps.markdown.live import LiveRows
from kimi_lite.apps.markdown.rows import Row
from kimi_lite.apps.markdown.stream import MarkdownStream
from kimi_lite.engine.turns import AnswerRecord
from kimi_lite.engine.types import Stats, Token
from kimi_lite.terminal import Console, can_redraw, show_plain, write
from kimi_lite.units import counted, shortened

LEAST_PREFILL_TOKENS = 64  # below it a progress bar only flickers
LEAST_RATED_TOKENS = 16  # below it a prompt's speed is that of the first token
SILENCE_S = 1.0  # then it is shown what is waited for
REASONING_ROWS = 12  # of the screen, while the model thinks


class AnswerView:
    """Shows one answer's tokens as they come, and keeps its texts.

    On a terminal the answer is rendered as markdown and the reasoning collapses to one line when it is over; into a
    pipe, to a terminal that cannot move its cursor, or with `is_plain` both are written as they come. `think_hint` says
    how to see it again.
    """

    def __init__(
        self,
        out: TextIO,
        status: Console,
        shows_reasoning: bool,
        is_plain: bool = False,
        shows_calls: bool = True,
        think_hint: str = "",
    ) -> None:
        self.out, self.status = out, status
        self._records: list[AnswerRecord] = []  # of this answer, or of each that calls led to
        self.last: Token | None = None
        is_counted = shows_calls and not is_plain and can_redraw(status)  # hidden, but one sees that something goes on
        shows_any = shows_reasoning or is_counted
        self._thinking = (
            ReasoningView(status, is_plain, think_hint, is_hidden=not shows_reasoning) if shows_any else None
        )
        self._shows_calls = shows_calls
        screen = Console(file=out)
        self._markdown = MarkdownStream(screen) if can_redraw(screen) and out.isatty() and not is_plain else None
        self._part = ""  # what is being shown: reasoning, content or a call
        self._has_content = self._is_line_open = self._has_error = False

    @property
    def texts(self) -> dict[str, str]:
        """What was said, by kind."""
        kinds = ("reasoning", "content", "tool_call")
        return {kind: "".join(record.texts[kind] for record in self._records) for kind in kinds}

    @property
    def calls(self) -> list[dict[str, str]]:
        return [asdict(call) for record in self._records for call in record.calls]

    def show(self, token: Token) -> None:
        if self.last is None or self.last.finish_reason:
            self._records.append(AnswerRecord())
            self._has_error = False
        self.last = token
        self._has_error = self._has_error or token.error is not None
        self._records[-1].add(token)
        if token.kind == "reasoning":
            self._show_reasoning(token)
        elif token.kind == "content":
            self._show_content(token.text)
        else:
            self._show_call(token)
        if token.finish_reason == "stop" and self._shows_calls:
            self._say_if_empty(self._records[-1])

    def _say_if_empty(self, record: AnswerRecord) -> None:
        """Nothing on the screen could be a fault of ours."""
        if not record.texts["content"].strip() and not record.calls and not self._has_error:
            self._begin("")
            self._dim(f"the model {'only thought' if record.texts['reasoning'].strip() else 'said nothing'}\n")

    def close(self) -> None:
        """End the last line."""
        self._begin("")

    def _begin(self, part: str) -> None:
        """End what was shown before `part`, if it was something else."""
        if part == self._part:
            return
        if self._part == "reasoning" and self._thinking:
            self._thinking.collapse()
        elif self._part == "content":
            self._end_content()
        elif self._part == "call":
            self._dim("\n")
        self._part = part

    def _show_reasoning(self, token: Token) -> None:
        if self._thinking and (token.text.strip("\n") or self._part == "reasoning"):
            self._begin("reasoning")
            self._thinking.add(token)

    def _show_content(self, text: str) -> None:
        text = text if self._has_content else text.lstrip("\n")  # models begin with empty lines
        if not text:
            return
        self._begin("content")
        self._has_content = True
        if self._markdown:
            self._markdown.feed(text)
        else:
            write(self.out, text)
            self._is_line_open = not text.endswith("\n")

    def _end_content(self) -> None:
        if self._markdown:
            self._markdown.finish()
        elif self._is_line_open:
            self.out.write("\n")
            self.out.flush()

    def _show_call(self, token: Token) -> None:
        if not self._shows_calls:
            return
        if token.call:
            self._begin("")
            self._begin("call")
            self._dim(f"→ {token.call.name} ")
        if token.text:
            self._begin("call")
            self._dim(token.text)
        if token.error:
            self._begin("")
            self._dim(f"{token.error}\n")

    def _dim(self, text: str) -> None:
        show_plain(self.status, text, end="", style="dim")


class ReasoningView:
    """What the model thinks: its last rows while it does, then one line. Plain: all of it, and the line. Hidden: how
    much."""

    def __init__(self, console: Console, is_plain: bool = False, hint: str = "", is_hidden: bool = False) -> None:
        self._console, self._hint, self._is_hidden = console, f" ({hint})" if hint else "", is_hidden
        self._live = LiveRows(console, REASONING_ROWS) if can_redraw(console) and not is_plain else None
        self._text, self._num_tokens, self._began_s = "", 0, 0.0

    def add(self, token: Token) -> None:
        """The next token of it."""
        if not self._text:
            self._began_s = time.perf_counter()
        text = token.text if self._text else token.text.lstrip("\n")
        self._text += text
        self._num_tokens += token.id is not None
        if self._live:
            self._live.draw(self._rows)
        elif text:
            show_plain(self._console, text, end="", style="dim")

    def collapse(self) -> None:
        """It is over: `▸ thought for 9 s · 58 tokens`."""
        if self._live:
            self._live.erase()
        elif self._text and not self._text.endswith("\n"):
            show_plain(self._console, "")
        show_plain(self._console, f"▸ thought for {self._amount}{self._hint}", style="dim")
        self._text, self._num_tokens = "", 0

    @property
    def _amount(self) -> str:
        tokens = f" · {counted(self._num_tokens, 'token')}" if self._num_tokens else ""
        return f"{time.perf_counter() - self._began_s:.0f} s{tokens}"

    def _rows(self) -> list[Row]:
        if self._is_hidden:
            return self._console.render_lines(Text(f"thinking… {self._amount}", "dim"), pad=False)
        limit = self._live.limit
        last = self._text.rsplit("\n", limit)[-limit:]
        return self._console.render_lines(Text("\n".join(last), "dim", overflow="fold"), pad=False)


class WorkProgress:
    """What goes on until the first token: a bar for work of known length, or after a second of silence what is waited
    for and how long. Gone when closed; nothing where `console` is not a terminal."""

    def __init__(self, console: Console, unit: Callable[[int], str] = "{:,}".format, least: int = 1) -> None:
        amount = TextColumn("[dim]{task.fields[amount]}")
        bar = BarColumn(max(min(28, console.width - 50), 4))
        columns = (TextColumn("[dim]{task.description}"), bar, amount, TimeRemainingColumn(compact=True))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._line = Progress(_Waited(), console=console, transient=True, disable=not can_redraw(console))
        self._unit, self._least = unit, least
        self._task: TaskID | None = None
        self._timer: threading.Timer | None = None  # until the line is shown; kept while it is
        self._lock = threading.RLock()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `what` are done. The bar appears when there is enough to do."""
        if self._task is None and total - done < self._least:
            return
        amount = f"{self._unit(done)} / {self._unit(total)}"
        if self._task is None:
            self._stop_waiting()
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, amount=amount)
        self._bar.update(self._task, description=what, completed=done, total=total, amount=amount)

    def wait(self, what: str) -> None:
        """From now on something is waited for: `waiting for kimi-k2.5` becomes `waiting for kimi-k2.5 · 5 s`."""
        self._stop_waiting()
        what = shortened(what, self._line.console.width - 10)
        self._timer = threading.Timer(SILENCE_S, self._show_waiting, [what, time.monotonic()])
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Take away what is shown."""
        self._stop_waiting()
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None

    def __enter__(self) -> "WorkProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _show_waiting(self, what: str, since_s: float) -> None:
        """In the timer's thread."""
        with self._lock:
            if self._timer is threading.current_thread():
                self._line.add_task(what, total=None, since_s=since_s)
                self._line.start()

    def _stop_waiting(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
                self._line.stop()
                for task in self._line.task_ids:
                    self._line.remove_task(task)


class _Waited(ProgressColumn):
    """`waiting for kimi-k2.5 · 5 s`"""

    max_refresh = 0.2

    def render(self, task: Task) -> Text:
        return Text(f"{task.description} · {time.monotonic() - task.fields['since_s']:.0f} s", style="dim")


def stats_line(
    token: Token, max_tokens: int | None = None, context_length: int | None = None, num_read: int = 0
) -> str:
    """`prompt 24 tok 38.2 t/s (12 cached) · gen 212 tok 6.2 t/s · TTFT 0.7 s`, and why it ended if not by itself.

    `max_tokens` and `context_length` are the limits it had, `num_read` how much of the prompt was read when it was
    stopped.
    """
    s = token.stats
    cached = f" ({s.cached_tokens:,} cached)" if s.cached_tokens else ""
    is_rated = s.prompt_tokens - s.cached_tokens >= LEAST_RATED_TOKENS
    rate = _rate(s.prompt_tok_s) if is_rated else ""
    is_half_read = token.finish_reason == "cancelled" and not s.generated_tokens and 0 < num_read < s.prompt_tokens
    read = f"{num_read:,} of " if is_half_read else ""
    parts = [f"prompt {read}{s.prompt_tokens:,} tok{rate}{cached}"] if s.prompt_tokens else []  # 0: not known
    parts.append(f"gen {s.generated_tokens:,} tok{_rate(s.generation_tok_s)}")
    if s.generated_tokens:
        parts.append(f"TTFT {s.time_to_first_token_s:.1f} s")
    return " · ".join([*parts, *filter(None, [_ending(token, max_tokens, context_length)])])


def _ending(token: Token, max_tokens: int | None, context_length: int | None) -> str:
    """Why an answer ended that the model had not ended."""
    if token.finish_reason == "cancelled":
        return "stopped"
    if token.finish_reason != "length":
        return ""
    num_generated = token.stats.generated_tokens
    if max_tokens is not None and num_generated >= max_tokens:
        return f"cut: limit of {max_tokens:,} tokens (-n)"
    if context_length is not None and token.stats.prompt_tokens + num_generated >= context_length:
        return f"cut: the context of {context_length:,} tokens is full"
    return "cut: the server's limit"


def _rate(tok_s: float | None) -> str:
    return "" if tok_s is None else f" {tok_s:,.1f} t/s"


def stats_document(stats: Stats) -> dict[str, float | int | None]:
    """The statistics for `--json`."""
    return {name: getattr(stats, name) for name in Stats.__dataclass_fields__} | {
        "prompt_tok_s": stats.prompt_tok_s,
        "generation_tok_s": stats.generation_tok_s,
    }
