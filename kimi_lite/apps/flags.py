"""The flags of `chat` and `run`, most with a twin in the environment. Read by `cli`, so nothing heavy is imported
here."""

from pathlib import Path
from typing import Annotated, Literal

import typer

MODEL, SAMPLING, PROMPT, OUTPUT, CHAT = "Model", "Sampling", "Prompt and generation", "Output", "Conversation"


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
Model = Annotated[
    Path | None, _setting("-m", "--model", help="GGUF file, first shard or folder. Default: a demo.", panel=MODEL)
]
Context = Annotated[int | None, _context]
Threads = Annotated[
    int | None, _setting("-t", "--threads", help="CPU threads. Default: all cores.", panel=MODEL, min=1)
]
KvDtype = Annotated[
    Literal["f16", "bf16", "q8", "f32"],
    _setting("--kv-dtype", help="Numbers in the context's cache; q8 halves its memory.", panel=MODEL),
]
PrefixCache = Annotated[
    bool,
    _setting(
        "--prefix-cache/--no-prefix-cache", help="Save what long prompts cost to read.", panel=MODEL, show_default=True
    ),
]
PrefixCacheSize = Annotated[
    str, _setting("--prefix-cache-size", help="How much of them is kept on disk.", panel=MODEL, metavar="SIZE")
]
Device = Annotated[
    str | None, _setting("--device", help="cuda, cuda:1 or cpu. Default: the GPU where one can be used.", panel=MODEL)
]
Vram = Annotated[str | None, _setting("--vram", help="VRAM it may take, never exceeded.", panel=MODEL, metavar="SIZE")]
GpuExperts = Annotated[
    int | None, _setting("--gpu-experts", help="Experts kept in VRAM. Default: as many as fit.", panel=MODEL, min=0)
]
Dense = Annotated[
    Literal["q8_0", "bf16", "file"],
    _setting("--dense", help="On a GPU: the weights that every token uses; file: as they are.", panel=MODEL),
]
Ram = Annotated[
    str | None,
    _setting("--ram", help="Memory it may take; experts beyond it stay on disk.", panel=MODEL, metavar="SIZE"),
]
Loading = Annotated[
    Literal["map", "read", "lock"],
    _setting(
        "--load",
        help="Experts that fit: map the file, read it into memory at once, or also lock it there.",
        panel=MODEL,
    ),
]
RecordRouting = Annotated[
    Path | None,
    _setting(
        "--record-routing", help="Write which experts every token chose (.npz), for tools.cache.sim.", panel=MODEL
    ),
]
CacheBias = Annotated[
    float,
    _setting(
        "--cache-bias",
        help="Prefer experts in fast memory among near-equals: by so much of a score.",
        panel=MODEL,
        min=0,
    ),
]
System = Annotated[str, _setting("-s", "-sys", "--system", help="System prompt.", panel=PROMPT, show_default=False)]
Think = Annotated[
    bool | None, _setting("--think/--no-think", help="Reason first. Default: if the model can.", panel=PROMPT)
]
MaxTokens = Annotated[
    int,
    _setting(
        "-n", "--max-tokens", help="Longest answer; -1: no limit but the context.", panel=PROMPT, show_default=True
    ),
]
Temperature = Annotated[
    float | None,
    _setting("--temp", help="Temperature; 0: greedy. Default: 1.0 with thinking, else 0.6.", panel=SAMPLING),
]
TopK = Annotated[int, _setting("--top-k", help="Keep the k likeliest tokens; 0: off.", panel=SAMPLING)]
TopP = Annotated[float, _setting("--top-p", help="Keep the likeliest tokens that sum to p; 1: off.", panel=SAMPLING)]
MinP = Annotated[
    float, _setting("--min-p", help="Keep tokens p times as likely as the likeliest; 0: off.", panel=SAMPLING)
]
RepeatPenalty = Annotated[
    float, _setting("--repeat-penalty", help="Make seen tokens less likely; 1: off.", panel=SAMPLING)
]
Seed = Annotated[
    int | None, _setting("--seed", help="The same seed gives the same answer. Default: random.", panel=SAMPLING)
]
Quiet = Annotated[bool, _setting("-q", "--quiet", help="No progress, remarks or statistics.", panel=OUTPUT)]
PromptText = Annotated[
    str | None, typer.Option("-p", "--prompt", help="The prompt, as an option.", rich_help_panel=PROMPT)
]
PromptFile = Annotated[
    Path | None,
    typer.Option("-f", "--file", help="Read the prompt, or its end, from FILE; -: stdin.", rich_help_panel=PROMPT),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON document: text, ids, statistics.", rich_help_panel=OUTPUT)
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write the answer to FILE.", rich_help_panel=OUTPUT)
]

ThinkBudget = Annotated[
    int | None,
    _setting("--think-budget", help="Most tokens of reasoning; -1: no limit.", panel=PROMPT, metavar="TOKENS"),
]
PreserveThinking = Annotated[
    bool, _setting("--preserve-thinking", help="Past reasoning stays in the prompt, where the model can.", panel=PROMPT)
]
HideThinking = Annotated[bool, _setting("--hide-thinking", help="Do not show reasoning.", panel=OUTPUT)]
Plain = Annotated[bool, _setting("--plain", help="Show answers as they come, without Markdown.", panel=OUTPUT)]
Endpoint = Annotated[
    str | None,
    _setting("--endpoint", help="An OpenAI-compatible server; -m names its model.", panel=MODEL, metavar="URL"),
]
ApiKey = Annotated[str | None, _setting("--api-key", help="For --endpoint.", panel=MODEL, metavar="KEY")]
Warm = Annotated[
    bool,
    _setting(
        "--warm/--no-warm", help="Read the model into memory first, where it fits.", panel=MODEL, show_default=True
    ),
]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", help="An image for the first message.", rich_help_panel=PROMPT, metavar="FILE"),
]
Continue = Annotated[bool, typer.Option("--continue", help="Go on with the last conversation.", rich_help_panel=CHAT)]
SessionName = Annotated[
    str | None, _setting("--session", help="Go on with the conversation NAME, or begin it.", panel=CHAT, metavar="NAME")
]
Tools = Annotated[
    Path | None,
    _setting("--tools", help="Let the model use tools in FOLDER; it asks you first.", panel=CHAT, metavar="FOLDER"),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow", help="A tool that need not ask; *: all. May be repeated.", rich_help_panel=CHAT, metavar="NAME"
    ),
]
McpConfig = Annotated[
    Path | None, _setting("--mcp-config", help="MCP servers with more tools.", panel=CHAT, metavar="FILE")
]
