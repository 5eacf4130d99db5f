"""llama.cpp's flags, for users who know them: each works or names what does the same here, before typer parses a line.

Every command's arguments pass through `translate`. A flag of the command itself is left alone; one of llama.cpp's is
rewritten to ours, dropped with one line where it has no meaning here, or refused with the name of what to use. Several
letters after one dash are never taken for a cluster of short options: `-ngl 99` is no `-n gl 99`.

Names: llama.cpp/common/arg.cpp, llama.cpp/tools/llama-bench, llama.cpp/tools/imatrix and llama.cpp/tools/quantize, as
of November 2026.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import read_text
from kimi_lite.options import HUB_PREFIX

_SWITCH_VALUES = ("on", "off", "auto", "0", "1", "true", "false", "enabled", "disabled")
_ATTACHED = re.compile(r"-[A-Za-z][\d.~/].*")  # a short option with its value: -c4096, -m/models/k2.5


class Meaning(NamedTuple):
    """What a flag is here: arguments for typer, a line for the user, or both."""

    arguments: Sequence[str] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Flag:
    """One of llama.cpp's options. `value`: "one", "none", or "maybe" for switches that may be followed by on or off."""

    names: tuple[str, ...]
    meaning: Callable[[str, str], Meaning]  # (as it was typed, its value or "")
    value: str = "none"


def to(option: str, values: Mapping[str, str] | None = None) -> Callable[[str, str], Meaning]:
    """Ours of another name, with values renamed; others than those are refused."""

    def meaning(name: str, value: str) -> Meaning:
        if values is not None and value not in values:
            raise KimiLiteError(
                f"llama.cpp's {name} {value} has no equivalent here.",
                f"{option} takes {', '.join(dict.fromkeys(values.values()))}.",
            )
        return Meaning([option, value if values is None else values[value]])

    return meaning


def nothing(why: str) -> Callable[[str, str], Meaning]:
    """Accepted, with one line."""
    return lambda name, value: Meaning(remark=f"llama.cpp's {name} has no effect here: {why}")


def silently(name: str, value: str) -> Meaning:
    """What is so anyway."""
    return Meaning()


def refused(instead: str, *neutral: str) -> Callable[[str, str], Meaning]:
    """Refused with what to use; not where the value is one of `neutral`, which ask for nothing."""

    def meaning(name: str, value: str) -> Meaning:
        if value in neutral:
            return Meaning()
        raise KimiLiteError(f"llama.cpp's {name} is not an option here.", instead)

    return meaning


def _gpu_layers(name: str, value: str) -> Meaning:
    if value == "0":
        return Meaning(["--device", "cpu"])
    return Meaning(
        remark=f"llama.cpp's {name} has no effect here: a GPU takes what all tokens use of every layer; --vram and "
        f"--gpu-experts limit it, --device cpu leaves it out"
    )


def _gpu(name: str, value: str) -> Meaning:
    return Meaning(["--device", f"cuda:{value}" if value.isdecimal() else value.lower()])


def _override(name: str, value: str) -> Meaning:
    """`-ot ".ffn_.*_exps.=CPU"`, as model cards have it: experts in RAM, which is where they are."""
    rules = [rule.rpartition("=") for rule in value.split(",")]
    if all("exp" in pattern and place == "CPU" for pattern, _, place in rules):
        return Meaning(
            remark=f"llama.cpp's {name} {value} has no effect here: experts are in RAM anyway, those used most also "
            f"in what VRAM is left; --gpu-experts N limits their number"
        )
    raise KimiLiteError(f"llama.cpp's {name} is not an option here.", "Use --gpu-experts N, --vram SIZE or --ram SIZE.")


def _reasoning(name: str, value: str) -> Meaning:
    return Meaning({"on": ["--think"], "off": ["--no-think"]}.get(value, ()))


def _named_device(name: str, value: str) -> Meaning:
    found = re.fullmatch(r"cuda(\d+)", value.lower())
    return Meaning(["--device", "cpu" if value == "none" else f"cuda:{found[1]}" if found else value])


def _system_file(name: str, value: str) -> Meaning:
    return Meaning(["--system", read_text(Path(value).expanduser(), f"The file of {name}")])


def _answer_length(name: str, value: str) -> Meaning:
    return Meaning(["--max-tokens", "-1" if value == "-2" else value])


def _reasoning_budget(name: str, value: str) -> Meaning:
    return Meaning({"-1": (), "0": ["--no-think"]}.get(value, ["--think-budget", value]))


