"""`kimi-lite pull`: what a hub offers of a model and what of it fits this machine, by the plan and before any download;
then the download. Flags and printing live here, the work is in `kimi_lite.hub`.

    kimi-lite pull unsloth/Kimi-K2.5-GGUF               lists its quants
    kimi-lite pull unsloth/Kimi-K2.5-GGUF:UD-TQ1_0      fetches one
"""

import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_lite.commandline.flags import with_options
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import MODEL, OUTPUT, Options

if TYPE_CHECKING:
    from pathlib import Path

    from kimi_lite.apps.model_table import Row
    from kimi_lite.apps.progress import LoadProgress
    from kimi_lite.hub.client import Hub, Repository
    from kimi_lite.hub.library import LocalModel
    from kimi_lite.hub.names import HubName
    from kimi_lite.hub.quants import Quant
    from kimi_lite.terminal import Console

Name = Annotated[
    str, typer.Argument(metavar="OWNER/REPO[:QUANT]", help="A repository of the hub, or an address of one.")
]
OnlyLists = Annotated[bool, typer.Option("--list", help="List the quants, and fetch none.", rich_help_panel=MODEL)]
Mmproj = Annotated[
    bool,
    typer.Option("--mmproj/--no-mmproj", help="With the vision file, where there is one.", rich_help_panel=MODEL),
]
Force = Annotated[
    bool, typer.Option("--force", help="Fetch what would not run here: for another machine.", rich_help_panel=MODEL)
]
AsJson = Annotated[bool, typer.Option("--json", help="The list as one JSON document.", rich_help_panel=OUTPUT)]


@with_options("pull")
def main(
    options: Options,
    name: Name,
    only_lists: OnlyLists = False,
    mmproj: Mmproj = True,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Download a model, or list a repository's quants with whether they fit. Goes on where it was interrupted."""
    from kimi_lite.apps.progress import LoadProgress
    from kimi_lite.hub.cache import is_offline
    from kimi_lite.hub.client import Hub
    from kimi_lite.hub.library import find_local
    from kimi_lite.hub.names import parse_hub_name
    from kimi_lite.terminal import Console, echo

    status, named = Console(stderr=True), parse_hub_name(name)
    if is_offline() and (local := find_local(named)):
        echo("\n".join(_already(named, local)))
        return
    with Hub() as hub, LoadProgress(status) as progress:
        repository = hub.repository(named)
        quants = repository.quants
        if only_lists or as_json or (len(quants) > 1 and not repository.name.quant):
            lines = _listed(hub, repository, options, progress, as_json)
        else:
            lines = _fetched(hub, repository, options, mmproj, force, progress, status)
    for line in lines:
        echo(line)


def _listed(
    hub: "Hub", repository: "Repository", options: Options, progress: "LoadProgress", as_json: bool
) -> list[str]:
    from kimi_lite.apps.model_table import best_row, table_lines
    from kimi_lite.hub.quants import find_quant
    from kimi_lite.terminal import width
    from kimi_lite.units import counted

    quants = repository.quants
    if not quants:
        find_quant(quants, "", repository.name.repository)  # says so
    rows = _rows(hub, repository, quants, options, progress)
    best = best_row(rows)
    if as_json:
        found = [row.to_json() for row in rows]
        best_name = best.name if best else None
        document = {"repository": repository.name.repository, "commit": repository.commit, "best": best_name}
        return [json.dumps(document | {"models": found})]
    columns = width()
    lines = [f"{repository.name.repository}: {counted(len(rows), 'model')}", *table_lines(rows, best, columns)]
    example = best.name if best else rows[0].name
    if best:
        lines.append("* the largest that fits this machine")
    command = f"kimi-lite pull {shlex.quote(str(replace(repository.name, quant=example)))}"
    return [*lines, "", command if best else f"To fetch one: {command}"]


def _rows(
    hub: "Hub", repository: "Repository", quants: "tuple[Quant, ...]", options: Options, progress: "LoadProgress"
) -> "list[Row]":
    from kimi_lite.apps.model_table import Row, reason
    from kimi_lite.hardware.probe import probe
    from kimi_lite.hub.cache import hub_cache
    from kimi_lite.hub.fetch import missing
    from kimi_lite.hub.headers import describe_all
    from kimi_lite.hub.library import local_models
    from kimi_lite.hub.resolve import same_here
    from kimi_lite.plan.plan import make_plan

    hardware, here = probe(hub_cache()), list(local_models())
    rows = []
    for quant, subject, problem in describe_all(hub, repository, quants, progress):
        local = same_here(repository, quant, here)
        place = f"here: {local.store}" if local else ""
        if subject is None:
            rows.append(Row(quant.label, quant.num_bytes, problem=reason(problem), place=place))
        else:
            left_bytes = 0 if local else missing(repository, quant.files).num_bytes
            plan = make_plan(subject.sizes, hardware, options, file_bytes=left_bytes)
            rows.append(Row(quant.label, quant.num_bytes, plan, place=place))
    return rows


def _fetched(
    hub: "Hub",
    repository: "Repository",
    options: Options,
    has_vision: bool,
    is_forced: bool,
    progress: "LoadProgress",
    status: "Console",
) -> list[str]:
    from kimi_lite.hub.client import NoAccess
    from kimi_lite.hub.fetch import missing
    from kimi_lite.hub.headers import describe
    from kimi_lite.hub.library import HUB, local_models
    from kimi_lite.hub.resolve import fetch_quant, require_runnable, same_here
    from kimi_lite.terminal import show_plain
    from kimi_lite.units import gib

    quant = repository.find(repository.name.quant)
    name = replace(repository.name, quant=quant.label)
    tower = repository.tower_of(quant) if has_vision else None
    local = same_here(repository, quant, local_models())
    if local and not (tower and local.tower is None and local.store == HUB):
        return _already(name, local)
    quant.require_whole()
    left = missing(repository, quant.files)
    if not (quant.is_checkpoint or is_forced):
        try:
            require_runnable(describe(hub, repository, quant, has_vision), options, left.num_bytes)
        except NoAccess:
            raise
        except KimiLiteError as error:
            raise KimiLiteError(error.message, f"{error.hint}\nAdd --force to fetch it all the same.") from error
    show_plain(status, f"{name}: {gib(left.num_bytes)} of {gib(quant.num_bytes)} to fetch")
    try:
        path = fetch_quant(hub, repository, quant, progress, has_vision)
    except KeyboardInterrupt:
        show_plain(status, "interrupted; the same command goes on where it was")
        raise
    with_tower = f", with {tower.name}" if tower else ""
    return [f"{name}: {path}{with_tower}", *_next(name.flag, path, quant.is_checkpoint)]


def _already(name: "HubName", local: "LocalModel") -> list[str]:
    said = f"{name} is here already ({local.store}): {local.path}"
    return [said, *_next(name.flag, local.path, local.is_checkpoint)]


def _next(flag: str, path: "Path", is_checkpoint: bool = False) -> list[str]:
    if is_checkpoint:
        return [f"kimi-lite quantize {shlex.quote(str(path))} OUT.gguf --recipe RECIPE"]
    return [f"kimi-lite chat -m {shlex.quote(flag)}"]
