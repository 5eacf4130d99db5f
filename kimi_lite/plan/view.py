"""A plan as people read it: the tables of `kimi-lite plan`, the few lines above a chat, the verdict under `quantize
--dry-run`.

Lines are as wide as they are asked to be, from 40 columns on, and break between words. Memory is in GiB, speeds are in
GB/s and tokens/s; an assumed speed carries a star. Two numbers tell how fast: what is `expected`, and the `limit`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.cells import cell_len

from kimi_lite import __version__
from kimi_lite.arch.costs import decode_cost
from kimi_lite.plan.nodes import describe_nodes, explain_use
from kimi_lite.plan.quality import REST_NATS, describe
from kimi_lite.plan.speed import Forecast, Rate
from kimi_lite.plan.subject import RecipePlan, explain_choice
from kimi_lite.plan.types import DENSE, EXPERTS, KV, MARGIN, PINNED, SLOTS, Budget, GpuPart, MemoryRow, Place, Plan
from kimi_lite.units import GIB, gib

WIDTH, NARROWEST = 80, 40
_NAMES = {"ram": "RAM", "vram": "VRAM", "pcie": "PCIe", "disk": "disk"}
_NAMED_SHARE = 0.02  # of a place: parts of the panel that are smaller go together
_PANEL_PARTS = {DENSE: "dense", KV: "KV", PINNED: "pinned"}
_NOT_EXPERTS = "^(?!.*_exps)"  # names of tensors, for quantize
_LEAST_GAIN = 0.05  # of a coarser type: less is not worth a word
_LEAST_HITS = 0.01  # of the chosen experts: fewer are not worth a word
# Of the table of recipes: title, width, and whether a terminal of 40, 60 or 80 columns shows it.
_COLUMNS = (
    *(("", -16, 40), ("loss", 6, 60), ("experts", 8, 80), ("file", 7, 60), ("", -11, 40), ("expected", 8, 40)),
    *(("limit", 6, 60),),
)


def plan_lines(plan: Plan, width: int = WIDTH) -> list[str]:
    """Machine, what lies where, speeds, verdict."""
    sizes = plan.sizes
    head = f"{sizes.config.name} · {sizes.label} · {gib(sizes.total_bytes)} of weights"
    machine, places, ends = _machine_lines(plan, width), place_lines(plan, width), _ending_lines(plan, width)
    return [*wrap("", head, width, 0), "", *machine, "", *places, "", *_choice_lines(plan, width), *ends]


def recipe_lines(choices: Sequence[RecipePlan], chosen: str, is_named: bool, width: int = WIDTH) -> list[str]:
    """What each type of the routed experts would give on the same machine, and why one was taken."""

    def row(cells: Sequence[str]) -> str:
        shown = zip(_COLUMNS, cells, strict=True)
        aligned = (
            f"{cell:<{-size}}" if size < 0 else f"{cell:>{size}}"
            for (_, size, at), cell in shown
            if at <= max(width, NARROWEST)
        )
        return " ".join(aligned).rstrip()

    head = "Types of the routed experts. loss: KL divergence, measured on the demo model; sizes in GiB; tokens/s"
    lines = [*wrap("", head, width, 0), row([title for title, _, _ in _COLUMNS])]
    for choice in choices:
        plan, sizes = choice.plan, choice.plan.sizes
        name = f"{'*' if choice.recipe == chosen else ' '} {choice.recipe}{'+' if choice.needs_ggml else ''}"
        speeds = ("-", "-") if plan.refusal else (_rate(plan.decode.expected_tok_s), _rate(plan.decode.limit_tok_s))
        memory = (f"{sizes.expert_bytes / GIB:,.1f}", f"{sizes.total_bytes / GIB:,.1f}")
        verdict = "needs flags" if plan.refusal and plan.refusal.has_flags else plan.verdict
        lines.append(row([name, describe(choice.recipe, choice.is_exact), *memory, verdict, *speeds]))
    lines += wrap("*", "named: planned above" if is_named else explain_choice(choices, chosen), width, 2)
    if any(choice.plan.refusal and choice.plan.refusal.has_flags for choice in choices):
        lines += wrap("", "needs flags: it runs with what this command proposes when --recipe names it", width, 2)
    if any(choice.needs_ggml for choice in choices):
        lines += wrap("+", "kimi-lite quantize needs pip install 'kimi-lite[ggml]' for it", width, 2)
    return lines


def start_panel(plan: Plan, *more: str, width: int = WIDTH) -> list[str]:
    """The lines above a chat: model, what lies where, context and speed; `more` joins the last line (thinking,
    sampling)."""
    sizes = plan.sizes
    head = f"kimi-lite {__version__} · {sizes.config.name} · {sizes.label} · {gib(sizes.total_bytes)}"
    lines = wrap("", head, width, 0)
    for number, part in enumerate(plan.gpu_parts):
        label = "  GPU" if len(plan.gpu_parts) == 1 else f"  GPU {number}"
        text = f"{plan.hardware.gpus[number].name}: {_parts(plan, 'VRAM', number)}{_layers_of(plan, part)}"
        lines += wrap(label, text, width, 7 if len(plan.gpu_parts) == 1 else 9)
    ram = plan.budget_of("RAM")
    lines += wrap("  RAM", f"{gib(ram.have_bytes)} {_source(ram)}: {_parts(plan, 'RAM')}", width, 7)
    if plan.disk_expert_bytes:
        disk = plan.rates.disk
        text = f"{gib(plan.disk_expert_bytes)} of experts stay there: {_gb_s(disk)} {disk.origin}"
        lines += wrap("  disk", text, width, 7)
    return [*lines, *wrap("  ", " · ".join([f"context {plan.context_length:,}", *more, speed_text(plan)]), width, 2)]


def speed_text(plan: Plan) -> str:
    """`expected 12.3 tok/s, limit 15.2 (RAM 80 GB/s, assumed)`."""
    place = {"VRAM bandwidth": "vram", "disk": "disk"}.get(plan.decode.bottleneck, "ram")
    rate: Rate = getattr(plan.rates, place)
    return f"{_forecast(plan.decode, 'tok/s')} ({_NAMES[place]} {_gb_s(rate)}, {rate.origin})"


def verdict_line(plan: Plan) -> str:
    """One line for other commands: whether the model would run on the machine, and how fast."""
    if plan.refusal:
        return f"here it would not run: {plan.refusal.problem}"
    speed = f"{_forecast(plan.decode, 'tokens/s')} ({plan.decode.bottleneck})"
    if plan.verdict == "from disk":
        return f"here {gib(plan.disk_expert_bytes)} of its experts would come from disk: {speed}"
    fits = "fits, but tightly" if plan.verdict == "tight" else "fits"
    return f"here it {fits}, context {plan.context_length:,}: {speed}"


def place_lines(plan: Plan, width: int = WIDTH) -> Iterator[str]:
    """A row a thing, then the sum."""
    label = _label_width(width)
    for place, gpu in [*(("VRAM", number) for number in range(len(plan.gpu_parts))), ("RAM", 0), ("disk", 0)]:
        rows = [row for row in plan.rows if (row.place, row.gpu) == (place, gpu)]
        entries = [(row.part, row.num_bytes, _remark(plan, row)) for row in rows]
        if place != "disk" and rows:
            budget = plan.budget_of(place, gpu)
            text = f"of {gib(budget.have_bytes)} {_source(budget)}"
            if place == "VRAM":
                text += _layers_of(plan, plan.gpu_parts[gpu])
            entries.append(("total", plan.budget_bytes(budget), text))
        for number, (part, num_bytes, remark) in enumerate(entries):
            line = f"{plan.name_of(place, gpu) if number == 0 else '':<{label}}{part:<18}{gib(num_bytes):>11}"
            if not remark or len(line) + 2 + cell_len(remark) <= width:
                yield f"{line}  {remark}".rstrip()
            else:
                yield line
                yield from wrap("", remark, width, label + 2)


def next_line(plan: Plan, origin: str, recipe: str | None, is_checkpoint: bool, rest: str | None = None) -> str:
    """The command that does what was planned; empty for a model that is not here, or a plan that cannot be. `rest`: the
    type of all but the routed experts, where it is not the recipe's."""
    if plan.refusal:
        return ""
    if is_checkpoint:
        others = f" --tensor-type '{_NOT_EXPERTS}={rest}'" if rest else ""
        return f"kimi-lite quantize {origin} OUT.gguf --recipe {recipe}{others}"
    if recipe:
        return ""
    return f"kimi-lite chat -m {origin} -c {plan.context_length}{limit_flags(plan)}"


