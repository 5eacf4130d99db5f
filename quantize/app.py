"""The quantize command behind its flags: settings in, lines to print out."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_lite.arch.moonvit import read_checkpoint_tower
from kimi_lite.arch.recipe import Recipe
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.calibrate.imatrix import Importance, read_imatrix
from kimi_lite.quantize.check.verify import verify_lines
from kimi_lite.quantize.codecs import EXACT_TYPES
from kimi_lite.quantize.codecs.feedback import FEEDBACK_TYPES
from kimi_lite.quantize.convert import ConvertReport, convert, importance_notes, make_job, open_model
from kimi_lite.quantize.mmproj import check_mmproj, find_mmproj_layout, mmproj_path, write_mmproj
from kimi_lite.quantize.recipe.budget import FittedRecipe, fit_recipe, fit_size, parse_machine
from kimi_lite.quantize.recipe.choose import find_recipe, kept_recipe, uniform_recipe, with_overrides, write_recipe
from kimi_lite.quantize.recipe.plan import describe_plan, plan_conversion
from kimi_lite.quantize.recipe.sensitivity import is_sensitivity, read_sensitivity
from kimi_lite.quantize.source.files import check_outputs
from kimi_lite.quantize.source.model import SourceModel
from kimi_lite.quantize.write.checksums import check_source
from kimi_lite.quantize.write.writer import OnProgress, check_replaceable
from kimi_lite.units import gib, parse_size

if TYPE_CHECKING:
    from kimi_lite.quantize.calibrate.calibration import CalibrationText

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
    calibrate: Path | None = None
    calibrate_chunks: int = 0
    max_ram: str | None = None
    mmproj: str | None = None
    sensitivity: Path | None = None
    size: str | None = None
    recipe_file: Path | None = None
    measured_on: Path | None = None  # the text of --measure-sensitivity
    probe: str | None = None
    checks_source: bool = False


def run(settings: Settings, on_progress: OnProgress, is_dry: bool, is_verifying: bool) -> list[str]:
    """Does the work, or only describes it; returns what to tell the user. Raises KimiLiteError."""
    if settings.measured_on:
        return _measure_sensitivity(settings, on_progress)
    split_bytes = parse_size(settings.split_size, "--split-max-size", is_decimal=True)
    max_ram_bytes = parse_size(settings.max_ram, "--max-ram") if settings.max_ram else None
    with ExitStack() as stack:
        if settings.mmproj:
            _check_mmproj(settings)
        lines = [check_source(settings.src.expanduser(), on_progress)] if settings.checks_source else []
        calibration = _open_calibration(settings, on_progress)
        if calibration:
            stack.callback(calibration.close)
        return [*lines, *_run(settings, split_bytes, max_ram_bytes, calibration, on_progress, is_dry, is_verifying)]


def _run(
    settings: Settings,
    split_bytes: int,
    max_ram_bytes: int | None,
    calibration: "CalibrationText | None",
    on_progress: OnProgress,
    is_dry: bool,
    is_verifying: bool,
) -> list[str]:
    importance = read_imatrix(settings.imatrix) if settings.imatrix else None
    has_importance = importance is not None or calibration is not None
    src, dst = settings.src.expanduser(), settings.dst.expanduser()
    model = open_model(src)
    recipe = None if _is_fitting(settings) else _choose_recipe(settings, model, has_importance)
    if calibration and not importance and not is_dry and _needs_importance(recipe):
        importance = calibration.importance(settings.calibrate, on_progress)
    fit = None if recipe else _fit(settings, model, importance)
    recipe = recipe or with_overrides(fit.recipe, settings.tensor_types, has_importance)
    fit_lines = list(fit.lines) if fit else []
    if settings.recipe_file:
        write_recipe(settings.recipe_file.expanduser(), model, recipe)
        fit_lines.append(f"the types of all tensors are in {settings.recipe_file}: --recipe takes it")
    if is_dry:
        plan = plan_conversion(model, recipe)
        job = make_job(
            model, plan, dst, settings.is_overwriting, split_bytes, importance, will_have_importance=has_importance
        )
        notes = (*plan.notes, *importance_notes(plan, importance))
        return [*describe_plan(plan, job.shards, dst.parent), *fit_lines, *_note_lines(notes)]
    report = convert(
        model,
        dst,
        recipe,
        on_progress,
        is_overwriting=settings.is_overwriting,
        split_bytes=split_bytes,
        importance=importance,
        calibration=calibration,
        max_ram_bytes=max_ram_bytes,
    )
    lines = [*_note_lines(report.notes), *fit_lines, *_report_lines(report)]
    if settings.mmproj:
        vision = write_mmproj(src, mmproj_path(dst), settings.mmproj, on_progress, settings.is_overwriting)
        lines += [vision.summary, *_note_lines(vision.notes)]
    return [*lines, *verify_lines(src, report.path, on_progress)] if is_verifying else lines


def _measure_sensitivity(settings: Settings, on_progress: OnProgress) -> list[str]:
    """Writes a table and no model."""
    from kimi_lite.quantize.recipe.harm import measure_sensitivity

    named = {
        "--recipe": settings.recipe,
        "--type": settings.type_name,
        "--fit": settings.fit,
        "--size": settings.size,
        "--sensitivity": settings.sensitivity,
        "--write-recipe": settings.recipe_file,
        "--mmproj": settings.mmproj,
        "--calibrate": settings.calibrate,
    }
    if given := [flag for flag, value in named.items() if value]:
        raise KimiLiteError(
            f"--measure-sensitivity writes a table and no model, so {given[0]} has no meaning with it.",
            "Measure first, then name the table with --sensitivity.",
        )
    return measure_sensitivity(
        settings.src.expanduser(),
        settings.measured_on.expanduser(),
        settings.dst.expanduser(),
        settings.probe,
        settings.calibrate_chunks,
        is_overwriting=settings.is_overwriting,
        on_layer=on_progress,
    )


def _check_mmproj(settings: Settings) -> None:
    """Finds now, and not after hours, what would stop the vision tower's file."""
    src, path = settings.src.expanduser(), mmproj_path(settings.dst.expanduser())
    find_mmproj_layout(settings.mmproj)
    _, raw = check_mmproj(src, read_checkpoint_tower(src)[0])
    check_outputs([path], {tensor.file for tensor in raw.values()} | {src / "config.json"})
    check_replaceable(path, settings.is_overwriting)


