"""`kimi-lite plan`: where weights and cache go, and how fast that is, before anything is downloaded or loaded. Only
flags live here.

    kimi-lite plan --model kimi-k2.5 --recipe tq1_0 --vram 24G --ram 256G -c 32K
    kimi-lite plan -m models/kimi-k2.5-tq1_0 --json

Exit code 2 where it cannot run; the plan is printed all the same, then need, have and what would do instead.
"""

import json
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from kimi_lite.commandline.flags import with_options
from kimi_lite.options import MACHINE, MODEL, OUTPUT, Options

if TYPE_CHECKING:
    from kimi_lite.hardware.machine import Hardware
    from kimi_lite.plan.subject import RecipePlan, Subject
    from kimi_lite.plan.types import Plan


def _option(*flags: str, help: str, panel: str, **more: object) -> typer.models.OptionInfo:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


Recipe = Annotated[
    str | None,
    _option("--recipe", help="Type of the routed experts. Default: the best that fits.", panel=MODEL),
]
Rest = Annotated[
    str | None, _option("--rest", help="Type of all but the routed experts. Default: the recipe's.", panel=MODEL)
]
NumCores = Annotated[
    int | None, _option("--cores", help="A hypothetical desktop CPU with this many cores.", panel=MACHINE, min=1)
]
NumSockets = Annotated[
    int | None,
    _option("--sockets", help="A hypothetical server with memory on so many sockets.", panel=MACHINE, min=1, max=64),
]
RamSpeed = Annotated[
    float | None,
    _option("--ram-speed", help="GB/s that RAM really delivers, all sockets together.", panel=MACHINE, min=0.1),
]
DiskSpeed = Annotated[
    float | None, _option("--disk-speed", help="GB/s that the disk really delivers.", panel=MACHINE, min=0.01)
]
PcieSpeed = Annotated[float | None, _option("--pcie-speed", help="GB/s from RAM to the GPU.", panel=MACHINE, min=0.1)]
Measure = Annotated[
    bool, _option("--measure", help="Measure RAM and disk: two seconds, then remembered.", panel=MACHINE)
]
AsJson = Annotated[bool, _option("--json", help="One JSON document.", panel=OUTPUT)]


@with_options("plan")
def main(
    options: Options,
    recipe: Recipe = None,
    rest: Rest = None,
    cores: NumCores = None,
    sockets: NumSockets = None,
    ram_speed: RamSpeed = None,
    disk_speed: DiskSpeed = None,
    pcie_speed: PcieSpeed = None,
    measure: Measure = False,
    as_json: AsJson = False,
) -> None:
    """Where weights and cache go, and what limits speed: before any download."""
    from kimi_lite.engine.device import named_devices, require_gpus
    from kimi_lite.hardware.machine import described, gpu_index_of
    from kimi_lite.hardware.probe import probe
    from kimi_lite.hub.names import is_hub_name
    from kimi_lite.hub.resolve import find_hub_subject
    from kimi_lite.plan.subject import check_recipe, find_subject

    numbers = [gpu_index_of(name) for name in named_devices(options.devices)]
    if options.vram_bytes is None or (len(numbers) > 1 and not isinstance(options.vram_bytes, tuple)):
        require_gpus(options.devices)  # else --vram describes them
    is_on_hub = is_hub_name(options.model or "")
    can_see = options.vision != "off"
    if is_on_hub:
        subject = find_hub_subject(options.model, can_see)
    else:
        subject = find_subject(options.model, can_see, options.mmproj)
    check_recipe(subject, recipe or rest)
    here = probe(subject.path, measure, numbers)
    hardware = described(here, options.ram_bytes, options.vram_bytes, cores, sockets)
    speeds = {"ram": ram_speed, "disk": disk_speed, "pcie": pcie_speed}
    hardware = hardware.with_speeds("given", **{place: 1e9 * gb_s for place, gb_s in speeds.items() if gb_s})
    decided = _decide(subject, hardware, options, recipe, rest)
    if as_json:
        others = [{"recipe": choice.recipe, **choice.plan.to_json()} for choice in decided.choices]
        typer.echo(json.dumps({"recipe": decided.recipe, **decided.plan.to_json(), "recipes": others}))
    else:
        _print(decided, subject, is_named=recipe is not None, rest=rest)
    decided.plan.require()


class Decided(NamedTuple):
    """The plan, the recipe it is for (None for a file), and the plans of all recipes where there is a choice."""

    plan: "Plan"
    recipe: str | None
    choices: "list[RecipePlan]"


def _decide(
    subject: "Subject", hardware: "Hardware", options: Options, recipe: str | None, rest: str | None
) -> Decided:
    from kimi_lite.plan.plan import make_plan
    from kimi_lite.plan.subject import best_choice, choices, plan_in

    if subject.sizes:
        return Decided(make_plan(subject.sizes, hardware, options), None, [])
    named = plan_in(subject, recipe, hardware, options, rest) if recipe else None
    if named and named.verdict in ("fits", "tight"):
        return Decided(named, recipe, [])
    every = list(choices(subject, hardware, options, rest))
    if named:
        return Decided(named, recipe, every)
    best = best_choice(every)
    return Decided(best.plan, best.recipe, every)


def _print(decided: Decided, subject: "Subject", is_named: bool, rest: str | None) -> None:
    from kimi_lite.plan.subject import smaller_model
    from kimi_lite.plan.view import command_lines, limit_flags, next_line, plan_lines, recipe_lines
    from kimi_lite.terminal import echo, width

    plan, columns = decided.plan, width()
    lines = plan_lines(plan, columns)
    if not plan.hardware.is_described and (
        line := next_line(plan, subject.origin, decided.recipe, subject.is_checkpoint, rest)
    ):
        lines += command_lines("Next", line, columns)
    if decided.choices:
        lines += ["", *recipe_lines(decided.choices, decided.recipe or "", is_named, columns)]
    refusals = [choice.plan.refusal for choice in decided.choices]
    is_runnable = any(not refusal or refusal.has_flags for refusal in refusals)
    if plan.refusal and not (subject.sizes or is_runnable) and (instead := smaller_model(plan.hardware, plan.limits)):
        cores = f" --cores {plan.hardware.num_cores}" if plan.hardware.has_assumed_cpu else ""
        cores += f" --sockets {len(plan.hardware.nodes)}" if cores and plan.hardware.nodes else ""
        command = f"kimi-lite plan {instead}{limit_flags(plan)}{cores}"
        lines += ["", *command_lines("Instead", command, columns)]
    echo("\n".join(lines) + "\n" * bool(plan.refusal))
