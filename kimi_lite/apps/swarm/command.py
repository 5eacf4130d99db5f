"""`kimi-lite swarm`: only flags live here.

    kimi-lite swarm "Compare the three parsers in src" --dir src
    kimi-lite swarm --plan plan.toml
    kimi-lite swarm resume                    # the last run, after a kill

A task is one argument; `resume` and `list` alone are commands. Exit code 130 where Ctrl-C ended the run.
"""

from typing import Annotated

import typer

from kimi_lite.commandline.commands import Command, DefaultGroup
from kimi_lite.commandline.flags import with_options
from kimi_lite.options import Options

RUN = "a run's name, or its beginning; without one the last run"
swarm = typer.Typer(
    cls=DefaultGroup,
    epilog="kimi-lite swarm resume [RUN] goes on with a run that was killed; swarm list shows the runs. Settings can "
    "also come from the environment: --max-parallel 8 is KIMI_LITE_MAX_PARALLEL=8.",
)


@swarm.command("swarm", cls=Command, epilog=swarm.info.epilog)
@with_options("swarm")
def run(
    options: Options,
    task: Annotated[str | None, typer.Argument(help="The task, in quotes.", show_default=False)] = None,
) -> None:
    """Let an orchestrator divide a task among agents that work at the same time. Stdout carries its answer."""
    from kimi_lite.apps.swarm.start import start_run

    raise typer.Exit(start_run(options, task))


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