def limit_flags(plan: Plan) -> str:
    """The flags that the plan was made with, for another command: types of the cache and in VRAM, memory, device."""
    limits = plan.limits
    flags = [f"--kv-dtype {limits.kv_dtype}" if limits.kv_dtype != "f16" else ""]
    for name, limit in (("ram", limits.ram_bytes), ("vram", limits.vram_bytes)):
        sizes = limit if isinstance(limit, tuple) else (limit,)
        text = "+".join(f"{num_bytes / GIB:g}G" if num_bytes else "0" for num_bytes in sizes)
        flags.append("" if limit is None else f"--{name} {text}")
    flags.append(f"--device {limits.device}" if limits.device else "")
    flags.append(f"--dense {limits.dense_type}" if limits.dense_type != "auto" else "")
    flags.append(f"--numa {limits.numa}" if limits.numa != "auto" else "")
    return "".join(f" {flag}" for flag in flags if flag)


def labelled(label: str, text: str, width: int = WIDTH) -> list[str]:
    """A line of the plan's form: `label` in the first column, `text` after it."""
    return wrap(label, text, width, _label_width(width))


def command_lines(label: str, command: str, width: int = WIDTH) -> list[str]:
    """A command that can be copied: lines that go on end in a backslash."""
    indent = _label_width(width)
    *lines, last = wrap(label, command, width - 2, indent)
    return [*(f"{line} \\" for line in lines), last]


