"""A checkpoint folder or existing GGUF files to GGUF, streamed: a few megabytes of weights are in memory at a time.

    report = convert(Path("Kimi-K2.5"), Path("kimi-k2.5-tq1_0.gguf"), find_recipe("tq1_0"))

Everything that can be wrong is found before the first byte is written.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_lite.arch.recipe import Recipe
from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.calibrate import blas
from kimi_lite.quantize.calibrate.imatrix import Importance
from kimi_lite.quantize.codecs import EXACT_TYPES, find_layout
from kimi_lite.quantize.codecs.feedback import FEEDBACK_TYPES, Coding
from kimi_lite.quantize.memory import PeakMemory, pieces_ahead
from kimi_lite.quantize.recipe.choose import uniform_recipe
from kimi_lite.quantize.recipe.plan import ConversionPlan, PlannedTensor, plan_conversion
from kimi_lite.quantize.source.files import check_outputs
from kimi_lite.quantize.source.gguf_model import open_gguf_model
from kimi_lite.quantize.source.hf_model import open_hf_model
from kimi_lite.quantize.source.model import RowReader, SourceModel
from kimi_lite.quantize.source.names import file_order
from kimi_lite.quantize.source.open import is_checkpoint
from kimi_lite.quantize.write.job import SYNC_BYTES, Job, run_job
from kimi_lite.quantize.write.sharding import plan_shards
from kimi_lite.quantize.write.writer import OnProgress, Tensor

if TYPE_CHECKING:  # they run the model, which most conversions do not
    from kimi_lite.quantize.calibrate.calibration import Calibration, CalibrationText
    from kimi_lite.quantize.calibrate.layered import LayeredStore

DEFAULT_SPLIT_BYTES = 45_000_000_000  # model hosts take files up to 50 GB


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was written: `paths`, the one file or the shards. `errors` are relative RMS errors by tensor, on sampled
    rows."""

    paths: tuple[Path, ...]
    num_bytes: int
    num_tensors: int
    num_weights: int
    tensors_by_type: dict[str, int]
    errors: dict[str, float]
    notes: tuple[str, ...]
    seconds: float
    log: Path  # a line a tensor: type, bytes, checksum, error
    peak_bytes: int  # of memory, without the mapped pages of a GGUF source

    @property
    def path(self) -> Path:
        """The file that names the model."""
        return self.paths[0]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_weights


def open_model(src: Path) -> SourceModel:
    """A folder with config.json is a checkpoint; anything else must be GGUF. Raises KimiLiteError."""
    is_gguf = src.is_file() or (src.is_dir() and not is_checkpoint(src) and any(src.glob("*.gguf")))
    return open_gguf_model(src) if is_gguf else open_hf_model(src)


def convert(
    src: SourceModel | Path | str,
    dst: Path | str,
    recipe: Recipe | str,
    on_progress: OnProgress | None = None,
    is_overwriting: bool = False,
    split_bytes: int = DEFAULT_SPLIT_BYTES,
    importance: Importance | None = None,
    calibration: "CalibrationText | None" = None,
    max_ram_bytes: int | None = None,
    sync_bytes: int = SYNC_BYTES,
) -> ConvertReport:
    """Writes the model `src`, opened or its place, as the GGUF file `dst`, or as shards of up to `split_bytes` named
    after it. A recipe given as text is one type for every matrix. `calibration` is of the same model. A killed run
    loses up to `sync_bytes` of what is written.
    `on_progress(tensor, bytes done, bytes in all)`. Raises KimiLiteError."""
    start_s = time.perf_counter()
    dst = Path(dst).expanduser()
    recipe = uniform_recipe(recipe, importance is not None) if isinstance(recipe, str) else recipe
    model = src if isinstance(src, SourceModel) else open_model(Path(src).expanduser())
    plan = plan_conversion(model, recipe)
    job = make_job(model, plan, dst, is_overwriting, split_bytes, importance, calibration, max_ram_bytes, sync_bytes)
    peak = PeakMemory()
    with blas.one_thread():  # pieces are encoded by a thread a core
        entries = run_job(job, peak.watching(on_progress))
    return ConvertReport(
        paths=tuple(shard.path for shard in job.shards),
        num_bytes=sum(shard.path.stat().st_size for shard in job.shards),
        num_tensors=len(entries),
        num_weights=plan.num_weights,
        tensors_by_type=dict(Counter(tensor.layout.name for tensor in plan.tensors)),
        errors={entry.name: entry.error for entry in entries},
        notes=(*plan.notes, *importance_notes(plan, importance)),
        seconds=time.perf_counter() - start_s,
        log=job.log_path,
        peak_bytes=peak.num_bytes,
    )


