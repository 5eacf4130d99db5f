"""Everything that can be asked of the program, each option declared once: its flags, help, kind, limits and commands.

The flags of `chat`, `run`, `bench` and `plan`, the configuration file and the KIMI_LITE_* variables derive from the
declarations here (`commandline.flags`). `Options` is passed whole: to the plan, to `engine.loader.load`, to the model.

To add an option, add a field.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kimi_lite.errors import KimiLiteError
from kimi_lite.units import SIZE_HELP, parse_size, parse_token_count

MODEL, MACHINE, SAMPLING, PROMPT = "Model", "Memory and speed", "Sampling", "Prompt and generation"
OUTPUT, CHAT, TOOLS, SERVER, SWARM = "Output", "Conversation", "Tools", "Server", "Swarm"
DEFAULTS = "Requests that do not say otherwise"
HUB_PREFIX = "hf:"  # of models of a hub
FITTING = ("q8_0", "q6_k", "q4_k")  # of --dense, from fine to coarse: at most so many bits; see arch.dense
DENSE_TYPES = (*FITTING, "bf16", "file")
ANSWERING = ("chat", "run")
ASKING = (*ANSWERING, "swarm")
SAMPLED = (*ASKING, "serve")
LOADING = ("chat", "run", "serve", "bench", "swarm")
PLANNED = (*LOADING, "plan")
FITTED = (*PLANNED, "pull", "models")  # that say what fits this machine

Kind = Literal["text", "path", "integer", "number", "size", "sizes", "tokens", "choice", "switch", "texts"]
_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "switch": "on or off",
    "choice": "one of",
    "path": "a path",
    "text": "a text",
    "texts": "a list of texts",
}
_SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


@dataclass(frozen=True, slots=True)
class Option:
    """How an option is written and what it may be; `name` is the field of `Options` that holds it."""

    name: str
    flags: tuple[str, ...]  # "-c", "--ctx"; a switch may have two sides, "--think/--no-think"
    help: str
    kind: Kind
    panel: str
    commands: tuple[str, ...]
    metavar: str | None = None
    least: float | None = None
    above: float | None = None  # a limit that is not itself allowed
    most: float | None = None
    choices: tuple[str, ...] = ()
    none_text: str | None = None  # a value that stands for None: -1 for "no limit"
    command_default: object = None  # what commands take where nothing is said; None: the field's own default
    shown_default: str | None = None  # for the help, where the default is not told by it
    is_setting: bool = True  # may also come from the configuration file and the environment
    help_in: Mapping[str, str] = field(default_factory=dict)  # other words for a command
    panel_in: Mapping[str, str] = field(default_factory=dict)  # and another panel
    convert: Callable[[Any], Any] | None = None  # from the parsed value to the field's
    unused: "Callable[[Options, Situation], str]" = lambda options, situation: ""  # why it has no effect; "": it has

    @property
    def long_flag(self) -> str:
        return next(flag for flag in self.flags if flag.startswith("--")).split("/")[0]

    @property
    def key(self) -> str:
        """The name in the configuration file."""
        return self.long_flag[2:]

    @property
    def variable(self) -> str:
        return "KIMI_LITE_" + self.key.upper().replace("-", "_")

    def parse(self, value: object, source: str) -> Any:
        """The field's value from what was typed or configured; `source` (a flag, a variable, a line of the file) is
        named in the KimiLiteError for what it cannot be."""
        parsed = self._parse(value, source)
        return self.convert(parsed) if self.convert and parsed is not None else parsed

    def _parse(self, value: object, source: str) -> Any:
        if self.kind == "texts":
            items = value if isinstance(value, (list, tuple)) else [value]
            if not all(isinstance(item, str) for item in items):
                raise self._wrong(value, source)
            return tuple(items)
        if self.kind == "switch":
            found = value if isinstance(value, bool) else _SWITCH.get(str(value).lower())
            if found is None:
                raise self._wrong(value, source)
            return found
        if isinstance(value, (bool, list, tuple, dict)) or value is None:
            raise self._wrong(value, source)
        text = str(value)
        if text == self.none_text:
            return None
        match self.kind:
            case "size":
                return parse_size(text, source, allows_zero=self.least == 0)
            case "sizes" if "+" in text:
                return tuple(parse_size(size, source) for size in text.split("+"))
            case "sizes":
                return parse_size(text, source, allows_zero=self.least == 0)
            case "tokens":
                return self._within(parse_token_count(text, source), value, source)
            case "integer":
                return self._within(self._number(int, value, source), value, source)
            case "number":
                return self._within(self._number(float, value, source), value, source)
            case "choice" if text not in self.choices:
                raise self._wrong(value, source)
            case "path":
                return Path(text).expanduser()
        return text

    def _number(self, read: Callable[[str], float], value: object, source: str) -> float:
        try:
            number = read(str(value))
        except ValueError:
            raise self._wrong(value, source) from None
        if not math.isfinite(number):
            raise self._wrong(value, source)
        return number

    def _within(self, number: float, value: object, source: str) -> float:
        is_low = (self.least is not None and number < self.least) or (self.above is not None and number <= self.above)
        if is_low or (self.most is not None and number > self.most):
            raise self._wrong(value, source)
        return number

    def _wrong(self, value: object, source: str) -> KimiLiteError:
        allowed = ", ".join(self.choices) if self.kind == "choice" else ""
        limits = "" if self.least is None else f", {self.least:g} or more"
        limits = limits if self.above is None else f" above {self.above:g}"
        limits += "" if self.most is None else f", at most {self.most:g}"
        unless = f", or {self.none_text}" if self.none_text else ""
        expected = f"{_WORDS.get(self.kind, self.kind)} {allowed}".strip() + limits + unless
        return KimiLiteError(f"{source} is {value!r}; it must be {expected}.", f"{self.long_flag}: {self.help}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What decides which options have an effect; known when the model is loaded, or the endpoint reached."""

    is_endpoint: bool = False
    is_on_gpu: bool = False
    has_experts: bool = True
    has_ram_experts: bool = True  # some experts are read in RAM; not where VRAM has a slot for each
    is_from_disk: bool = False  # some experts do not fit into memory
    is_split: bool = False  # some experts, and not all, are where they are computed fastest
    is_ram_limited: bool = False  # --ram is less than what is free
    has_nodes: bool = False  # threads run on several memory nodes, or would
    is_warmed: bool = False  # the whole model fits into free memory and may be read there
    can_think: bool = True
    is_terminal: bool = True  # answers or remarks go to one
    is_serving: bool = False  # requests may say otherwise


