"""Progress of loading: bytes with GB/s and the time left, or a count of stages; gone when it is done."""

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from kimi_lite.terminal import Console

LEAST_BYTES = 1_000_000  # stages and kernels are fewer than a million: larger totals are bytes


class _Amount(ProgressColumn):
    """`1.2 / 255.6 GB  3.1 GB/s`, or `3 / 12`."""

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        if total < LEAST_BYTES:
            return Text(f"{int(task.completed):,} / {total:,}", style="dim")
        speed = f"  {task.speed / 1e9:.2f} GB/s" if task.speed else ""
        return Text(f"{task.completed / 1e9:,.2f} / {total / 1e9:,.2f} GB{speed}", style="dim")


class LoadProgress:
    """A bar for each stage in turn; nothing where `console` is no terminal."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("[dim]{task.description}"), BarColumn(20), _Amount(), TimeRemainingColumn(compact=True))
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of `what` are done."""
        if self._what != what:
            self._begin(what, total)
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> "LoadProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _begin(self, what: str, total: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task, self._what = self._progress.add_task(what, total=total), what
