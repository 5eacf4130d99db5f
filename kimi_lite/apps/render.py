"""What a terminal shows: the answer as it comes, reasoning dim, progress, the statistics line, errors.

Two streams: `out` carries the answer and nothing else, `aside` (a rich console, often stderr) everything about it.
"""

import re
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kimi_lite.engine.types import ModelInfo, Stats, Token
from kimi_lite.errors import KimiLiteError

# What could move the cursor or change the terminal: C0 but tab and newline, DEL, C1.
LEAST_PREFILL_TOKENS = 64  # below it a progress bar only flickers
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MIB, GIB = 1024**2, 1024**3


class AnswerView:
    """Shows one answer's tokens as they come, and keeps its texts."""

    def __init__(self, out: TextIO, aside: Console, shows_reasoning: bool) -> None:
        self.out, self.aside, self.shows_reasoning = out, aside, shows_reasoning
        self.texts = {"reasoning": "", "content": "", "tool_call": ""}
        self.calls: list[dict[str, str]] = []
        self.last: Token | None = None
        self._began_s = time.perf_counter()
        self._num_reasoning = 0
        self._shown = {"reasoning": "", "answer": ""}  # as `texts`, without the empty lines that models begin with

    def show(self, token: Token) -> None:
        self.last = token
        self.texts[token.kind] += token.text
        if token.call:
            self.calls.append({"id": token.call.id, "name": token.call.name, "arguments": ""})
        elif token.kind == "tool_call" and self.calls:
            self.calls[-1]["arguments"] += token.text
        self._num_reasoning += token.id is not None and token.kind == "reasoning"
        part = "reasoning" if token.kind == "reasoning" else "answer"
        text = f"\n{token.call.name} " if token.call else token.text
        text = text if self._shown[part] else text.lstrip("\n")
        if not text:
            return
        if part == "answer" and not self._shown["answer"]:
            self._close_reasoning()
        self._shown[part] += text
        if part == "reasoning":
            self._dim(text)
        else:
            self.out.write(_CONTROLS.sub("�", text) if self.out.isatty() else text)
            self.out.flush()

    def close(self) -> None:
        """End the last line."""
        if not self._shown["answer"]:
            self._close_reasoning()
        elif not self._shown["answer"].endswith("\n"):
            self.out.write("\n")
            self.out.flush()

    def _close_reasoning(self) -> None:
        if self._shown["reasoning"]:
            self._dim("" if self._shown["reasoning"].endswith("\n") else "\n")
            self._dim(f"▸ thought for {time.perf_counter() - self._began_s:.0f} s · {self._num_reasoning:,} tokens\n")

    def _dim(self, text: str) -> None:
        if self.shows_reasoning and text:
            show_plain(self.aside, _CONTROLS.sub("�", text), end="", style="dim")


class WorkProgress:
    """A bar for work of known length that goes away when done; nothing where `console` is no terminal."""

    def __init__(self, console: Console, unit: Callable[[int], str] = "{:,}".format, least: int = 1) -> None:
        amount = TextColumn("[dim]{task.fields[amount]}")
        columns = (TextColumn("[dim]{task.description}"), BarColumn(28), amount, TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._unit, self._least = unit, least
        self._task: TaskID | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `what` are done. The bar appears when there is enough to do."""
        if self._task is None and total - done < self._least:
            return
        amount = f"{self._unit(done)} / {self._unit(total)}"
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(what, total=total, amount=amount)
        self._progress.update(self._task, description=what, completed=done, total=total, amount=amount)

    def close(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._progress.stop()
            self._task = None

    def __enter__(self) -> "WorkProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def show_plain(console: Console, text: str, end: str = "\n", style: str | None = None) -> None:
    """Print text as it is: no markup, no highlighting, no wrapping of our own."""
    console.print(text, end=end, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def stats_line(token: Token) -> str:
    """`prompt 24 tok 38.2 t/s (12 cached) · gen 212 tok 6.2 t/s · TTFT 0.7 s`, and why it ended if not by itself."""
    s = token.stats
    cached = f" ({s.cached_tokens:,} cached)" if s.cached_tokens else ""
    parts = [
        f"prompt {s.prompt_tokens:,} tok{_rate(s.prompt_tok_s)}{cached}",
        f"gen {s.generated_tokens:,} tok{_rate(s.generation_tok_s)}",
    ]
    if s.generated_tokens:
        parts.append(f"TTFT {s.time_to_first_token_s:.1f} s")
    endings = {"cancelled": "stopped", "length": "cut: token limit or full context"}
    return " · ".join([*parts, *filter(None, [endings.get(token.finish_reason)])])


def _rate(tok_s: float | None) -> str:
    return "" if tok_s is None else f" {tok_s:,.1f} t/s"


def stats_document(stats: Stats) -> dict[str, float | int | None]:
    """The statistics for `--json`."""
    return {name: getattr(stats, name) for name in Stats.__dataclass_fields__} | {
        "prompt_tok_s": stats.prompt_tok_s,
        "generation_tok_s": stats.generation_tok_s,
    }


def describe_model(info: ModelInfo) -> str:
    """`IQ2_XXS 87 %, Q8_0 12 % · 255.6 GiB`: the types that hold at least a hundredth of the bytes."""
    total = sum(num_bytes for _, num_bytes in info.bytes_by_type)
    shares = [(name, round(100 * num_bytes / total)) for name, num_bytes in info.bytes_by_type]
    types = ", ".join(f"{name} {share} %" for name, share in shares if share >= 1)
    size = f"{info.total_bytes / GIB:,.1f} GiB" if info.total_bytes >= GIB / 10 else f"{info.total_bytes / MIB:,.1f} MiB"
    return f"{types} · {size}"


def show_error(console: Console, error: KimiLiteError) -> None:
    """What failed, then what to do."""
    show_plain(console, error.message, style="red")
    if error.hint:
        show_plain(console, error.hint)