def _local(options: "Options", situation: Situation) -> str:
    return "the model runs at the endpoint" if situation.is_endpoint else ""


def _remote(options: "Options", situation: Situation) -> str:
    return "" if situation.is_endpoint else "it is for --endpoint"


def _on_gpu(options: "Options", situation: Situation) -> str:
    return _local(options, situation) or ("" if situation.is_on_gpu else "no GPU is used")


def _vision(options: "Options", situation: Situation) -> str:
    return _local(options, situation) or ("--vision off" if options.vision == "off" else "")


def _vision_place(options: "Options", situation: Situation) -> str:
    return _on_gpu(options, situation) if options.vision == "gpu" else _local(options, situation)


def _vram(options: "Options", situation: Situation) -> str:
    return _local(options, situation) or ("" if options.vram_bytes == 0 else _on_gpu(options, situation))


def _gpu_experts(options: "Options", situation: Situation) -> str:
    return _on_gpu(options, situation) or _experts(options, situation)


def _experts(options: "Options", situation: Situation) -> str:
    return _local(options, situation) or ("" if situation.has_experts else "the model has no routed experts")


def _ram(options: "Options", situation: Situation) -> str:
    return _local(options, situation) or ("" if situation.is_ram_limited else "less is free")


def _loading(options: "Options", situation: Situation) -> str:
    if reason := _experts(options, situation):
        return reason
    if situation.is_from_disk:
        needed = "experts do not fit into RAM and are read when they are needed"
        return "" if options.loading == "lock" else needed
    return "" if situation.has_ram_experts or options.loading == "map" else "all experts are in VRAM"


def _cache_bias(options: "Options", situation: Situation) -> str:
    if reason := _experts(options, situation):
        return reason
    return "" if situation.is_split or not options.cache_bias else "no expert is in faster memory than another"


def _deferral(options: "Options", situation: Situation) -> str:
    if reason := _on_gpu(options, situation) or _experts(options, situation):
        return f"{reason}, so nothing runs while experts are computed" if reason == "no GPU is used" else reason
    if not options.num_deferred_experts:
        return ""
    if situation.is_from_disk:
        return "experts come from the disk when they are chosen"
    return "" if situation.is_split or situation.has_ram_experts else "all experts are in VRAM"


