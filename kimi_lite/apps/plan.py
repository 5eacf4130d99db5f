"""`kimi-lite plan`: what would lie where and how fast it could be, before anything is downloaded or loaded. Only flags
live here.

    kimi-lite plan --model kimi-k2.5 --recipe tq1_0 --vram 24G --ram 256G -c 32K
    kimi-lite plan -m models/kimi-k2.5-tq1_0 --json

Exit code 2 where it cannot run; the plan is printed all the same, then need, have and what would do instead.
"""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kimi_lite.options import Options
from kimi_lite.units import SIZE_HELP, parse_size, parse_token_count

if TYPE_CHECKING:
    from kimi_lite.hardware.probe import Hardware
    from kimi_lite.plan.plan import Plan
    from kimi_lite.plan.subject import Choice, Subject

_WHAT, _MACHINE, _OUTPUT = "What to plan", "The machine", "Output"


def _option(*flags: str, help: str, panel: str, **more: object) -> typer.models.OptionInfo:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


ModelName = Annotated[
    str | None, _option("-m", "--model", help="GGUF, checkpoint folder, or a name. Default: kimi-k2.5.", panel=_WHAT)
]
Recipe = Annotated[
    str | None, _option("--recipe", help="Types, as quantize has them. Default: the finest that fits.", panel=_WHAT)
]
Context = Annotated[
    int | None,
    _option(
        "-c",
        "--ctx",
        help="Context in tokens, as 32K; 0: the model's.",
        panel=_WHAT,
        parser=parse_token_count,
        metavar="TOKENS",
    ),
]
KvDtype = Annotated[Literal["f32", "f16", "bf16", "q8"], _option("--kv-dtype", help="Type of the cache.", panel=_WHAT)]
Vision = Annotated[bool, _option("--vision/--no-vision", help="Count the model's eyes, if it has some.", panel=_WHAT)]
Vram = Annotated[
    str | None, _option("--vram", help=f"The GPU's memory, or a limit: {SIZE_HELP}. 0: no GPU.", panel=_MACHINE)
]
Ram = Annotated[
    str | None,
    _option("--ram", help="Memory, or a limit; more than this machine has: another machine.", panel=_MACHINE),
]
GpuExperts = Annotated[
    int | None, _option("--gpu-experts", help="Experts kept in VRAM, no more.", panel=_MACHINE, min=0)
]
Dense = Annotated[
    Literal["q8_0", "bf16", "file"], _option("--dense", help="What is dense, on the GPU.", panel=_MACHINE)
]
Device = Annotated[str | None, _option("--device", help="cpu: leave the GPU out.", panel=_MACHINE)]
Threads = Annotated[
    int | None, _option("-t", "--threads", help="CPU threads. Default: all cores.", panel=_MACHINE, min=1)
]
RamSpeed = Annotated[
    float | None, _option("--ram-speed", help="GB/s that memory really delivers.", panel=_MACHINE, min=0.1)
]
DiskSpeed = Annotated[
    float | None, _option("--disk-speed", help="GB/s that the disk really delivers.", panel=_MACHINE, min=0.01)
]
PcieSpeed = Annotated[
    float | None, _option("--pcie-speed", help="GB/s from memory to the GPU.", panel=_MACHINE, min=0.1)
]
Measure = Annotated[
    bool, _option("--measure", help="Measure memory and disk: two seconds, then remembered.", panel=_MACHINE)
]
AsJson = Annotated[bool, _option("--json", help="One JSON document.", panel=_OUTPUT)]


def main(
    model: ModelName = None,
    recipe: Recipe = None,
    context: Context = None,
    kv_dtype: KvDtype = "f16",
    vision: Vision = True,
    vram: Vram = None,
    ram: Ram = None,
    gpu_experts: GpuExperts = None,
    dense: Dense = "q8_0",
    device: Device = None,
    threads: Threads = None,
    ram_speed: RamSpeed = None,
    disk_speed: DiskSpeed = None,
    pcie_speed: PcieSpeed = None,
    measure: Measure = False,
    as_json: AsJson = False,
) -> None:
    """What would lie where, what is the first limit, and how fast it could be: before any download."""
    from kimi_lite.hardware.probe import described, probe
    from kimi_lite.plan.subject import check_recipe, find_subject

    vram_bytes = 0 if vram == "0" else parse_size(vram, "--vram") if vram else None
    ram_bytes = parse_size(ram, "--ram") if ram else None
    subject = find_subject(model, vision)
    check_recipe(subject, recipe)
    hardware = described(probe(subject.path, measure), ram_bytes, vram_bytes)
    speeds = {"ram": ram_speed, "disk": disk_speed, "pcie": pcie_speed}
    hardware = hardware.with_speeds("given", **{place: 1e9 * gb_s for place, gb_s in speeds.items() if gb_s})
    limits = Options(
        context_length=context,
        kv_dtype=kv_dtype,
        device=device,
        vram_bytes=vram_bytes or None,
        ram_bytes=ram_bytes,
        num_threads=threads,
        num_gpu_experts=gpu_experts,
        dense_type=dense,
    )
    plan, choices, chosen = _decide(subject, hardware, limits, recipe)
    if as_json:
        others = [{"recipe": choice.recipe, **choice.plan.to_json()} for choice in choices]
        typer.echo(json.dumps({"recipe": chosen, **plan.to_json(), "recipes": others}))
    else:
        _print(plan, choices, chosen, subject)
    plan.require()


def _decide(
    subject: "Subject", hardware: "Hardware", limits: Options, recipe: str | None
) -> "tuple[Plan, list[Choice], str | None]":
    """The plan, and those of all recipes where there is a choice; the chosen recipe's name."""
    from kimi_lite.plan.plan import make_plan
    from kimi_lite.plan.subject import best_choice, choices

    if subject.sizes:
        return make_plan(subject.sizes, hardware, limits), [], None
    named = make_plan(subject.sizes_in(recipe), hardware, limits) if recipe else None
    if named and named.verdict in ("fits", "tight"):
        return named, [], recipe
    every = list(choices(subject, hardware, limits))
    best = best_choice(every)
    return (named, every, recipe) if named else (best.plan, every, best.recipe)


def _print(plan: "Plan", choices: "list[Choice]", chosen: str | None, subject: "Subject") -> None:
    from kimi_lite.plan.subject import smaller_model
    from kimi_lite.plan.view import disk_warning, next_line, plan_lines, recipe_lines
    from kimi_lite.terminal import echo

    lines = plan_lines(plan)
    if not subject.sizes and (warning := disk_warning(plan)):
        lines.append(f"Disk      {warning}")
    if not plan.hardware.is_described and (line := next_line(plan, subject.origin, chosen, subject.is_checkpoint)):
        lines.append(line)
    if choices:
        lines += ["", *recipe_lines(choices, chosen or "")]
    if plan.refusal and not subject.sizes and (instead := smaller_model(plan.hardware, plan.limits)):
        lines += ["", f"What would run here: kimi-lite plan -m {instead[0]} --recipe {instead[1]}"]
    echo("\n".join(lines) + "\n" * bool(plan.refusal))
