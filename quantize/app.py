"""The quantize command behind its flags: settings in, lines to print out. Called by `quantize.__main__`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_lite.errors import KimiLiteError
from quantize.budget import fit_recipe, parse_budget
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
    fit: str | None = None


def run(settings: Settings, on_progress: OnProgress, is_dry: bool, is_verifying: bool) -> list[str]:
    """Does the work, or only describes it; returns what to tell the user. Raises KimiLiteError."""
    importance = read_imatrix(settings.imatrix) if settings.imatrix else None
    split_bytes = parse_size(settings.split_size)
    src, dst = settings.src.expanduser(), settings.dst.expanduser()
    model = open_model(src)
    fit = fit_recipe(model, parse_budget(settings.fit), importance) if _is_fitting(settings) else None
    recipe = with_overrides(
        fit.recipe if fit else _choose_recipe(settings, importance), settings.tensor_types, importance is not None
    )
    fit_lines = [fit.summary] if fit else []
    if is_dry:
        plan = make_plan(model, recipe)
        job = make_job(model, plan, dst, settings.is_overwriting, split_bytes, importance)
        return [*describe_plan(plan, job.shards, dst.parent), *fit_lines, *_note_lines(plan.notes)]
    report = convert(model, dst, recipe, on_progress, settings.is_overwriting, split_bytes, importance)
    lines = [*_note_lines(report.notes), *fit_lines, *_report_lines(report)]
    return [*lines, verify(src, report.path, on_progress).summary] if is_verifying else lines


def _is_fitting(settings: Settings) -> bool:
    """Raises KimiLiteError where more than one way of choosing is named."""
    named = {"--recipe": settings.recipe, "--type": settings.type_name, "--fit": settings.fit}
    given = [flag for flag, value in named.items() if value]
    if len(given) > 1:
        raise KimiLiteError(f"{' and '.join(given)} exclude each other.", "Name one; --tensor-type makes exceptions from it.")
    return settings.fit is not None


def _choose_recipe(settings: Settings, importance: Importance | None) -> Recipe:
    if settings.recipe:
        return find_recipe(settings.recipe, importance is not None)
    return uniform_recipe(settings.type_name or _DEFAULT_TYPE, importance is not None)


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