def _hub_model(name: str, value: str) -> Meaning:
    return Meaning(["--model", f"{HUB_PREFIX}{value.removeprefix(HUB_PREFIX)}"])


_CACHE_TYPES = {"f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8", "q8": "q8"}
_SAMPLING = "Samplers here: --temp, --top-k, --top-p, --min-p, --repeat-penalty."
_DOWNLOAD = "A model of a hub is named by -m hf:OWNER/REPO:QUANT; kimi-lite pull OWNER/REPO lists the quants."
_TEMPLATE = "The template and its keys are the model file's own."
_ROPE = "The context's scaling is the model file's own; -c sets the context."
_THREADS = "threads are pinned and wait as they should; -t sets their number"
_ALWAYS = "it is always so"

FLAGS = (
    Flag(("--ctx-size",), to("--ctx"), "one"),
    Flag(("--predict", "--n-predict"), _answer_length, "one"),
    Flag(("--temperature",), to("--temp"), "one"),
    Flag(("--system-prompt",), to("--system"), "one"),
    Flag(("-sysf", "--system-prompt-file"), _system_file, "one"),
    Flag(("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"), to("--kv-dtype", _CACHE_TYPES), "one"),
    Flag(("--mlock",), to("--load", {"": "lock"})),
    Flag(("--no-mmap",), to("--load", {"": "read"})),
    Flag(("--mmap",), to("--load", {"": "map"})),
    Flag(("-mmp",), to("--load", {"0": "read", "1": "map"}), "one"),
    Flag(("-ngl", "--gpu-layers", "--n-gpu-layers"), _gpu_layers, "one"),
    Flag(("-cmoe", "--cpu-moe"), lambda name, value: Meaning(["--gpu-experts", "0"])),
    Flag(
        ("-ncmoe", "--n-cpu-moe"),
        nothing("experts go to VRAM by their use, not by layer; --gpu-experts N limits their number"),
        "one",
    ),
    Flag(("-mg", "--main-gpu"), _gpu, "one"),
    Flag(("-dev",), _named_device, "one"),
    Flag(
        ("-sm", "--split-mode"), nothing("several GPUs, as --device cuda:0,cuda:1 names them, share the layers"), "one"
    ),
    Flag(
        ("-ts", "--tensor-split"), refused("--device cuda:0,cuda:1 shares the layers, as --vram 24G+12G allows."), "one"
    ),
    Flag(("-ot", "--override-tensor"), _override, "one"),
    Flag(
        ("-fit", "--fit", "-fitt", "--fit-target", "-fitc", "--fit-ctx"),
        nothing("the plan fits the model into memory anyway; --vram, --ram and -c limit it"),
        "one",
    ),
    Flag(("--rpc",), refused("kimi-lite runs on one machine; chat --endpoint URL uses another program's."), "one"),
    Flag(
        ("-nkvo", "--no-kv-offload"), refused("With a GPU the cache is in VRAM; --kv-dtype q8 or -c make it smaller.")
    ),
    Flag(("-fa", "--flash-attn"), nothing("attention is always computed without storing its scores"), "maybe"),
    Flag(("-b", "--batch-size", "-ub", "--ubatch-size"), nothing("the plan chooses how a prompt is cut"), "one"),
    Flag(("-tb", "--threads-batch"), nothing("-t is for prompts and for decoding"), "one"),
    Flag(("-tbd", "--threads-batch-draft", "-td", "--threads-draft"), nothing("there is no draft model"), "one"),
    Flag(("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"), nothing("there is no draft model"), "one"),
    Flag(("-devd", "--device-draft", "-ctkd", "-ctvd"), nothing("there is no draft model"), "one"),
    Flag(
        ("-C", "--cpu-mask", "-Cr", "--cpu-range", "--cpu-strict", "--prio", "--poll", "-Cb", "-Crb", "--numa"),
        nothing(_THREADS),
        "one",
    ),
    Flag(("-np", "--parallel"), refused("A command answers one conversation at a time.", "1"), "one"),
    Flag(("-cb", "--cont-batching", "-nocb", "--no-cont-batching"), nothing("one conversation runs at a time")),
    Flag(("--keep",), nothing("a full context asks what to drop"), "one"),
    Flag(("--context-shift", "--no-context-shift"), nothing("a full context asks what to drop")),
    Flag(("--prompt-cache",), nothing("processed prompts are kept anyway, see --prefix-cache"), "one"),
    Flag(("--prompt-cache-all", "--prompt-cache-ro"), nothing("processed prompts are kept anyway")),
    Flag(("-hf", "-hfr", "--hf-repo"), _hub_model, "one"),
    Flag(("-hff", "--hf-file", "-mu", "--model-url", "-dr", "--docker-repo"), refused(_DOWNLOAD), "one"),
    Flag(("-hft", "--hf-token"), refused("Set HF_TOKEN, or log in with: hf auth login."), "one"),
    Flag(("-hfd", "-hfrd", "--hf-repo-draft"), refused("There is no draft model."), "one"),
    Flag(("-hfv", "-hfrv", "--hf-repo-v"), refused("There is no vocoder."), "one"),
    Flag(("-md", "--model-draft", "--draft", "--draft-max", "--draft-min"), refused("There is no draft model."), "one"),
    Flag(("-st", "--single-turn"), lambda name, value: Meaning(["--single-turn"])),
    Flag(("-cnv", "--conversation"), lambda name, value: Meaning(["--conversation"])),
    Flag(("-i", "--interactive", "-if", "--interactive-first"), lambda name, value: Meaning(["--conversation"])),
    Flag(("-no-cnv", "--no-conversation"), lambda name, value: Meaning(["--single-turn"])),
    Flag(("--jinja", "--warmup", "--no-warmup", "--perf", "--no-perf", "--escape", "-e"), silently),
    Flag(("--no-escape",), nothing("prompts are taken as they are")),
    Flag(("--no-jinja",), refused(_TEMPLATE)),
    Flag(("-co", "--color"), nothing("colours follow the terminal; NO_COLOR=1 turns them off"), "maybe"),
    Flag(("--simple-io",), lambda name, value: Meaning(["--plain"])),
    Flag(("-mli", "--multiline-input"), nothing("Alt-Enter begins a new line")),
    Flag(("--no-display-prompt", "-sp", "--special"), silently),
    Flag(("-v", "--verbose", "--log-verbose", "--verbose-prompt"), nothing("there is no log")),
    Flag(("--log-disable", "--log-prefix", "--log-timestamps", "--offline"), silently),
    Flag(("--log-file", "-lv", "--verbosity", "--log-verbosity"), nothing("there is no log"), "one"),
    Flag(("--log-colors",), silently, "maybe"),
    Flag(("--check-tensors",), nothing("kimi-lite doctor -m FILE checks a file")),
    Flag(("--swa-full", "-kvu", "--kv-unified", "-nr", "--no-repack", "--no-op-offload"), nothing("it is not needed")),
    Flag(("--repack", "--op-offload", "-kvo", "--kv-offload", "--no-host", "--no-mmproj-offload"), silently),
    Flag(("-dio", "--direct-io"), nothing("experts that come from disk are read past the page cache anyway")),
    Flag(("-dt", "--defrag-thold"), nothing("the cache has pages"), "one"),
    Flag(("--reasoning-format",), nothing("reasoning is told apart by the model's own tokens"), "one"),
    Flag(("-rea", "--reasoning"), _reasoning, "one"),
    Flag(("--reasoning-budget",), _reasoning_budget, "one"),
    Flag(("--chat-template-kwargs",), refused("--think, --no-think and --preserve-thinking set its variables."), "one"),
    Flag(("--chat-template", "--chat-template-file", "--override-kv"), refused(_TEMPLATE), "one"),
    Flag(("--rope-scaling",), refused(_ROPE, "none"), "one"),
    Flag(("--rope-scale", "--rope-freq-scale", "--yarn-orig-ctx", "--yarn-ext-factor"), refused(_ROPE), "one"),
    Flag(("--rope-freq-base", "--yarn-attn-factor", "--yarn-beta-slow", "--yarn-beta-fast"), refused(_ROPE), "one"),
    Flag(("--lora", "--lora-scaled", "--control-vector"), refused("Adapters are not supported."), "one"),
    Flag(("-mm", "--mmproj"), to("--mmproj"), "one"),
    Flag(("-mmu", "--mmproj-url"), refused("Fetch the file, and name it with --mmproj FILE."), "one"),
    Flag(("--mmproj-auto",), silently),
    Flag(("--no-mmproj", "--no-mmproj-auto"), lambda name, value: Meaning(["--vision", "off"])),
    Flag(("-bf", "--binary-file"), to("--file"), "one"),
    Flag(("-r", "--reverse-prompt"), refused("In a chat: /set stop TEXT."), "one"),
    Flag(("--in-prefix", "--in-suffix"), refused(_TEMPLATE), "one"),
    Flag(("--ignore-eos",), refused("-n limits an answer, and the model ends it.")),
    Flag(("--samplers", "--sampler-seq", "--sampling-seq", "--typical-p"), refused(_SAMPLING), "one"),
    Flag(("--typical", "--xtc-threshold"), refused(_SAMPLING, "1", "1.0"), "one"),
    Flag(("--top-nsigma", "--top-n-sigma"), refused(_SAMPLING, "-1", "-1.0"), "one"),
    Flag(
        ("--presence-penalty", "--frequency-penalty", "--mirostat", "--xtc-probability", "--dynatemp-range"),
        refused(_SAMPLING, "0", "0.0"),
        "one",
    ),
    Flag(("--dry-multiplier",), refused(_SAMPLING, "0", "0.0"), "one"),
    Flag(("--dry-base", "--dry-allowed-length", "--dry-penalty-last-n"), nothing("there is no DRY sampler"), "one"),
    Flag(("--dry-sequence-breaker", "--mirostat-lr", "--mirostat-ent"), refused(_SAMPLING), "one"),
    Flag(("--dynatemp-exp", "--repeat-last-n"), refused(_SAMPLING), "one"),
    Flag(("-l", "--logit-bias"), refused(_SAMPLING), "one"),
    Flag(("--grammar", "--grammar-file", "-j", "--json-schema", "-jf"), refused("Grammars are not supported."), "one"),
    Flag(("--host", "--port"), refused("kimi-lite serve has it; chat --endpoint URL talks to a server."), "one"),
    Flag(("--list-devices",), refused("kimi-lite doctor shows the GPU.")),
    Flag(  # ours where an answer is made
        ("--temp", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--seed", "-n", "--max-tokens"),
        nothing("only chat, run and serve make answers"),
        "one",
    ),
    Flag(("--slots", "--no-slots", "--props", "--metrics"), nothing("serve has /status and /metrics anyway")),
    Flag(("--webui", "--no-webui"), nothing("serve has its page at / anyway")),
    Flag(("-to", "--timeout", "--threads-http"), nothing("serve waits as long as a client does"), "one"),
    Flag(
        ("--cache-reuse", "-cram", "--cache-ram", "-ctxcp", "--ctx-checkpoints", "-sps", "--slot-prompt-similarity"),
        nothing("what two prompts begin with is shared and kept anyway"),
        "one",
    ),
    Flag(("--slot-save-path",), nothing("processed prompts are kept anyway"), "one"),
    Flag(("--api-key-file",), refused("Use --api-key KEY or KIMI_LITE_API_KEY."), "one"),
    Flag(("--ssl-key-file", "--ssl-cert-file"), refused("serve has no TLS: put a proxy before it that has."), "one"),
    Flag(("--models-dir", "--models-preset", "--models-max"), refused("-m names the one model."), "one"),
    Flag(("--embedding", "--embeddings", "--rerank", "--reranking"), refused("These models write text.")),
    Flag(("-a", "--alias"), nothing("the model's name is its file's"), "one"),
    Flag(("--allow-requantize",), nothing("a file of any types may be quantized again")),
    Flag(("--pure",), refused("--type TYPE sets one type for every matrix.")),
    Flag(("--leave-output-tensor",), nothing("output.weight is Q8_0 unless --tensor-type says otherwise")),
    Flag(("--output-tensor-type",), lambda name, value: Meaning(["--tensor-type", f"^output.weight$={value}"]), "one"),
    Flag(("--token-embedding-type",), lambda name, value: Meaning(["--tensor-type", f"^token_embd={value}"]), "one"),
    Flag(("--keep-split",), nothing("--split-max-size says how large a file may be")),
    Flag(("--process-output", "--no-ppl", "--parse-special"), nothing("every matrix is measured, and nothing else")),
    Flag(("--output-frequency", "--save-frequency", "-ofreq"), nothing("the file is written once, at the end"), "one"),
    Flag(("--progress",), silently),
    Flag(("--delay",), nothing("runs are repeated until they are undisturbed"), "one"),
    Flag(("-oe", "--output-err"), nothing("tables go to stderr where stdout is for programs"), "one"),
)
BY_NAME: Mapping[str, Flag] = {name: flag for flag in FLAGS for name in flag.names}
_DEFAULTS = (  # llama.cpp's ways to ask for what is so unless something else is said
    *((name, "-1") for name in ("-t", "--threads", "--seed")),
    *(("--numa", value) for value in ("distribute", "numactl")),  # numactl's CPUs are kept to in any case
)
_TURNS = {  # what the two ways of talking are, by command
    ("chat", "--single-turn"): "kimi-lite run answers one prompt and ends.",
    ("run", "--conversation"): "kimi-lite chat is the conversation.",
}


class Accepted(NamedTuple):
    """What a command understands: its flags that take a value, and those that do not."""

    with_value: frozenset[str]
    switches: frozenset[str]


def translate(command: str, accepted: Accepted, arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The arguments with llama.cpp's flags replaced; `say` gets a line for each that has no effect. Raises
    KimiLiteError for what has another name here, and for letters that are no option."""
    left, found = list(arguments), []
    while left:
        word = left.pop(0)
        if word in ("--mlock", "--no-mmap", "--mmap") and "--mlock" in arguments:
            word = "--mlock"  # locking includes the others, in any order
        name, equals, value = word.partition("=")
        if word == "--":
            return [*found, word, *left]
        if not word.startswith("-") or word == "-" or _is_number(word):
            found.append(word)
        elif name in accepted.with_value:
            given = [word] if equals else [word, *left[:1]]
            left = left if equals else left[1:]
            value = value if equals else given[-1]
            _check_seed(command, name, value)
            _check_numa(name, value)
            found += () if (name, value) in _DEFAULTS else given
        elif name in accepted.switches:
            found.append(word)
        elif flag := BY_NAME.get(name):
            value, left = _take_value(flag, name, value, bool(equals), left)
            found += _fitted(command, accepted, name, flag.meaning(name, value), say)
        else:
            _check_cluster(word, accepted)
            found.append(word)
    return found


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-\d+(\.\d+)?", word) is not None


def _take_value(flag: Flag, name: str, value: str, has_value: bool, left: list[str]) -> tuple[str, list[str]]:
    if flag.value == "none" or has_value:
        return value, left
    if flag.value == "maybe":
        return ("", left[1:]) if left and left[0] in _SWITCH_VALUES else ("", left)
    if not left:
        raise KimiLiteError(f"{name} needs a value.", "")
    return left[0], left[1:]


def _fitted(command: str, accepted: Accepted, name: str, meaning: Meaning, say: Callable[[str], None]) -> Sequence[str]:
    """Only what the command understands goes on to it."""
    if meaning.remark:
        say(meaning.remark)
    option = next(iter(meaning.arguments), None)
    if option in ("--single-turn", "--conversation"):
        if (command, option) in _TURNS:
            raise KimiLiteError(f"llama.cpp's {name} is not an option of {command}.", _TURNS[command, option])
        return ()
    if option is None or option in accepted.with_value | accepted.switches:
        return meaning.arguments
    say(f"llama.cpp's {name} has no effect in kimi-lite {command}")
    return ()


def _check_numa(name: str, value: str) -> None:
    if (name, value) == ("--numa", "isolate"):
        raise KimiLiteError(
            "llama.cpp's --numa isolate is not an option here.",
            "One node's cores and memory alone: numactl -N 0 -m 0 kimi-lite ...",
        )


def _check_seed(command: str, name: str, value: str) -> None:
    if command in ("chat", "run") and name == "-s" and re.fullmatch(r"-?\d+", value):
        raise KimiLiteError(
            f"-s is the system prompt here, and {value} looks like a seed.", f"Try --seed {value}, or --system {value}."
        )


def _check_cluster(word: str, accepted: Accepted) -> None:
    """One dash and several letters: fine where all are switches (-qh) or a value follows at once (-c4096)."""
    if word.startswith("--") or len(word) == 2:
        return  # typer knows what to say
    if all(f"-{letter}" in accepted.switches for letter in word[1:]):
        return
    if word[:2] in accepted.with_value and _ATTACHED.fullmatch(word):
        return
    near = get_close_matches(word, [*accepted.with_value, *accepted.switches, *BY_NAME], n=1, cutoff=0.7)
    hint = f"Did you mean {near[0]}?" if near else "--help lists the options; write a short option and its value apart."
    raise KimiLiteError(f"There is no option {word}.", hint)