def _numa(options: "Options", situation: Situation) -> str:
    return _local(options, situation) or ("" if situation.has_nodes else "threads run on one memory node anyway")


def _parallel(options: "Options", situation: Situation) -> str:
    is_one_by_one = options.is_reproducible and situation.is_on_gpu and options.num_sequences > 1
    return "with --reproducible there is one request at a time" if is_one_by_one else ""


def _prefix_bytes(options: "Options", situation: Situation) -> str:
    return _local(options, situation) or ("" if options.prefix_folder else "processed prompts are not kept")


def _warm(options: "Options", situation: Situation) -> str:
    if reason := _local(options, situation):
        return reason
    return "" if situation.is_warmed or not options.is_warm else "the model is larger than what it may take of RAM"


def _greedy(options: "Options", situation: Situation) -> str:
    return "--temp 0 takes the likeliest token" if options.temperature == 0 and not situation.is_serving else ""


def _thinks(options: "Options", situation: Situation) -> str:
    is_off = options.is_thinking is False or not situation.can_think
    return "the model does not think" if is_off else ""


def _shown_thinking(options: "Options", situation: Situation) -> str:
    if options.is_quiet or not situation.is_terminal:
        return "reasoning is only shown on a terminal, and without -q"
    return _thinks(options, situation)


def _on_terminal(options: "Options", situation: Situation) -> str:
    return "" if situation.is_terminal else "Markdown is only drawn on a terminal"


def _option(
    *flags: str,
    help: str,
    kind: Kind = "text",
    panel: str,
    commands: tuple[str, ...],
    default: object = None,
    **more: Any,
) -> Any:
    return field(
        default=default,
        metadata={"option": dict(flags=flags, help=help, kind=kind, panel=panel, commands=commands, **more)},
    )


