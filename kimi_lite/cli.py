"""The command line: `kimi-lite chat | run | quantize | bench`. Parses flags; a command's code is imported only when it runs.

Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 something the user can mend, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kimi_lite import __version__
from kimi_lite.apps.imatrix import main as imatrix
from kimi_lite.apps.plan import main as plan
from kimi_lite.errors import KimiLiteError
from quantize.__main__ import main as quantize

if TYPE_CHECKING:
    from kimi_lite.apps.start import Settings

MODEL, SAMPLING, PROMPT, OUTPUT = "Model", "Sampling", "Prompt and generation", "Output"
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings can also come from the environment: --top-p 0.9 is KIMI_LITE_TOP_P=0.9.",
)


def _setting(*flags: str, help: str, panel: str, **more: object) -> typer.models.OptionInfo:
    """An option with a twin in the environment, named after the long flag."""
    long_flag = next(flag for flag in flags if flag.startswith("--")).split("/")[0]
    twin = "KIMI_LITE_" + long_flag[2:].upper().replace("-", "_")
    return typer.Option(*flags, help=help, envvar=twin, show_envvar=False, rich_help_panel=panel, **more)


def parse_token_count(text: str) -> int:
    """`32K` is 32768, `4096` is itself."""
    digits, unit = text.strip().upper().removesuffix("K"), text.strip().upper().endswith("K")
    if not digits.isdecimal():
        raise typer.BadParameter(f"{text!r} is not a number of tokens like 4096 or 32K")
    return int(digits) * (1024 if unit else 1)


_context = _setting(
    "-c",
    "--ctx",
    help="Context in tokens; 0: all that the model has. Default: up to 32K.",
    panel=MODEL,
    parser=parse_token_count,
    metavar="TOKENS",
)
Model = Annotated[Path | None, _setting("-m", "--model", help="GGUF file, first shard or folder. Default: a demo.", panel=MODEL)]
Context = Annotated[int | None, _context]
Threads = Annotated[int | None, _setting("-t", "--threads", help="CPU threads. Default: all cores.", panel=MODEL, min=1)]
KvDtype = Annotated[
    Literal["f16", "bf16", "q8", "f32"],
    _setting("--kv-dtype", help="Numbers in the context's cache; q8 halves its memory.", panel=MODEL),
]
System = Annotated[str, _setting("-s", "-sys", "--system", help="System prompt.", panel=PROMPT, show_default=False)]
Think = Annotated[bool | None, _setting("--think/--no-think", help="Reason first. Default: if the model can.", panel=PROMPT)]
MaxTokens = Annotated[
    int, _setting("-n", "--max-tokens", help="Longest answer; -1: no limit but the context.", panel=PROMPT, show_default=True)
]
Temperature = Annotated[
    float | None, _setting("--temp", help="Temperature; 0: greedy. Default: 1.0 with thinking, else 0.6.", panel=SAMPLING)
]
TopK = Annotated[int, _setting("--top-k", help="Keep the k likeliest tokens; 0: off.", panel=SAMPLING)]
TopP = Annotated[float, _setting("--top-p", help="Keep the likeliest tokens that sum to p; 1: off.", panel=SAMPLING)]
MinP = Annotated[float, _setting("--min-p", help="Keep tokens p times as likely as the likeliest; 0: off.", panel=SAMPLING)]
RepeatPenalty = Annotated[float, _setting("--repeat-penalty", help="Make seen tokens less likely; 1: off.", panel=SAMPLING)]
Seed = Annotated[int | None, _setting("--seed", help="The same seed gives the same answer. Default: random.", panel=SAMPLING)]
Quiet = Annotated[bool, _setting("-q", "--quiet", help="No progress, remarks or statistics.", panel=OUTPUT)]
PromptText = Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt, as an option.", rich_help_panel=PROMPT)]
PromptFile = Annotated[
    Path | None, typer.Option("-f", "--file", help="Read the prompt, or its end, from FILE; -: stdin.", rich_help_panel=PROMPT)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document: text, ids, statistics.", rich_help_panel=OUTPUT)]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the answer to FILE.", rich_help_panel=OUTPUT)]


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"kimi-lite {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Kimi K2.5, a trillion-parameter mixture of experts, on one desk."""


