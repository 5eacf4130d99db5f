"""A plan as people read it: the tables of `kimi-lite plan`, the few lines above a chat, the verdict under `quantize
--dry-run`.

Everything fits 80 columns. Memory is in GiB, speeds are in GB/s and tokens/s; an assumed speed carries a star.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from kimi_lite import __version__
from kimi_lite.arch.costs import decode_cost
from kimi_lite.plan.speed import Rate
from kimi_lite.plan.subject import Choice
from kimi_lite.plan.types import EXPERTS, MARGIN, Place, Plan
from kimi_lite.units import GIB, gib

_WIDTH, _LABEL = 80, 10
_NAMES = {"ram": "RAM", "vram": "VRAM", "pcie": "PCIe", "disk": "disk"}
_NAMED_SHARE = 0.02  # of a place: parts of the panel that are smaller go together
_PANEL_PARTS = {"dense weights": "dense", "KV cache": "KV", "pinned buffers": "pinned", "expert slots": "experts"}


def plan_lines(plan: Plan) -> list[str]:
    """Machine, what lies where, speeds, verdict."""
    sizes = plan.sizes
    head = f"{sizes.config.name} · {sizes.label} · {gib(sizes.total_bytes)} of weights"
    return [head, "", *_machine_lines(plan), "", *place_lines(plan), "", *_speed_lines(plan), *_verdict_lines(plan)]


def recipe_lines(choices: Sequence[Choice], chosen: str) -> list[str]:
    """What the other recipes would give on the same machine."""
    lines = [f"  {'recipe':<14}{'experts':>13}{'weights':>13}   {'':<11}{'tokens/s at most':>17}"]
    for recipe, plan in ((choice.recipe, choice.plan) for choice in choices):
        mark = "*" if recipe == chosen else " "
        speed = "-" if plan.refusal else _rate(plan.decode.tok_s)
        sizes = f"{gib(plan.sizes.expert_bytes):>13}{gib(plan.sizes.total_bytes):>13}"
        lines.append(f"{mark} {recipe:<14}{sizes}   {plan.verdict:<11}{speed:>17}")
    return [*lines, f"* {chosen}: planned above"]


def start_panel(plan: Plan, *more: str) -> list[str]:
    """The lines above a chat: model, what lies where, context and ceiling; `more` joins the last line (thinking,
    sampling)."""
    sizes = plan.sizes
    lines = [f"kimi-lite {__version__} · {sizes.config.name} · {sizes.label} · {gib(sizes.total_bytes)}"]
    if plan.is_on_gpu and plan.hardware.gpu:
        lines += _wrap("  GPU", f"{plan.hardware.gpu.name}: {_parts(plan, 'VRAM')}", 7)
    lines += _wrap("  RAM", f"{gib(plan.have_bytes('RAM'))} {_source(plan, 'RAM')}: {_parts(plan, 'RAM')}", 7)
    if plan.disk_expert_bytes:
        disk = plan.rates.disk
        lines += _wrap("  disk", f"{gib(plan.disk_expert_bytes)} of experts stay there: {_gb_s(disk)} {disk.origin}", 7)
    place = {"VRAM bandwidth": "vram", "disk": "disk"}.get(plan.decode.limit, "ram")
    rate: Rate = getattr(plan.rates, place)
    ceiling = f"ceiling {_rate(plan.decode.tok_s)} tok/s at {_gb_s(rate)} {_NAMES[place]} ({rate.origin})"
    return [*lines, *_wrap("  ", " · ".join([f"context {plan.context_length:,}", *more, ceiling]), 2)]


def verdict_line(plan: Plan) -> str:
    """One line for other commands: whether the model would run on the machine, and how fast at most."""
    if plan.refusal:
        return f"here it would not run: {plan.refusal.problem}"
    speed = f"at most {_rate(plan.decode.tok_s)} tokens/s ({plan.decode.limit})"
    if plan.verdict == "from disk":
        return f"here {gib(plan.disk_expert_bytes)} of its experts would come from disk: {speed}"
    return (
        f"here it {'fits, but tightly' if plan.verdict == 'tight' else 'fits'}, context "
        f"{plan.context_length:,}: {speed}"
    )


def _machine_lines(plan: Plan) -> Iterator[str]:
    hardware = plan.hardware
    isa = f", {hardware.isa}" if hardware.isa else ""
    whose = "another machine than this one, " if hardware.is_described else ""
    yield from _wrap("Machine", f"{whose}{hardware.cpu_name}, {plan.num_threads} threads{isa}")
    yield from _wrap(
        "", f"RAM {_total_and_free(hardware.ram_total_bytes, hardware.ram_free_bytes)}{_flag(plan, 'RAM')}"
    )
    if gpu := hardware.gpu:
        remark = _flag(plan, "VRAM") if plan.is_on_gpu else ", not used"
        yield from _wrap("", f"{gpu.name}: {_total_and_free(gpu.vram_total_bytes, gpu.vram_free_bytes)}{remark}")
    else:
        yield from _wrap("", "no GPU: everything runs on the CPU")
    if disk := hardware.disk:
        yield from _wrap("", f"disk {gib(disk.free_bytes)} free at {short_folder(disk.path)}")


def place_lines(plan: Plan) -> Iterator[str]:
    """A row a thing, then the sum."""
    for place in ("VRAM", "RAM", "disk"):
        rows = [row for row in plan.rows if row.place == place]
        for row in rows:
            label = place if row is rows[0] else ""
            yield f"{label:<{_LABEL}}{row.part:<18}{gib(row.num_bytes):>12}{_remark(plan, row.place, row.part)}"
        if place != "disk" and rows:
            of = f" of {gib(plan.have_bytes(place))} {_source(plan, place)}"
            yield f"{'':<{_LABEL}}{'all':<18}{gib(plan.place_bytes(place)):>12}{of}"


def _remark(plan: Plan, place: Place, part: str) -> str:
    sizes = plan.sizes
    if part == "expert slots":
        return f"   {plan.num_vram_slots:,} of {sizes.num_experts:,} experts, copies"
    if part == "KV cache":
        return f"   {plan.context_length:,} tokens in {plan.limits.kv_dtype}"
    if (place, part) == ("RAM", EXPERTS) and plan.disk_expert_bytes:
        return f"   {plan.ram_expert_bytes / sizes.expert_bytes:.0%} of {gib(sizes.expert_bytes)}"
    if part == EXPERTS and place == "disk":
        return "   read when they are chosen"
    return ""


def _speed_lines(plan: Plan) -> Iterator[str]:
    yield from _wrap("A token", f"reads {_token_text(plan)}")
    decode, full = plan.decode, plan.decode_full
    later = f"; {_rate(full.tok_s)} at the end of the context" if _rate(full.tok_s) != _rate(decode.tok_s) else ""
    yield from _wrap("Decode", f"at most {_rate(decode.tok_s)} tokens/s, by {decode.limit}{later}")
    if plan.expected:
        low, high = map(_rate, plan.expected.tok_s)
        hits = " to ".join(f"{share:.0%}" for share in plan.expected.hit_share)
        where = f"the {plan.num_vram_slots:,} slots" if plan.num_vram_slots else "RAM"
        found = f"{hits} of the chosen experts are found in {where}, as in published runs of others"
        yield from _wrap("", f"{low} to {high} if {found}")
    alone = ""
    if plan.expert_pass_s:
        each = f"{plan.prompt_chunk_tokens:,} tokens in each pass of {plan.expert_pass_s:.1f} s"
        alone = f"; over PCIe alone {_rate(plan.prompt_chunk_tokens / plan.expert_pass_s)}: {each}"
    yield from _wrap("Prompt", f"at most {_rate(plan.prompt.tok_s)} tokens/s, by {plan.prompt.limit}{alone}")
    yield from _wrap("Speeds", _rates_text(plan))


def _token_text(plan: Plan) -> str:
    """The bytes that decoding reads from each place."""
    cost = decode_cost(plan.sizes, 0, 0, is_on_gpu=plan.is_on_gpu)
    rest, rest_place = f"{cost.resident_bytes / 1e9:.2f} GB of the rest", "VRAM" if plan.is_on_gpu else "RAM"
    if not plan.sizes.num_experts:
        return f"{rest} from {rest_place}"
    expert_place = "VRAM" if plan.num_vram_slots == plan.sizes.num_experts else "RAM"
    from_place = "" if expert_place == rest_place else f" from {expert_place}"
    return f"{cost.expert_bytes / 1e9:.2f} GB of experts{from_place} and {rest} from {rest_place}"


def _rates_text(plan: Plan) -> str:
    names = ["ram", *(["vram", "pcie"] if plan.is_on_gpu else []), *(["disk"] if plan.disk_expert_bytes else [])]
    rates: dict[str, Rate] = {name: getattr(plan.rates, name) for name in names}
    known = ", ".join(f"{_NAMES[name]} {_gb_s(rate)}{_star(rate)}" for name, rate in rates.items())
    products = plan.rates.cpu_products
    text = f"{known}, CPU {products.per_s / 1e9:,.0f} G products/s{_star(products)}"
    assumed = [name for name, rate in rates.items() if rate.origin == "assumed"]
    if not assumed and products.origin != "assumed":
        return text
    help_text = "--measure measures, --ram-speed 60 says better" if "ram" in assumed else "typical for a desk"
    return f"{text} (* assumed: {help_text})"


def _verdict_lines(plan: Plan) -> Iterator[str]:
    if plan.refusal:
        yield from _wrap("Verdict", "it cannot run")
        return
    yield from _wrap("Limit", plan.first_limit)
    spare = gib(plan.have_bytes("RAM") - plan.place_bytes("RAM"))
    texts = {
        "fits": f"fits, {spare} of RAM to spare beyond the margin",
        "tight": f"fits tightly, {spare} of RAM to spare beyond the margin",
        "from disk": f"runs, with {gib(plan.disk_expert_bytes)} of experts on disk",
    }
    yield from _wrap("Verdict", texts[plan.verdict])


def next_line(plan: Plan, origin: str, recipe: str | None, is_checkpoint: bool) -> str:
    """The command that does what was planned; empty for a model that is not here."""
    if is_checkpoint:
        return f"Next      kimi-lite quantize {origin} OUT.gguf --recipe {recipe}"
    if recipe or plan.refusal:
        return ""
    limits = plan.limits
    flags = [f"-c {plan.context_length}", f"--kv-dtype {limits.kv_dtype}" if limits.kv_dtype != "f16" else ""]
    flags += [f"--ram {limits.ram_bytes / GIB:g}G" if limits.ram_bytes else ""]
    flags += [f"--vram {limits.vram_bytes / GIB:g}G" if limits.vram_bytes else ""]
    return f"Next      kimi-lite chat -m {origin} {' '.join(filter(None, flags))}"


def disk_warning(plan: Plan) -> str:
    """Where the model is not here yet and its disk has no room for it; else empty."""
    disk, need_bytes = plan.hardware.disk, plan.sizes.total_bytes
    if plan.hardware.is_described or not disk or disk.free_bytes >= need_bytes:
        return ""
    return f"the file needs {gib(need_bytes)} of disk, and {gib(disk.free_bytes)} are free at {short_folder(disk.path)}"


def short_folder(path: Path) -> str:
    """The folder of a file, short."""
    folder = path.parent if path.suffix in (".gguf", ".safetensors") else path
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _parts(plan: Plan, place: Place) -> str:
    """The rows of a place in one line, small ones together."""
    rows = [row for row in plan.rows if row.place == place and row.part != MARGIN]
    large = [row for row in rows if row.num_bytes >= _NAMED_SHARE * sum(row.num_bytes for row in rows)]
    small_bytes = sum(row.num_bytes for row in rows if row not in large)
    parts = [(_PANEL_PARTS.get(row.part, row.part), row.num_bytes) for row in large]
    parts += [("other", small_bytes)] if small_bytes else []
    slots = f" ({plan.num_vram_slots:,} slots)" if place == "VRAM" and plan.num_vram_slots else ""
    return f"{' + '.join(f'{name} {num_bytes / GIB:,.1f}' for name, num_bytes in parts)} GiB{slots}"


def _flag(plan: Plan, place: Place) -> str:
    budget = next((budget for budget in plan.budgets if budget.place == place), None)
    return f", {budget.source} allows {gib(budget.have_bytes)}" if budget and budget.source != "free" else ""


def _source(plan: Plan, place: Place) -> str:
    source = next(budget.source for budget in plan.budgets if budget.place == place)
    return source if source == "free" else f"({source})"


def _total_and_free(total_bytes: int, free_bytes: int) -> str:
    return f"{gib(total_bytes)} ({gib(free_bytes).removesuffix(' GiB')} free)"


def _rate(tok_s: float) -> str:
    return f"{tok_s:,.1f}" if tok_s < 100 else f"{tok_s:,.0f}"


def _gb_s(rate: Rate) -> str:
    return f"{rate.per_s / 1e9:,.1f} GB/s" if rate.per_s < 10e9 else f"{rate.per_s / 1e9:,.0f} GB/s"


def _star(rate: Rate) -> str:
    return "*" if rate.origin == "assumed" else ""


def _wrap(label: str, text: str, indent: int = _LABEL) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{label:<{indent}}", subsequent_indent=" " * indent)
