"""The command line: every command is listed here, its code is in `apps/<command>`, `quantize` or `tools.bench` and
imported only when it runs.

Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 something the user can fix, 130 interrupted.
"""

import io
import logging
import os
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_lite import __version__
from kimi_lite.apps.doctor.command import main as doctor
from kimi_lite.apps.models import main as models
from kimi_lite.apps.plan import main as plan
from kimi_lite.apps.pull import main as pull
from kimi_lite.apps.swarm.command import swarm
from kimi_lite.commandline.commands import Client, Command, CommandGroup, Launch
from kimi_lite.commandline.flags import with_options
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import OUTPUT, PROMPT, SERVER, Options
from kimi_lite.quantize.__main__ import main as quantize
from kimi_lite.quantize.imatrix import main as imatrix
from kimi_lite.tools.bench.command import bench

app = typer.Typer(
    cls=CommandGroup,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings can also come from the environment: --top-p 0.9 is KIMI_LITE_TOP_P=0.9.",
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from kimi_lite.terminal import echo

        echo(f"kimi-lite {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Kimi K2.5, a trillion-parameter mixture of experts, at home."""


@app.command(cls=Command)
@with_options("chat")
def chat(options: Options) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."""
    from kimi_lite.apps.chat.command import start_chat

    start_chat(options)


@app.command(cls=Command)
@with_options("run")
def run(
    options: Options,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; what is piped in is appended.")] = None,
    prompt_option: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt, as an option.", rich_help_panel=PROMPT)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Append FILE to the prompt; -: stdin.", rich_help_panel=PROMPT)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document: text, ids, statistics.", rich_help_panel=OUTPUT)
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the answer to FILE.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Answer one prompt: the argument, a file, and what is piped in. Stdout carries the answer and nothing else."""
    from kimi_lite.apps.run import start_run

    raise typer.Exit(start_run(options, prompt, prompt_option, file, as_json, output))


@app.command(cls=Command)
@with_options("serve")
def serve(options: Options) -> None:
    """Answer requests over HTTP as OpenAI's and Anthropic's servers do. Ctrl-C ends it."""
    from kimi_lite.apps.server.command import start_server

    start_server(options)


@app.command(cls=Launch)
@with_options("serve")
def launch(
    options: Options,
    context: typer.Context,
    client: Annotated[Client, typer.Argument(help="The program to run.", show_default=False, metavar="CLIENT")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its own arguments.", show_default=False, metavar="ARGUMENTS")
    ] = None,
    only_prints: Annotated[
        bool, typer.Option("--print", help="Print what would be set and run, and run nothing.", rich_help_panel=SERVER)
    ] = False,
) -> None:
    """Run a coding agent on this model. Options before CLIENT are serve's, what follows it is the client's own.

    A server is started where none runs at the port, and ends with the client.
    """
    from kimi_lite.apps.launch import launch as launch_client

    raise typer.Exit(launch_client(client, arguments or [], options, context.meta[Launch.OURS], only_prints))


app.add_typer(swarm, name="swarm", help="Let an orchestrator divide a task among agents that work at the same time.")
app.command("plan", cls=Command)(plan)
app.command("pull", cls=Command)(pull)
app.command("models", cls=Command)(models)
app.command("doctor", cls=Command)(doctor)
app.command("quantize", cls=Command)(quantize)
app.command("imatrix", cls=Command)(imatrix)


app.command("bench", cls=Command)(bench)


def main() -> None:
    """The entry point."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    encoding = sys.stderr.encoding
    sys.stderr = sys.__stderr__ = _Remarks(sys.stderr.detach(), encoding, "replace", line_buffering=True)
    sys.excepthook = _report_crash
    threading.excepthook = lambda crash: _report_crash(crash.exc_type, crash.exc_value, crash.exc_traceback)
    warnings.showwarning = _report_warning
    logging.lastResort = _LogOnTerminal(logging.WARNING)
    try:
        app(prog_name="kimi-lite")
    except KimiLiteError as error:
        from kimi_lite.terminal import echo

        echo(f"kimi-lite: {error}", to_stderr=True)
        sys.exit(2)


class _LogOnTerminal(logging.Handler):
    """What parts of the program warn of, where no log is kept (`serve` keeps one)."""

    def emit(self, record: logging.LogRecord) -> None:
        from kimi_lite.terminal import echo

        echo(record.getMessage(), to_stderr=True)


class _Remarks(io.TextIOWrapper):
    """stderr: on a full disk, or when its reader has left, the answer goes on without remarks."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _report_crash(*crash: Any) -> None:
    from kimi_lite.terminal import report_crash

    report_crash(*crash)


def _report_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """Ours are for the user, and those of libraries for their makers."""
    from kimi_lite.terminal import echo

    is_ours = Path(filename).is_relative_to(Path(__file__).parent) or issubclass(category, UserWarning)
    text = f"{message}\n" if is_ours else warnings.formatwarning(message, category, filename, lineno)
    echo(text, to_stderr=True, end="")
