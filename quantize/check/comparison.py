"""What a conversion does to a model's words: perplexity and Kullback-Leibler divergence from the source, where both
run here.

Part of `--verify`: four chunks of 512 tokens of a novel, measured as `python -m tools.quality` does.
A checkpoint that is small enough is converted without loss to a temporary file.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from kimi_lite.arch.recipe import Recipe
from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.convert import convert, open_model
from kimi_lite.quantize.recipe.choose import kept_recipe, uniform_recipe
from kimi_lite.quantize.source.model import SourceModel
from kimi_lite.quantize.write.writer import OnProgress
from kimi_lite.units import gib

_NUM_CHUNKS = 4
_MEMORY_SHARE = 0.6  # of free memory for both models
# of a weight as it is compared; other kinds as float32
_STORED_BYTES = {"int2": 0.28125, "int3": 0.5625, "int4": 0.5625, "bf16": 2, "f16": 2}


def compare_models(src: Path, path: Path, on_progress: OnProgress | None = None) -> str:
    """A line with the perplexities and the divergence, or why they were not measured."""
    model = open_model(src)
    source_bytes = sum(
        t.num_weights * max(_STORED_BYTES.get(kind, 4) for kind in t.stored.split("+")) for t in model.tensors
    )
    need, have = source_bytes + GGUFStore.open(path).total_bytes, _MEMORY_SHARE * psutil.virtual_memory().available
    if need > have:
        return f"perplexity not compared: source and result need {gib(need)} of memory, and {gib(have)} are free"
    try:
        with _runnable(src, path.parent, model) as source:
            return _measure(source, path, on_progress or (lambda name, done, total: None))
    except (
        KimiLiteError
    ) as error:  # a vocabulary without text, a size that kernels cannot take: the file itself is verified
        return f"perplexity not compared: {error.message}"


@contextmanager
def _runnable(src: Path, folder: Path, model: SourceModel) -> Iterator[Path]:
    """The source as a GGUF file."""
    if not (src / "config.json").is_file():
        yield src
        return
    with tempfile.TemporaryDirectory(prefix="kimi-lite-verify-", dir=folder) as work:
        yield convert(src, Path(work) / "source.gguf", _exact_recipe(model)).path


def _exact_recipe(model: SourceModel) -> Recipe:
    if kept := kept_recipe(model):
        return replace(kept, rest=BY_NAME["BF16"])
    stored = {tensor.stored for tensor in model.tensors}
    return uniform_recipe("bf16" if stored <= {"bf16", "f32"} else "f32")


def _measure(source: Path, path: Path, report: OnProgress) -> str:
    from kimi_lite.engine.scoring import TEXT, OurLogits, chunks_of, score_text

    report("comparing with the source", 0, 1)
    with ExitStack() as stack:
        theirs, ours = OurLogits(source), OurLogits(path)
        stack.callback(theirs.close)
        stack.callback(ours.close)
        chunks = list(chunks_of(ours.tokenizer.encode(TEXT.read_text(encoding="utf-8")), ours.bos_id, _NUM_CHUNKS))
        own, ((before, divergence),) = score_text(ours, [theirs], chunks, lambda rows: None)
    report("comparing with the source", 1, 1)
    kl, same = divergence.to_json()["kl_nats"], divergence.to_json()["top1_agreement"]
    return (
        f"compared with the source, on {len(own.nats):,} tokens of prose: perplexity {own.perplexity.mean:.3f} "
        f"(source {before.perplexity.mean:.3f}), KL divergence {kl['mean']:.5f} ± {kl['error']:.5f} nats, "
        f"same best token {same['mean']:.1%}"
    )
