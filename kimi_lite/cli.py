"""The command line: `kimi-lite chat | run | quantize | bench`. Parses flags; a command's code is imported only when it
runs.

Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 something the user can mend, 130 interrupted.
"""

import os
import sys
from typing import Annotated, Any

import typer

from kimi_lite import __version__
from kimi_lite.apps import flags
from kimi_lite.apps.doctor.command import main as doctor
from kimi_lite.apps.flags import parse_token_count as parse_token_count
from kimi_lite.apps.imatrix import main as imatrix
from kimi_lite.apps.plan import main as plan
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.__main__ import main as quantize

app = typer.Typer(
    no_args_is_help=True,
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
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Kimi K2.5, a trillion-parameter mixture of experts, on one desk."""
    if ctx.invoked_subcommand in ("chat", "run"):
        ctx.default_map = {ctx.invoked_subcommand: _configured(ctx.command.commands[ctx.invoked_subcommand])}


def _configured(command: typer.core.TyperCommand) -> dict[str, object]:
    """Defaults from the configuration file, by parameter."""
    from kimi_lite.apps.config_file import read_defaults
    from kimi_lite.apps.folders import config_path

    flags = {
        flag[2:]: parameter.name for parameter in command.params for flag in parameter.opts if flag.startswith("--")
    }
    return read_defaults(config_path(), flags)


@app.command()
def chat(
    ctx: typer.Context,
    model: flags.Model = None,
    endpoint: flags.Endpoint = None,
    api_key: flags.ApiKey = None,
    context: flags.Context = None,
    threads: flags.Threads = None,
    kv_dtype: flags.KvDtype = "f16",
    device: flags.Device = None,
    vram: flags.Vram = None,
    gpu_experts: flags.GpuExperts = None,
    dense: flags.Dense = "q8_0",
    ram: flags.Ram = None,
    load: flags.Loading = "map",
    record_routing: flags.RecordRouting = None,
    cache_bias: flags.CacheBias = 0.0,
    prefix_cache: flags.PrefixCache = True,
    prefix_cache_size: flags.PrefixCacheSize = "8G",
    warm: flags.Warm = True,
    system: flags.System = "",
    think: flags.Think = None,
    think_budget: flags.ThinkBudget = None,
    preserve_thinking: flags.PreserveThinking = False,
    max_tokens: flags.MaxTokens = -1,
    image: flags.Images = None,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = 0,
    top_p: flags.TopP = 0.95,
    min_p: flags.MinP = 0.0,
    repeat_penalty: flags.RepeatPenalty = 1.0,
    seed: flags.Seed = None,
    is_continuing: flags.Continue = False,
    session: flags.SessionName = None,
    tools: flags.Tools = None,
    mcp_config: flags.McpConfig = None,
    allow: flags.Allow = None,
    hide_thinking: flags.HideThinking = False,
    plain: flags.Plain = False,
    quiet: flags.Quiet = False,
) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."""
    from kimi_lite.apps.chat.start import start_chat

    start_chat(ctx.params)


@app.command()
def run(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Without it, -p and -f: stdin.")] = None,
    prompt_option: flags.PromptText = None,
    file: flags.PromptFile = None,
    model: flags.Model = None,
    endpoint: flags.Endpoint = None,
    api_key: flags.ApiKey = None,
    context: flags.Context = None,
    threads: flags.Threads = None,
    kv_dtype: flags.KvDtype = "f16",
    device: flags.Device = None,
    vram: flags.Vram = None,
    gpu_experts: flags.GpuExperts = None,
    dense: flags.Dense = "q8_0",
    ram: flags.Ram = None,
    load: flags.Loading = "map",
    record_routing: flags.RecordRouting = None,
    cache_bias: flags.CacheBias = 0.0,
    prefix_cache: flags.PrefixCache = True,
    prefix_cache_size: flags.PrefixCacheSize = "8G",
    system: flags.System = "",
    think: flags.Think = None,
    think_budget: flags.ThinkBudget = None,
    preserve_thinking: flags.PreserveThinking = False,
    max_tokens: flags.MaxTokens = -1,
    image: flags.Images = None,
    tools: flags.Tools = None,
    mcp_config: flags.McpConfig = None,
    allow: flags.Allow = None,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = 0,
    top_p: flags.TopP = 0.95,
    min_p: flags.MinP = 0.0,
    repeat_penalty: flags.RepeatPenalty = 1.0,
    seed: flags.Seed = None,
    as_json: flags.AsJson = False,
    output: flags.Output = None,
    hide_thinking: flags.HideThinking = False,
    plain: flags.Plain = False,
    quiet: flags.Quiet = False,
) -> None:
    """Answer one prompt: from the argument, a file, or stdin. Stdout carries the answer and nothing else."""
    from kimi_lite.apps.run import start_run

    raise typer.Exit(start_run(ctx.params))


app.command("plan")(plan)
app.command("doctor")(doctor)
app.command("quantize")(quantize)
app.command("imatrix")(imatrix)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> None:
    """Measure tokens per second, with the machine's bound beside it."""
    from kimi_lite.tools.bench.bench import app as bench_app

    raise typer.Exit(bench_app(context.args, prog_name="kimi-lite bench", standalone_mode=False) or 0)


def main() -> None:
    """The entry point."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    sys.excepthook = _report_crash
    try:
        app(prog_name="kimi-lite")
    except KimiLiteError as error:
        from kimi_lite.terminal import echo

        echo(f"kimi-lite: {error}", to_stderr=True)
        sys.exit(2)


def _report_crash(*crash: Any) -> None:
    from kimi_lite.terminal import report_crash

    report_crash(*crash)