def short_folder(path: Path) -> str:
    """The folder of a file, short."""
    folder = path.parent if path.suffix in (".gguf", ".safetensors") else path
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _machine_lines(plan: Plan, width: int) -> Iterator[str]:
    hardware = plan.hardware
    isa = f", {hardware.isa}" if hardware.isa else ""
    threads = f"{plan.num_threads} thread{'s' if plan.num_threads > 1 else ''}"
    cpu = f"{hardware.cpu_name}, {threads}{isa}"
    if hardware.has_assumed_cpu:
        cpu = f"hypothetical: {hardware.cpu_name}" + (f", {threads}" if plan.limits.num_threads else "")
    elif hardware.is_described:
        cpu = f"hypothetical: this one with more memory; {cpu}"
    yield from labelled("Machine", cpu, width)
    ram = f"RAM {_total_and_free(hardware.ram_total_bytes, hardware.ram_free_bytes)}{_flag(plan, 'RAM')}"
    yield from labelled("", ram, width)
    if hardware.has_nodes:
        yield from labelled("", describe_nodes(hardware), width)
    for number, gpu in enumerate(hardware.gpus):
        remark = _flag(plan, "VRAM", number) if plan.is_on_gpu else ", not used"
        text = f"{gpu.name}: {_total_and_free(gpu.vram_total_bytes, gpu.vram_free_bytes)}{remark}"
        yield from labelled("", text, width)
    if not hardware.gpus:
        yield from labelled("", "no GPU: everything runs on the CPU", width)
    if (disk := hardware.disk) and not hardware.is_described:
        yield from labelled("", f"disk {gib(disk.free_bytes)} free at {short_folder(disk.path)}", width)
    for warning in plan.warnings:
        yield from labelled("", warning, width)


