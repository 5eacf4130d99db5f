"""The tables of `pull` and `models`: models with size, whether they fit this machine, and what they are made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.header import UnknownTypeError
from kimi_lite.hardware.machine import Hardware
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.plan.subject import Subject
from kimi_lite.plan.types import Plan
from kimi_lite.plan.view import WIDTH, wrap
from kimi_lite.units import gib, number, one_line

_MOST_REASON = 100  # characters of why a file cannot be read


@dataclass(frozen=True, slots=True)
class Row:
    """A model; `plan` where its headers could be read, else `problem` says in a few words why not."""

    name: str
    num_bytes: int
    plan: Plan | None = None
    problem: str = ""
    place: str = ""  # where it lies: in `models`, and in `pull` if it is here

    @property
    def verdict(self) -> str:
        return self.plan.verdict if self.plan else self.problem

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.verdict in ("fits", "tight")

    def to_json(self) -> dict:
        """JSON-ready; sizes in bytes, speed in tokens/s."""
        plan = self.plan
        return {
            "name": self.name,
            "bytes": self.num_bytes,
            "place": self.place,
            "verdict": plan.verdict if plan else None,
            "problem": self.problem or (plan.refusal.problem if plan and plan.refusal else None),
            "types": dict(plan.sizes.bytes_by_type) if plan else None,
            "expected_tok_s": plan.decode.expected_tok_s if plan and not plan.refusal else None,
        }


def make_row(
    name: str, num_bytes: int, read: Callable[[], Subject], hardware: Hardware, options: Options, place: str = ""
) -> Row:
    """`read` gives the headers; what it raises is the row's problem."""
    try:
        subject = read()
    except KimiLiteError as error:
        return Row(name, num_bytes, problem=reason(error), place=place)
    assert subject.sizes is not None
    return Row(name, num_bytes, make_plan(subject.sizes, hardware, options), place=place)


def reason(error: KimiLiteError) -> str:
    """In a few words why a model cannot be run."""
    if isinstance(error, UnknownTypeError):
        return f"not read here: {error.what}"
    return one_line(error.message, _MOST_REASON)


def best_row(rows: Iterable[Row]) -> Row | None:
    """The largest that lies in memory whole: of one model, more bytes are more quality."""
    return max((row for row in rows if row.fits), key=lambda row: row.num_bytes, default=None)


def table_lines(rows: Sequence[Row], best: Row | None = None, width: int = WIDTH) -> Iterator[str]:
    """A line a model; types, and what does not find place in the line, stand below it."""
    names = max((len(row.name) for row in rows), default=0)
    names = min(names, max(16, width - 42))
    if rows:
        yield f"  {'':<{names}} {'size':>10}  {'':<11} {'tokens/s':>8}".rstrip()
    for row in rows:
        speed = number(row.plan.decode.expected_tok_s) if row.plan and not row.plan.refusal else "-"
        verdict = row.plan.verdict if row.plan else "no"
        mark = "*" if row is best else " "
        head = f"{mark} {row.name}"
        if len(row.name) > names:
            yield head
            head = " "
        yield f"{head:<{names + 2}} {gib(row.num_bytes):>10}  {verdict:<11} {speed:>8}"
        remark = " · ".join(text for text in (row.plan.sizes.label if row.plan else row.problem, row.place) if text)
        yield from wrap("    ", remark, width, 4)
