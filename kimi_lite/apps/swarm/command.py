"""`kimi-lite swarm`: only flags live here.

    kimi-lite swarm "Compare the three parsers in src" --dir src
    kimi-lite swarm --plan plan.toml
    kimi-lite swarm resume                    # the last run, after a kill
    kimi-lite swarm show --html run.html      # what became of the last run

A task is one argument; `resume`, `show`, `list` and `delete` alone are commands. Exit code 130 where Ctrl-C ended the
run.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kimi_lite.commandline.commands import Command, DefaultGroup
from kimi_lite.commandline.flags import with_options
from kimi_lite.options import Options

RUN = "a run's name, or its beginning; without one the last run"
swarm = typer.Typer(
    cls=DefaultGroup,
    epilog="kimi-lite swarm resume [RUN] goes on with a run that was killed, swarm show [RUN] tells who did what, "
    "swarm list shows the runs, swarm delete RUN removes one. Settings can also come from the environment: "
    "--max-parallel 8 is KIMI_LITE_MAX_PARALLEL=8.",
)


@swarm.command("swarm", cls=Command, epilog=swarm.info.epilog)
@with_options("swarm")
def run(
    options: Options,
    task: Annotated[
        str | None, typer.Argument(help="The task, in quotes; what is piped in is appended.", show_default=False)
    ] = None,
) -> None:
    """Let an orchestrator divide a task among agents that work at the same time. Stdout carries its answer."""
    from kimi_lite.apps.swarm.start import start_run

    raise typer.Exit(start_run(options, task, stdin=sys.stdin))


@swarm.command("resume", cls=Command)
@with_options("swarm")
def resume(
    options: Options,
    run: Annotated[str, typer.Argument(help=f"{RUN[0].upper()}{RUN[1:]}.", show_default=False)] = "",
) -> None:
    """Go on with a run that was killed or stopped: what is done is not done again. What is typed here goes before what
    the run was started with."""
    from kimi_lite.apps.swarm.start import resume_run

    raise typer.Exit(resume_run(options, run))


@swarm.command("show", cls=Command)
def show(
    run: Annotated[str, typer.Argument(help=f"{RUN[0].upper()}{RUN[1:]}.", show_default=False)] = "",
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write the timeline there.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with all of it.", show_default=False)
    ] = None,
) -> None:
    """Tell what became of a run: who did what, when and how long, what went wrong, the critical path, the answer."""
    from kimi_lite.apps.swarm.report import show_run

    show_run(run, svg, html)


@swarm.command("list", cls=Command)
def list_() -> None:
    """List the runs, the last first, with their states."""
    from kimi_lite.apps.swarm.report import list_runs

    list_runs()


@swarm.command("delete", cls=Command)
def delete(
    runs: Annotated[list[str], typer.Argument(help="Names of runs, or their beginnings.", metavar="RUN")],
) -> None:
    """Remove runs with their boards."""
    from kimi_lite.apps.swarm.report import delete_runs

    delete_runs(runs)
