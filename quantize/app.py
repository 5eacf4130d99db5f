"""The quantize command behind its flags: settings in, lines to print out. Called by `quantize.__main__`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from quantize.convert import ConvertReport, convert, make_job, open_model
from quantize.imatrix import Importance, read_imatrix
from quantize.plan import describe_plan, make_plan
from quantize.recipe import Recipe, find_recipe, uniform_recipe, with_overrides
from quantize.sharding import parse_size
from quantize.verify import verify
from quantize.writer import OnProgress

_DEFAULT_TYPE = "q8_0"
_NUM_WORST = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """The flags as they were typed."""

    src: Path
    dst: Path
    recipe: str | None
    type_name: str | None
    tensor_types: tuple[str, ...]
    imatrix: Path | None
    split_size: str
    is_overwriting: bool


def run(settings: Settings, on_progress: OnProgress, is_dry: bool, is_verifying: bool) -> list[str]:
    """Does the work, or only describes it; returns what to tell the user. Raises KimiLiteError."""
    importance = read_imatrix(settings.imatrix) if settings.imatrix else None
    recipe, split_bytes = _choose_recipe(settings, importance), parse_size(settings.split_size)
    src, dst = settings.src.expanduser(), settings.dst.expanduser()
    if is_dry:
        model = open_model(src)
        plan = make_plan(model, recipe)
        job = make_job(model, plan, dst, settings.is_overwriting, split_bytes, importance)
        return [*describe_plan(plan, job.shards, dst.parent), *_note_lines(plan.notes)]
    report = convert(src, dst, recipe, on_progress, settings.is_overwriting, split_bytes, importance)
    lines = [*_note_lines(report.notes), *_report_lines(report)]
    return [*lines, verify(src, report.path, on_progress).summary] if is_verifying else lines


def _choose_recipe(settings: Settings, importance: Importance | None) -> Recipe:
    has_importance = importance is not None
    if settings.recipe and settings.type_name:
        raise KimiLiteError("--recipe and --type exclude each other.", "Of the two, --recipe spares all but the experts.")
    if settings.recipe:
        recipe = find_recipe(settings.recipe, has_importance)
    else:
        recipe = uniform_recipe(settings.type_name or _DEFAULT_TYPE, has_importance)
    return with_overrides(recipe, settings.tensor_types, has_importance)


def _note_lines(notes: tuple[str, ...]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _report_lines(report: ConvertReport) -> Iterator[str]:
    types = ", ".join(f"{count} {name}" for name, count in report.tensors_by_type.items())
    files = f"{len(report.paths)} files, first " if len(report.paths) > 1 else ""
    yield (
        f"{files}{report.path}: {report.num_bytes / 1e9:.3f} GB, {report.num_weights / 1e6:,.1f} M weights at "
        f"{report.bits_per_weight:.2f} bits, {report.num_tensors} tensors ({types}), {report.seconds:.1f} s"
    )
    worst = sorted(report.errors.items(), key=lambda item: -item[1])[:_NUM_WORST]
    if worst and worst[0][1]:
        yield "largest relative errors: " + ", ".join(f"{name} {error:.4f}" for name, error in worst)