def make_job(
    model: SourceModel,
    plan: ConversionPlan,
    dst: Path,
    is_overwriting: bool,
    split_bytes: int,
    importance: Importance | None,
    calibration: "CalibrationText | None" = None,
    max_ram_bytes: int | None = None,
    sync_bytes: int = SYNC_BYTES,
    will_have_importance: bool = False,
) -> Job:
    """The plan as work to be done: tensors with their readers, in shards. `will_have_importance`: for a dry run."""
    if dst.is_dir():
        example = dst / f"model-{plan.recipe.name}.gguf"
        raise KimiLiteError(f"{dst} is a folder, and the name of a GGUF file is needed.", f"For example: {example}")
    with_feedback = [t.source.role for t in plan.tensors if calibration and _takes_feedback(t)]
    statistics = calibration.start(with_feedback) if calibration and with_feedback else None
    calibration_bytes = calibration.num_bytes(with_feedback) if statistics else 0
    if statistics and not max_ram_bytes:
        calibration.check_memory(with_feedback)
    tensors = [_make_tensor(planned, importance, statistics) for planned in plan.tensors]
    for planned, tensor in zip(plan.tensors, tensors, strict=True):
        if not planned.is_exact:
            _check_encoder(tensor, will_have_importance)
    if statistics:  # the text runs through the layers once, so they must come in order
        tensors.sort(key=lambda tensor: file_order(tensor.name))
    origin = f"{model.origin} {calibration.label}" if calibration else model.origin
    metadata = dict(model.make_metadata(plan.main_layout))
    max_ahead = pieces_ahead(tensors, importance, calibration_bytes, max_ram_bytes)
    shards = plan_shards(dst, tensors, split_bytes)
    job = Job(dst, shards, metadata, origin, is_overwriting, model.files, max_ahead, sync_bytes)
    if statistics:
        statistics.follow(partial(_written_layers, plan, job))
    inputs = [file.path for file in model.files]
    inputs += [importance.path] if importance else []
    check_outputs(job.outputs, [*inputs, *([calibration.text] if calibration else [])])
    return job


def _written_layers(plan: ConversionPlan, job: Job) -> "LayeredStore":
    """The file as far as it is written; what models read first comes from the source."""
    from kimi_lite.quantize.calibrate.layered import LayeredStore, LayerTensor, open_source

    written, layers = job.written(), []
    for each in plan.tensors:
        tensor = LayerTensor(each.source.role, each.layout, each.source.shape, written[each.source.name])
        if tensor.is_always_there:
            tensor = replace(tensor, open_rows=partial(open_source, each.source, each.layout))
        layers.append(tensor)
    return LayeredStore(job.path, job.metadata, layers)


def importance_notes(plan: ConversionPlan, importance: Importance | None) -> list[str]:
    """What of an importance matrix cannot be used."""
    if importance is None:
        return []
    wanted = {
        tensor.source.name: tensor.source.shape
        for tensor in plan.tensors
        if not tensor.is_exact and tensor.layout.name not in EXACT_TYPES and len(tensor.source.shape) > 1
    }
    return list(importance.notes(wanted))


def _takes_feedback(planned: PlannedTensor) -> bool:
    return planned.layout.name in FEEDBACK_TYPES and not planned.is_exact and planned.source.role != "token_embd.weight"


def _make_tensor(planned: PlannedTensor, importance: Importance | None, statistics: "Calibration | None") -> Tensor:
    source = planned.source
    coding = None
    if statistics and _takes_feedback(planned):
        coding = partial(_coding, statistics, planned)
    encoded = source.open_encoded(planned.layout)
    if encoded:
        return Tensor(source.name, source.shape, planned.layout, lambda: encoded, is_encoded=True)
    vectors = importance.find(source.name, source.shape) if importance else None
    return Tensor(
        name=source.name,
        shape=source.shape,
        layout=planned.layout,
        open_rows=source.open_rows,
        importance=vectors,
        coding=coding,
    )


def _coding(statistics: "Calibration", planned: PlannedTensor, matrix: int, read_rows: RowReader) -> Coding:
    return statistics.coding(planned.source.role, planned.layout, matrix, planned.source.shape, read_rows)


def _check_encoder(tensor: Tensor, will_have_importance: bool) -> None:
    """Finds now, and not after hours, a tensor that the matrix lacks and whose type cannot be without."""
    try:
        find_layout(tensor.layout.name, will_have_importance or bool(tensor.coding) or tensor.importance is not None)
    except KimiLiteError as error:
        raise KimiLiteError(
            f"{tensor.name}: {error.message}", "Give it another type with --tensor-type, or a matrix that has it."
        ) from error
