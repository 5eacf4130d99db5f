"""`kimi-lite doctor`: does this machine have what it takes, and if not, what to do. Only flags and printing live here.

Exit code 0, or 2 where a check fails. `--json` is for bug reports.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_lite.commandline.flags import with_options
from kimi_lite.options import Options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kimi_lite.apps.doctor.system import Check, Facts

_FAILED = 2  # something the user can fix
_STATUS, _LABEL = 5, 17  # columns: "warn ", and that with the name of a check
_NARROW = 60  # columns: below them the name joins the text

Quick = Annotated[bool, typer.Option("--quick", help="Do not measure RAM and disk: two seconds less.")]
Warm = Annotated[bool, typer.Option("--warm", help="Compile the model's kernels now. Default model: the demo.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for bug reports.")]


@with_options("doctor")
def main(options: Options, quick: Quick = False, warm: Warm = False, as_json: AsJson = False) -> None:
    """Check this machine: each line is ok, warn or fail, with what to do about it."""
    from kimi_lite.apps.doctor.system import gather
    from kimi_lite.apps.model_path import find_model
    from kimi_lite.terminal import echo

    path = find_model(options, downloads=False) if options.model else None
    if warm and path is None:
        from kimi_lite.demo.build import ensure_demo_model

        path = ensure_demo_model()
    facts = gather(path, is_measuring=not quick)
    found = []
    for check in run_checks(facts, path, warm):
        found.append(check)
        if not as_json:
            _print(check)
    if as_json:
        typer.echo(json.dumps(document(facts, found)))
    else:
        counts = {status: sum(check.status == status for check in found) for status in ("ok", "warn", "fail")}
        echo("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if any(check.status == "fail" for check in found):
        raise typer.Exit(_FAILED)


def run_checks(facts: "Facts", path: Path | None, is_warming: bool) -> "Iterator[Check]":
    """One by one, as they are known."""
    from kimi_lite.apps.doctor.gpu import gpu_checks
    from kimi_lite.apps.doctor.system import SYSTEM_CHECKS

    for check in SYSTEM_CHECKS:
        yield check(facts)
    yield from gpu_checks(facts)
    if path:
        from kimi_lite.apps.doctor.model import model_checks, warm

        yield from model_checks(path, facts)
        if is_warming:
            yield warm(path)


def document(facts: "Facts", checks: "list[Check]") -> dict:
    """JSON-ready."""
    from dataclasses import asdict

    from kimi_lite import __version__
    from kimi_lite.plan.types import hardware_json

    return {
        "kimi_lite": __version__,
        "checks": [asdict(check) for check in checks],
        "hardware": hardware_json(facts.hardware),
        "packages": facts.packages,
    }


def _print(check: "Check") -> None:
    from kimi_lite.plan.view import wrap
    from kimi_lite.terminal import echo, width

    columns = width()
    colour = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}[check.status]
    label = _LABEL if columns >= _NARROW else _STATUS
    finding = check.finding if columns >= _NARROW else f"{check.name}: {check.finding}"
    name = f"{check.name:<{label - _STATUS}}" if columns >= _NARROW else ""
    first, *more = wrap(" " * _STATUS + name, finding, columns, label)
    echo(f"{check.status:<{_STATUS}}", colour=colour, end="")
    echo(first[_STATUS:])
    for line in (*more, *(wrap(" " * label + "→ ", check.fix, columns, label + 2) if check.fix else ())):
        echo(line)