@app.command()
def chat(
    model: Model = None,
    context: Context = None,
    system: System = "",
    think: Think = None,
    max_tokens: MaxTokens = -1,
    temperature: Temperature = None,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = None,
    threads: Threads = None,
    kv_dtype: KvDtype = "f16",
    quiet: Quiet = False,
) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."""
    from rich.console import Console

    from kimi_lite.apps import chat as app_chat
    from kimi_lite.apps.start import open_session

    sys.stdin.reconfigure(errors="surrogateescape")  # the session refuses what is not UTF-8
    sampling = (top_k, top_p, min_p, repeat_penalty, seed, max_tokens)
    settings = _settings(model, (context, threads, kv_dtype), system, think, temperature, sampling, quiet)
    aside = Console(stderr=not sys.stdout.isatty())
    session = open_session(settings, aside)
    with session.engine:
        app_chat.chat(session, aside, quiet)


@app.command()
def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Without it, -p and -f: stdin.")] = None,
    prompt_option: PromptText = None,
    file: PromptFile = None,
    model: Model = None,
    context: Context = None,
    system: System = "",
    think: Think = None,
    max_tokens: MaxTokens = -1,
    temperature: Temperature = None,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = None,
    threads: Threads = None,
    kv_dtype: KvDtype = "f16",
    as_json: AsJson = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt: from the argument, a file, or stdin. Stdout carries the answer and nothing else."""
    from rich.console import Console

    from kimi_lite.apps.run import RunOutput, read_prompt
    from kimi_lite.apps.run import run as run_prompt
    from kimi_lite.apps.start import open_session

    sys.stdin.reconfigure(errors="surrogateescape")  # the session refuses what is not UTF-8
    text = read_prompt(prompt, prompt_option, file, sys.stdin)
    sampling = (top_k, top_p, min_p, repeat_penalty, seed, max_tokens)
    settings = _settings(model, (context, threads, kv_dtype), system, think, temperature, sampling, quiet)
    session = open_session(settings, Console(stderr=True))
    with session.engine:
        raise typer.Exit(run_prompt(session, text, RunOutput(output, as_json, quiet)))


app.command("plan")(plan)
app.command("quantize")(quantize)
app.command("imatrix")(imatrix)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> None:
    """Measure tokens per second, with the machine's bound beside it."""
    from tools.bench import app as bench_app

    raise typer.Exit(bench_app(context.args, prog_name="kimi-lite bench", standalone_mode=False) or 0)


def _settings(
    model: Path | None,
    load: tuple[int | None, int | None, str],
    system: str,
    is_thinking: bool | None,
    temperature: float | None,
    sampling: tuple[int, float, float, float, int | None, int | None],
    is_quiet: bool,
) -> "Settings":
    """The flags as the apps want them, checked before anything is loaded."""
    from kimi_lite.apps.start import Settings
    from kimi_lite.engine.options import LoadOptions
    from kimi_lite.engine.types import SamplingParams

    top_k, top_p, min_p, repeat_penalty, seed, max_tokens = sampling
    params = SamplingParams(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repeat_penalty,
        seed=seed,
        max_tokens=None if max_tokens == -1 else max_tokens,
    )
    context_length, num_threads, kv_dtype = load
    options = LoadOptions(context_length=context_length, num_threads=num_threads, kv_dtype=kv_dtype)
    return Settings(model, options, system, is_thinking, temperature, params, is_quiet)


def main() -> None:
    """The entry point."""
    try:
        app(prog_name="kimi-lite")
    except KimiLiteError as error:
        typer.echo(f"kimi-lite: {error}", err=True)
        sys.exit(2)