def _choice_lines(plan: Plan, width: int) -> Iterator[str]:
    """The type of the dense weights, where it costs quality or another would bring speed."""
    if plan.refusal:
        return
    if finer := plan.finer:
        old, new = finer.dense_type.upper(), plan.dense_type.upper()
        text = f"encoded as {new} while loading, as {old} does not fit; {_loss(plan.dense_type)}"
        yield from labelled("Dense", text, width)
    elif coarser := plan.coarser:
        gain = coarser.decode.expected_tok_s / plan.decode.expected_tok_s - 1
        if gain >= _LEAST_GAIN:
            kind = coarser.dense_type
            yield from labelled("Faster", f"--dense {kind}: {gain:.0%} more tokens/s expected; {_loss(kind)}", width)


def _loss(dense_type: str) -> str:
    return f"the demo model loses {REST_NATS[dense_type]:.3f} nats by it"


def _layers_of(plan: Plan, part: GpuPart) -> str:
    """Where several GPUs share them: `, layers 0 to 30`."""
    return f", layers {part.layers.start} to {part.layers.stop - 1}" if len(plan.gpu_parts) > 1 else ""


def _remark(plan: Plan, row: MemoryRow) -> str:
    sizes, num_sequences, place, part = plan.sizes, plan.situation.num_running, row.place, row.part
    if (place, part) == ("VRAM", DENSE):
        size = sizes.gpu[plan.dense_type]
        return "in " + " + ".join(name for name, taken in size.bytes_by_type if taken > 0.1 * size.num_bytes)
    if part == SLOTS:
        own, config = plan.gpu_parts[row.gpu], sizes.config
        num_experts = config.num_experts * sum(layer >= config.num_dense_layers for layer in own.layers)
        return f"{own.num_slots:,} of {num_experts:,} experts"
    if part == KV:
        tokens = f"{plan.context_length:,} tokens in {plan.limits.kv_dtype}"
        return f"{num_sequences} x {tokens}" if num_sequences > 1 else tokens
    if (place, part) == ("RAM", EXPERTS) and plan.has_ram_slots:
        share = f"{plan.ram_expert_bytes / sizes.expert_bytes:.0%} of {gib(sizes.expert_bytes)}"
        return f"{share}, without those cached in VRAM" if plan.num_vram_slots else share
    if (place, part) == ("disk", EXPERTS):
        return "read when they are chosen"
    return ""


def _ending_lines(plan: Plan, width: int) -> Iterator[str]:
    """Speeds and verdict; a plan that cannot be has no speeds."""
    if plan.refusal:
        how = " like this; what to try stands below" if plan.refusal.has_flags else ""
        yield from labelled("Verdict", f"it cannot run{how}", width)
        return
    decode, full = plan.decode, plan.decode_full
    yield from labelled("A token", f"reads {_token_text(plan)}", width)
    yield from labelled("Decode", f"{_forecast(decode, 'tokens/s')} (bottleneck: {decode.bottleneck})", width)
    if _rate(full.expected_tok_s) != _rate(decode.expected_tok_s):
        yield from labelled("", f"at the end of the context {_forecast(full, 'tokens/s')}", width)
    if decode.hit_share >= _LEAST_HITS:
        where = f"the {plan.num_vram_slots:,} cached in VRAM" if plan.num_vram_slots else "RAM"
        text = (
            f"of the chosen experts {decode.hit_share:.0%} are expected in {where}, {decode.best_hit_share:.0%} at best"
        )
        yield from labelled("", f"{text} (published runs of others)", width)
    yield from labelled("Prompt", f"{_forecast(plan.prompt, 'tokens/s')} (bottleneck: {plan.prompt.bottleneck})", width)
    yield from labelled("Speeds", _rates_text(plan), width)
    if plan.hardware.has_nodes:
        yield from labelled("Nodes", explain_use(plan.hardware, plan.memory_use, plan.node_bytes), width)
    spare = gib(plan.have_bytes("RAM") - plan.place_bytes("RAM"))
    texts = {
        "fits": f"fits; {spare} of RAM are left after the safety margin",
        "tight": f"fits tightly; {spare} of RAM are left after the safety margin",
        "from disk": f"runs, with {gib(plan.disk_expert_bytes)} of experts on disk",
    }
    yield from labelled("Verdict", texts[plan.verdict], width)