def _open_calibration(settings: Settings, on_progress: OnProgress) -> "CalibrationText | None":
    if settings.calibrate is None:
        return None
    from kimi_lite.quantize.calibrate.calibration import DEFAULT_CHUNKS, CalibrationText

    num_chunks = settings.calibrate_chunks or DEFAULT_CHUNKS
    return CalibrationText.open(settings.src.expanduser(), settings.calibrate.expanduser(), num_chunks, on_progress)


def _needs_importance(recipe: Recipe | None) -> bool:
    """Whether a type may be used that is neither exact nor chosen with error feedback."""
    return recipe is None or any(layout.name not in EXACT_TYPES | FEEDBACK_TYPES for layout in recipe.layouts)


def _is_fitting(settings: Settings) -> bool:
    """Whether types are to be chosen by what they cost. Raises KimiLiteError where more than one way of choosing is
    named."""
    named = {"--type": settings.type_name, "--fit": settings.fit, "--size": settings.size}
    table = _table(settings)
    if settings.recipe and not (settings.sensitivity is None and table):
        named = {"--recipe": settings.recipe} | named
    given = [flag for flag, value in named.items() if value]
    if len(given) > 1:
        raise KimiLiteError(
            f"{' and '.join(given)} exclude each other.", "Name one; --tensor-type makes exceptions from it."
        )
    if table and settings.type_name:
        raise KimiLiteError("A table of sensitivities chooses types, and --type names one.", "Name one of the two.")
    if settings.sensitivity and not (settings.fit or settings.size):
        raise KimiLiteError(
            "--sensitivity says what types cost, and not how many bytes there are.",
            "Add --fit 24G+256G for a machine, --fit this for this one, or --size 250G for a file.",
        )
    return table is not None or bool(settings.fit or settings.size)


def _table(settings: Settings) -> Path | None:
    """The table of sensitivities that is named, also by --recipe."""
    if settings.sensitivity:
        return settings.sensitivity.expanduser()
    path = Path(settings.recipe).expanduser() if settings.recipe else None
    return path if path and path.is_file() and is_sensitivity(path) else None


def _fit(settings: Settings, model: SourceModel, importance: Importance | None) -> FittedRecipe:
    table = _table(settings)
    sensitivity = read_sensitivity(table) if table else None
    if settings.size:
        return fit_size(model, parse_size(settings.size, "--size", is_decimal=True), importance, sensitivity)
    return fit_recipe(model, parse_machine(settings.fit or "this"), importance, sensitivity)


def _choose_recipe(settings: Settings, model: SourceModel, has_importance: bool) -> Recipe:
    if settings.recipe:
        recipe = find_recipe(settings.recipe, has_importance)
    elif not settings.type_name and (kept := kept_recipe(model)):
        recipe = kept
    else:
        recipe = uniform_recipe(settings.type_name or _DEFAULT_TYPE, has_importance)
    return with_overrides(recipe, settings.tensor_types, has_importance)


def _note_lines(notes: tuple[str, ...]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _report_lines(report: ConvertReport) -> Iterator[str]:
    types = ", ".join(f"{count} {name}" for name, count in report.tensors_by_type.items())
    files = f"{len(report.paths)} files, first " if len(report.paths) > 1 else ""
    yield (
        f"{files}{report.path}: {gib(report.num_bytes)}, {report.num_weights / 1e6:,.1f} M weights at "
        f"{report.bits_per_weight:.2f} bits, {report.num_tensors} tensors ({types}), {report.seconds:.1f} s"
    )
    speed = report.num_bytes / report.seconds / 1e9
    yield f"peak memory {gib(report.peak_bytes)}, written at {speed:.2f} GB/s, log in {report.log}"
    worst = sorted(report.errors.items(), key=lambda item: -item[1])[:_NUM_WORST]
    if worst and worst[0][1]:
        yield "largest relative errors: " + ", ".join(f"{name} {error:.4f}" for name, error in worst)