def _prefix_folder(is_wanted: bool) -> Path | None:
    from kimi_lite.files import cache_folder

    return cache_folder() / "prefixes" if is_wanted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """None: not said, so the program chooses. Sizes are limits, never wishes: a plan that breaks them is refused."""

    # What is loaded.
    model: str | None = _option(
        "-m",
        "--model",
        help="GGUF file, first shard, folder, or hf:OWNER/REPO:QUANT. Default: a demo.",
        panel=MODEL,
        commands=(*PLANNED, "doctor", "imatrix"),
        metavar="PATH",
        help_in={
            "plan": "GGUF, checkpoint folder, hf:OWNER/REPO:QUANT, or a name. Default: kimi-k2.5.",
            "doctor": "Look at this model too: shards, tokenizer, plan.",
            "imatrix": "GGUF file, first shard or folder; best unquantized or Q8_0.",
        },
    )
    endpoint: str | None = _option(
        "--endpoint",
        help="An OpenAI-compatible server; -m names its model.",
        panel=MODEL,
        commands=(*ANSWERING, "bench"),
        metavar="URL",
        help_in={"bench": "Measure an OpenAI-compatible server; -m names its model."},
    )
    api_key: str | None = _option(
        "--api-key",
        help="For --endpoint.",
        unused=_remote,
        panel=MODEL,
        commands=(*ASKING, "serve", "bench"),
        metavar="KEY",
        help_in={"serve": "Clients must know it; commas between several."},
    )
    mmproj: Path | None = _option(  # None: the one next to the model
        "--mmproj",
        help="The model's vision file. Default: the one next to the model.",
        kind="path",
        unused=_vision,
        panel=MODEL,
        commands=PLANNED,
        metavar="FILE",
    )
    vision: str = _option(  # where the tower's weights lie; off: there is none
        "--vision",
        help="The vision tower: in ram, brought up when an image comes; on the gpu; off.",
        kind="choice",
        choices=("ram", "gpu", "off"),
        unused=_vision_place,
        panel=MODEL,
        commands=PLANNED,
        default="ram",
        shown_default="ram",
    )
    is_offline: bool = _option(
        "--offline",
        help="Fetch nothing: a model of a hub must be on this machine.",
        kind="switch",
        unused=_local,
        panel=MODEL,
        commands=LOADING,
        default=False,
    )
    context_length: int | None = _option(  # tokens of one sequence; 0: the model's own limit
        "-c",
        "--ctx",
        help="Context in tokens, as 32K; 0: all that the model has. Default: up to 32K.",
        kind="tokens",
        unused=_local,
        panel=MODEL,
        commands=(*ASKING, "serve", "plan", "pull", "models"),
        metavar="TOKENS",
    )
    num_sequences: int = _option(  # that the cache serves at the same time, each with a whole context
        "--parallel",
        help="Requests answered at the same time, each with a whole context. Default: 4.",
        kind="integer",
        least=1,
        most=256,
        unused=_parallel,
        panel=SERVER,
        commands=("serve",),
        default=1,
        command_default=4,
    )
    kv_dtype: str = _option(
        "--kv-dtype",
        help="Type of the KV cache; q8 takes half of f16's memory.",
        kind="choice",
        choices=("f16", "bf16", "q8", "f32"),
        unused=_local,
        panel=MODEL,
        commands=FITTED,
        default="f16",
        shown_default="f16",
    )

    # What it may take.
    num_threads: int | None = _option(
        "-t",
        "--threads",
        help="CPU threads. Default: all usable cores.",
        kind="integer",
        least=1,
        unused=_local,
        panel=MACHINE,
        commands=(*PLANNED, "imatrix"),
    )
    device: str | None = _option(  # a torch device; None: CUDA where there is one
        "--device",
        help="cuda, cuda:1 or cpu; cuda:0,cuda:1 shares the layers. Default: one GPU where one can be used.",
        unused=_local,
        panel=MACHINE,
        commands=FITTED,
        help_in={"plan": "cpu: without the GPU."},
    )
    vram_bytes: int | tuple[int, ...] | None = _option(  # of each GPU; several: of one after the other
        "--vram",
        help=f"VRAM it may take, never exceeded; 24G+24G: of two GPUs; 0: no GPU. {SIZE_HELP}.",
        kind="sizes",
        least=0,
        unused=_vram,
        panel=MACHINE,
        commands=FITTED,
        metavar="SIZE",
        help_in={"plan": f"VRAM, or less of it; more than is here: a hypothetical machine. 0: no GPU. {SIZE_HELP}."},
    )
    ram_bytes: int | None = _option(
        "--ram",
        help="RAM it may take; experts beyond it stay on disk.",
        kind="size",
        unused=_ram,
        panel=MACHINE,
        commands=FITTED,
        metavar="SIZE",
        help_in={"plan": "RAM, or less of it; more than is here: the same CPU with more."},
    )
    num_gpu_experts: int | None = _option(  # slots in VRAM for routed experts
        "--gpu-experts",
        help="Experts cached in VRAM. Default: all that fit.",
        kind="integer",
        least=0,
        unused=_gpu_experts,
        panel=MACHINE,
        commands=PLANNED,
    )
    dense_type: str = _option(  # of the weights that every token uses, on a GPU
        "--dense",
        help="Type in VRAM of the weights that every token uses, at most so many bits; file: as they are. "
        "Default: the plan chooses.",
        kind="choice",
        choices=("auto", *DENSE_TYPES),
        unused=_on_gpu,
        panel=MACHINE,
        commands=PLANNED,
        default="auto",
        shown_default="auto",
    )
    loading: str = _option(  # of experts that fit into RAM
        "--load",
        help="Experts that fit into RAM: map the file (mmap), read it, or read and lock it (mlock).",
        kind="choice",
        choices=("map", "read", "lock"),
        unused=_loading,
        panel=MACHINE,
        commands=LOADING,
        default="map",
        shown_default="map",
    )
    numa: str = _option(  # of machines whose sockets, or parts of them, have memory of their own
        "--numa",
        help="Several memory nodes: auto divides threads, and the rows of every matrix, over them; off: as on one.",
        kind="choice",
        choices=("auto", "off"),
        unused=_numa,
        panel=MACHINE,
        commands=PLANNED,
        default="auto",
        shown_default="auto",
    )
    ram_expert_bytes: int | None = None  # most RAM for routed experts; None: what is left
    num_readers: int = 8  # threads that read experts: a disk needs several reads under way
    is_reading_direct: bool = True  # past the page cache, where that can be
    maps_beyond_ram: bool = False  # map experts that do not fit, too: what reading them is measured against
    keeps_heat: bool = True  # which experts were hot is read at the start and written at the end
    is_warm: bool = _option(
        "--warm/--no-warm",
        help="Read the model into memory first, where it fits.",
        kind="switch",
        unused=_warm,
        panel=MACHINE,
        commands=("chat",),
        default=False,
        command_default=True,
        shown_default="on",
    )
    is_reproducible: bool = _option(
        "--reproducible",
        help="The same bits wherever experts are, and one request at a time; prompts are slower on a GPU.",
        kind="switch",
        unused=_on_gpu,
        panel=MACHINE,
        commands=LOADING,
        default=False,
    )
    cache_bias: float = _option(  # added to the router's choice for experts that are resident; 0: never
        "--cache-bias",
        help="Add this to the router's score of experts in fast memory; changes answers. 0: off.",
        kind="number",
        least=0,
        unused=_cache_bias,
        panel=MACHINE,
        commands=LOADING,
        default=0.0,
    )
    num_deferred_experts: int = _option(  # of a generated token, that are added one layer later; 0: never
        "--defer-experts",
        help="Add a token's K last-ranked experts one layer later: less waiting, other answers. 0: off.",
        kind="integer",
        least=0,
        unused=_deferral,
        panel=MACHINE,
        commands=LOADING,
        metavar="K",
        default=0,
    )
    defers_on_cpu: bool = False  # also where nothing is gained: what it costs in quality is measured there
    prefix_folder: Path | None = _option(  # where cached prefixes outlive the process; None: they do not
        "--prefix-cache/--no-prefix-cache",
        help="Keep processed prompts on disk.",
        kind="switch",
        convert=_prefix_folder,
        unused=_local,
        panel=MACHINE,
        commands=(*ASKING, "serve"),
        command_default=True,
        shown_default="on",
    )
    prefix_bytes: int = _option(  # how large the folder may become
        "--prefix-cache-size",
        help="Most disk space for them.",
        kind="size",
        unused=_prefix_bytes,
        panel=MACHINE,
        commands=(*ASKING, "serve"),
        metavar="SIZE",
        default=8 << 30,
        shown_default="8G",
    )
    routing_trace: Path | None = _option(
        "--record-routing",
        help="Write which experts every token chose (.npz), for tools.cache.sim.",
        kind="path",
        unused=_experts,
        panel=MACHINE,
        commands=LOADING,
        metavar="FILE",
    )

    # How answers are made.
    system: str = _option("-s", "-sys", "--system", help="System prompt.", panel=PROMPT, commands=ASKING, default="")
    is_thinking: bool | None = _option(
        "--think/--no-think",
        help="Reason first. Default: if the model can.",
        kind="switch",
        panel=PROMPT,
        commands=ASKING,
    )
    thinking_budget: int | None = _option(
        "--think-budget",
        help="Most tokens of reasoning; -1: no limit.",
        kind="tokens",
        none_text="-1",
        unused=_thinks,
        panel=PROMPT,
        commands=ASKING,
        metavar="TOKENS",
    )
    preserve_thinking: bool = _option(
        "--preserve-thinking",
        help="Past reasoning stays in the prompt, where the model can.",
        kind="switch",
        panel=PROMPT,
        commands=ASKING,
        default=False,
    )
    max_tokens: int | None = _option(
        "-n",
        "--max-tokens",
        help="Longest answer; -1: no limit but the context.",
        kind="tokens",
        least=1,
        none_text="-1",
        panel=PROMPT,
        commands=SAMPLED,
        panel_in={"serve": DEFAULTS},
        metavar="TOKENS",
    )
    images: tuple[str, ...] = _option(
        "--image",
        help="An image for the first message. May be repeated.",
        kind="texts",
        panel=PROMPT,
        commands=ANSWERING,
        metavar="FILE",
        default=(),
        is_setting=False,
    )
    videos: tuple[str, ...] = _option(
        "--video",
        help="A video for the first message. May be repeated.",
        kind="texts",
        panel=PROMPT,
        commands=ANSWERING,
        metavar="FILE",
        default=(),
        is_setting=False,
    )
    video_fps: float = _option(
        "--video-fps",
        help="Frames of a video that the model sees a second.",
        kind="number",
        above=0,
        most=60,
        unused=_local,
        panel=PROMPT,
        commands=(*ANSWERING, "serve"),
        metavar="NUMBER",
        default=2.0,
        shown_default="2",
    )
    video_frames: int = _option(
        "--video-frames",
        help="Most frames of a video that the model sees, evenly over all of it.",
        kind="integer",
        least=1,
        most=4096,
        unused=_local,
        panel=PROMPT,
        commands=(*ANSWERING, "serve"),
        metavar="NUMBER",
        default=128,
        shown_default="128",
    )
    image_bytes: int = _option(
        "--image-size",
        help="Largest file of an image that is read.",
        kind="size",
        panel=PROMPT,
        commands=(*ANSWERING, "serve"),
        metavar="SIZE",
        default=20 << 20,
        shown_default="20M",
    )
    temperature: float | None = _option(
        "--temp",
        help="Temperature; 0: greedy. Default: 1.0 with thinking, else 0.6.",
        kind="number",
        least=0,
        panel=SAMPLING,
        commands=SAMPLED,
        panel_in={"serve": DEFAULTS},
    )
    top_k: int = _option(
        "--top-k",
        help="Keep the k likeliest tokens; 0: off.",
        kind="integer",
        least=0,
        unused=_greedy,
        panel=SAMPLING,
        commands=SAMPLED,
        panel_in={"serve": DEFAULTS},
        default=0,
    )
    top_p: float = _option(
        "--top-p",
        help="Keep the likeliest tokens that sum to p; 1: off.",
        kind="number",
        above=0,
        most=1,
        unused=_greedy,
        panel=SAMPLING,
        commands=SAMPLED,
        panel_in={"serve": DEFAULTS},
        default=0.95,
        shown_default="0.95",
    )
    min_p: float = _option(
        "--min-p",
        help="Keep tokens p times as likely as the likeliest; 0: off.",
        kind="number",
        least=0,
        most=1,
        unused=_greedy,
        panel=SAMPLING,
        commands=SAMPLED,
        panel_in={"serve": DEFAULTS},
        default=0.0,
    )
    repetition_penalty: float = _option(
        "--repeat-penalty",
        help="Make seen tokens less likely; 1: off.",
        kind="number",
        above=0,
        panel=SAMPLING,
        commands=SAMPLED,
        panel_in={"serve": DEFAULTS},
        default=1.0,
    )
    seed: int | None = _option(
        "--seed",
        help="The same seed gives the same answer; -1: random. Default: random.",
        kind="integer",
        least=0,
        unused=_greedy,
        panel=SAMPLING,
        commands=SAMPLED,
        panel_in={"serve": DEFAULTS},
        none_text="-1",
    )

    # Conversations and tools.
    is_continuing: bool = _option(
        "--continue",
        help="Go on with the last conversation.",
        kind="switch",
        panel=CHAT,
        commands=("chat",),
        default=False,
        is_setting=False,
    )
    session_name: str | None = _option(
        "--session",
        help="Go on with the conversation NAME, or begin it.",
        panel=CHAT,
        commands=("chat",),
        metavar="NAME",
    )
    tools_folder: Path | None = _option(
        "--tools",
        help="Let the model use tools in FOLDER; it asks you first.",
        kind="path",
        panel=TOOLS,
        commands=ANSWERING,
        metavar="FOLDER",
    )
    mcp_config: Path | None = _option(
        "--mcp-config",
        help="MCP servers with more tools.",
        kind="path",
        panel=TOOLS,
        commands=ASKING,
        metavar="FILE",
    )
    allowed_tools: tuple[str, ...] = _option(
        "--allow",
        help="A tool that need not ask; *: all. May be repeated.",
        help_in={"swarm": "A tool that agents may use in addition; *: all. May be repeated."},
        kind="texts",
        panel=TOOLS,
        commands=ASKING,
        metavar="NAME",
        default=(),
    )

    # How a swarm works.
    endpoints: tuple[str, ...] = _option(
        "--endpoint",
        help="An OpenAI-compatible server; may be repeated. role=orchestrator or role=agents: for those alone.",
        kind="texts",
        panel=MODEL,
        commands=("swarm",),
        metavar="URL[=WEIGHT][,model=NAME][,role=ROLE][,parallel=N][,key=VARIABLE]",
        default=(),
    )
    work_folder: Path | None = _option(
        "--dir",
        help="Let agents read the files of FOLDER; --allow write_file, append_file and run_python for more.",
        kind="path",
        panel=SWARM,
        commands=("swarm",),
        metavar="FOLDER",
        is_setting=False,
    )
    plan_file: Path | None = _option(
        "--plan",
        help="The parts of the task, in stages (TOML or JSON); the orchestrator only answers at the end.",
        kind="path",
        panel=SWARM,
        commands=("swarm",),
        metavar="FILE",
        is_setting=False,
    )
    agents_file: Path | None = _option(
        "--agents",
        help="Which agents there are and what they may use (TOML).",
        kind="path",
        panel=SWARM,
        commands=("swarm",),
        metavar="FILE",
    )
    max_parallel: int = _option(  # each with a whole context where the model runs here
        "--max-parallel",
        help="Agents that work at the same time.",
        kind="integer",
        least=1,
        most=256,
        panel=SWARM,
        commands=("swarm",),
        default=4,
        shown_default="4",
    )
    max_agents: int = _option(
        "--max-agents",
        help="Agents in all.",
        kind="integer",
        least=0,
        panel=SWARM,
        commands=("swarm",),
        default=100,
        shown_default="100",
    )
    max_depth: int = _option(
        "--max-depth",
        help="1: only the orchestrator starts agents; 2: its agents may, too.",
        kind="integer",
        least=1,
        most=8,
        panel=SWARM,
        commands=("swarm",),
        default=1,
        shown_default="1",
    )
    orchestrator_steps: int = _option(
        "--max-steps",
        help="Answers of the orchestrator, those with calls included.",
        kind="integer",
        least=1,
        panel=SWARM,
        commands=("swarm",),
        default=15,
        shown_default="15",
    )
    agent_steps: int = _option(
        "--agent-steps",
        help="Answers of an agent.",
        kind="integer",
        least=1,
        panel=SWARM,
        commands=("swarm",),
        default=100,
        shown_default="100",
    )
    agent_tokens: int | None = _option(
        "--agent-tokens",
        help="Tokens that an agent may generate in all. Default: no limit.",
        kind="tokens",
        least=1,
        panel=SWARM,
        commands=("swarm",),
        metavar="TOKENS",
    )
    agent_seconds: float | None = _option(
        "--agent-time",
        help="Seconds that an agent may work, waiting for its turn not counted. Default: no limit.",
        kind="number",
        above=0,
        panel=SWARM,
        commands=("swarm",),
        metavar="SECONDS",
    )
    run_tokens: int | None = _option(
        "--run-tokens",
        help="Tokens that all may generate; then the orchestrator answers from what is there. Default: no limit.",
        kind="tokens",
        least=1,
        panel=SWARM,
        commands=("swarm",),
        metavar="TOKENS",
    )
    run_seconds: float | None = _option(
        "--run-time",
        help="Seconds that the run may take; then the orchestrator answers from what is there. Default: no limit.",
        kind="number",
        above=0,
        panel=SWARM,
        commands=("swarm",),
        metavar="SECONDS",
    )
    result_chars: int = _option(
        "--result-size",
        help="Characters of a result that the orchestrator gets at once; it can read on.",
        kind="integer",
        least=1,
        panel=SWARM,
        commands=("swarm",),
        default=8000,
        shown_default="8000",
    )
    fuller_below: int = _option(
        "--min-report",
        help="Ask an agent that worked with tools once for more where its report has fewer characters; 0: never.",
        kind="integer",
        least=0,
        panel=SWARM,
        commands=("swarm",),
        default=200,
        shown_default="200",
    )

    # What goes to the terminal.
    is_hiding_thinking: bool = _option(
        "--hide-thinking",
        help="Do not show reasoning.",
        kind="switch",
        unused=_shown_thinking,
        panel=OUTPUT,
        commands=ANSWERING,
        default=False,
    )
    is_plain: bool = _option(
        "--plain",
        help="Show answers as they come, without Markdown.",
        kind="switch",
        unused=_on_terminal,
        panel=OUTPUT,
        commands=ASKING,
        default=False,
    )
    is_quiet: bool = _option(
        "-q",
        "--quiet",
        help="No progress, remarks or statistics.",
        kind="switch",
        panel=OUTPUT,
        commands=ASKING,
        default=False,
    )

    # How it serves.
    host: str = _option(
        "--host",
        help="Address to listen on; 0.0.0.0: all of this machine's.",
        panel=SERVER,
        commands=("serve",),
        default="127.0.0.1",
        shown_default="127.0.0.1",
    )
    port: int = _option(
        "--port",
        help="Port to listen on; 0: any free one.",
        kind="integer",
        least=0,
        most=65535,
        panel=SERVER,
        commands=("serve",),
        default=8080,
        shown_default="8080",
    )
    alias: str | None = _option(
        "--alias", help="Name of the model in the API.", panel=SERVER, commands=("serve",), metavar="NAME"
    )
    max_gap_s: float | None = _option(
        "--max-gap",
        help="Longest time in seconds between two tokens of an answer while other prompts are read. Default: 1.",
        kind="number",
        least=0.01,
        panel=SERVER,
        commands=("serve",),
        command_default=1.0,
        metavar="SECONDS",
    )
    max_waiting: int = _option(
        "--max-waiting",
        help="Requests that may wait for their turn; more get 429.",
        kind="integer",
        least=0,
        panel=SERVER,
        commands=("serve",),
        default=64,
        shown_default="64",
    )
    max_images: int = _option(
        "--max-images",
        help="Most images and videos in one request.",
        kind="integer",
        least=0,
        panel=SERVER,
        commands=("serve",),
        default=64,
        shown_default="64",
    )
    has_loop_guard: bool = _option(
        "--loop-guard/--no-loop-guard",
        help="End answers that repeat themselves or the same tool call. Default: on.",
        kind="switch",
        panel=SERVER,
        commands=("serve",),
        default=True,
    )
    origins: tuple[str, ...] = _option(
        "--allow-origin",
        help="Web pages of this origin may use the server (CORS); *: any. May be repeated.",
        kind="texts",
        panel=SERVER,
        commands=("serve",),
        default=(),
        metavar="ORIGIN",
    )
    server_names: tuple[str, ...] = _option(
        "--allow-host",
        help="A host name that clients may reach the server by, in addition to its own; *: any. May be repeated.",
        kind="texts",
        panel=SERVER,
        commands=("serve",),
        default=(),
        metavar="NAME",
    )
    is_insecure: bool = _option(
        "--insecure",
        help="Listen on other addresses than this machine's own without an API key.",
        kind="switch",
        panel=SERVER,
        commands=("serve",),
        default=False,
    )
    log_level: str = _option(
        "--log-level",
        help="How much is logged to stderr; nothing of what is said.",
        kind="choice",
        choices=("error", "warning", "info", "debug"),
        panel=SERVER,
        commands=("serve",),
        default="info",
        shown_default="info",
    )
    has_json_log: bool = _option(
        "--log-json", help="Log lines are JSON.", kind="switch", panel=SERVER, commands=("serve",), default=False
    )

    given: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)  # name of a field -> its source

    def __post_init__(self) -> None:
        for option in OPTIONS.values():
            value = getattr(self, option.name)
            if option.kind == "choice" and value not in option.choices:
                option.parse(value, option.long_flag)
        if self.is_reproducible and self.cache_bias:
            raise KimiLiteError(
                "--cache-bias makes answers depend on where experts are; --reproducible promises that they do not.",
                "Leave one of the two out.",
            )
        sizes, names = self.vram_bytes, (self.devices or "").split(",")
        if isinstance(sizes, tuple) and self.device not in (None, "cpu") and len(names) != len(sizes):
            raise KimiLiteError(
                f"--vram has {len(sizes)} sizes and --device {self.device} names {len(names)} of the GPUs.",
                "Give each GPU its size, or one size for all.",
            )
        if len(names) > 1 and self.num_deferred_experts:
            raise KimiLiteError(
                "--defer-experts adds experts one layer later, and with several GPUs that layer may be on another.",
                "Leave one of the two out.",
            )

    @property
    def is_demo(self) -> bool:
        """Nothing names a model."""
        return self.model is None and self.endpoint is None and not self.endpoints

    @property
    def allows_gpu(self) -> bool:
        return self.device != "cpu" and self.vram_bytes != 0

    @property
    def devices(self) -> str | None:
        """What `device` names, or as many GPUs as there are sizes of VRAM: "cuda:0,cuda:1"."""
        if self.device is None and isinstance(self.vram_bytes, tuple):
            return ",".join(f"cuda:{number}" for number in range(len(self.vram_bytes)))
        return self.device

    def vram_limit(self, number: int) -> int | None:
        """Bytes that GPU `number` of those that are used may give; None: what is free."""
        return self.vram_bytes[number] if isinstance(self.vram_bytes, tuple) else self.vram_bytes


def unused_options(options: Options, situation: Situation) -> list[str]:
    """A line for each flag that was given and has no effect. What only the environment or the configuration file says
    is a default, and no line."""
    lines = []
    for name, source in options.given.items():
        reason = OPTIONS[name].unused(options, situation) if source.startswith("-") else ""
        if reason:
            lines.append(f"{source} has no effect here: {reason}.")
    return lines


def _declared() -> dict[str, Option]:
    return {each.name: Option(name=each.name, **each.metadata["option"]) for each in fields(Options) if each.metadata}


OPTIONS: Mapping[str, Option] = _declared()  # by the name of the field


def options_of(command: str) -> Sequence[Option]:
    """In the order of their declaration."""
    return [option for option in OPTIONS.values() if command in option.commands]