def _forecast(forecast: Forecast, unit: str) -> str:
    return f"expected {_rate(forecast.expected_tok_s)} {unit}, limit {_rate(forecast.limit_tok_s)}"


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
    macs = plan.rates.cpu_macs
    text = f"{known}, CPU {macs.per_s / 1e9:,.0f} GMAC/s (int8){_star(macs)}"
    if macs.origin != "assumed" and all(rate.origin != "assumed" for rate in rates.values()):
        return text
    better = "; --ram-speed 60 sets another" if rates["ram"].origin == "assumed" else ""
    kind = "server" if plan.hardware.has_assumed_cpu and plan.hardware.nodes else "desktop"
    return f"{text} (* assumed: typical {kind}{better})"


def _parts(plan: Plan, place: Place, gpu: int = 0) -> str:
    """The rows of a place in one line, small ones together."""
    rows = [row for row in plan.rows if (row.place, row.gpu) == (place, gpu) and row.part != MARGIN]
    large = [row for row in rows if row.num_bytes >= _NAMED_SHARE * sum(row.num_bytes for row in rows)]
    small_bytes = sum(row.num_bytes for row in rows if row not in large)
    parts = [(_PANEL_PARTS.get(row.part, row.part), row.num_bytes) for row in large]
    parts += [("other", small_bytes)] if small_bytes >= 0.05 * GIB or not parts else []
    num_slots = plan.gpu_parts[gpu].num_slots if place == "VRAM" else 0
    slots = f" ({num_slots:,} experts)" if num_slots else ""
    named = [(name, f"{num_bytes / GIB:,.1f}") for name, num_bytes in parts]
    told = [f"{name} {size}" for name, size in named if size != "0.0"] or [gib(sum(size for _, size in parts))]
    return f"{' + '.join(told)}{' GiB' if any(size != '0.0' for _, size in named) else ''}{slots}"


def _flag(plan: Plan, place: Place, gpu: int = 0) -> str:
    budget = plan.budget_of(place, gpu)
    return "" if budget.source == "free" else f", {budget.source} allows {gib(budget.have_bytes)}"


def _source(budget: Budget) -> str:
    return budget.source if budget.source == "free" else f"({budget.source})"


def _total_and_free(total_bytes: int, free_bytes: int) -> str:
    return f"{gib(total_bytes)} ({gib(free_bytes).removesuffix(' GiB')} free)"


def _rate(tok_s: float) -> str:
    return f"{tok_s:,.1f}" if tok_s < 100 else f"{tok_s:,.0f}"


def _gb_s(rate: Rate) -> str:
    return f"{rate.per_s / 1e9:,.1f} GB/s" if rate.per_s < 10e9 else f"{rate.per_s / 1e9:,.0f} GB/s"


def _star(rate: Rate) -> str:
    return "*" if rate.origin == "assumed" else ""


def _label_width(width: int) -> int:
    return 10 if width >= 60 else 8


def wrap(label: str, text: str, width: int, indent: int) -> list[str]:
    """Words of `text` in lines of at most `width` columns after `label`, which has `indent` columns, as have the lines
    that follow; one word that is longer alone is a line of its own."""
    lines, line = [], f"{label:<{indent}}"
    is_begun = False
    for word in text.split():
        if is_begun and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line, is_begun = " " * indent, False
        line += f" {word}" if is_begun else word
        is_begun = True
    return [*lines, line.rstrip()]
