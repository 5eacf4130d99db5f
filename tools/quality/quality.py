"""How good a model file is: perplexity, divergence from a reference, multiple choice. Tables, then JSON as the last
line.

    python -m tools.quality -m q4.gguf --reference q8.gguf
    python -m tools.quality -m bf16.gguf --save bf16.safetensors
    python -m tools.quality -m q2.gguf --reference bf16.safetensors
    python -m tools.quality -m model.gguf --compare llama.cpp
    python -m tools.quality -m model.gguf --reference model.gguf --expert-share 0.5 --cache-bias 0.02 --no-tasks
    python -m tools.quality -m model.gguf --reference model.gguf --defer-experts 1 --no-tasks

The text is public-domain prose in the repository (kimi_lite/engine/emma.txt); perplexity is computed as by llama.cpp's
`llama-perplexity`: chunks of 512 tokens, the second half of each scored. A perplexity is comparable only between files
with the same tokenizer; the Kullback-Leibler divergence from the unquantized model says more about a quantization, in
far fewer tokens.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from kimi_lite.engine.scoring import (
    CHUNK_TOKENS,
    TEXT,
    Divergence,
    Estimate,
    Losses,
    OurLogits,
    ScoreSource,
    chunks_of,
    score_text,
)
from kimi_lite.errors import KimiLiteError
from kimi_lite.files import MAX_CORPUS_BYTES, read_text
from kimi_lite.tools.bench.environment import describe_environment, describe_model
from kimi_lite.tools.quality.kinds import (
    KindScores,
    chunks_of_kinds,
    mean_divergence,
    place_kinds,
    print_kinds,
    score_kinds,
)
from kimi_lite.tools.quality.runs import LlamaLogits, StoredLogits, hash_ids, save_rows
from kimi_lite.tools.quality.tasks import TaskResult, answer_all, load_questions

_DEFAULT_CHUNKS = 16


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rchunk {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def print_text(num_chunks: int, own: Losses, found: Sequence[tuple[str, Losses, Divergence]]) -> None:
    perplexity = own.perplexity
    print(
        f"perplexity        {perplexity.mean:.4f} ± {perplexity.error:.4f}, {len(own.nats):,} tokens in "
        f"{num_chunks} chunks"
    )
    for name, their_losses, divergence in found:
        theirs, d = their_losses.perplexity, divergence.to_json()
        kl, same, rank, ratio = d["kl_nats"], d["top1_agreement"], d["rank"], d["perplexity_ratio"]
        print(f"\nagainst {name}")
        print(f"its perplexity    {theirs.mean:.4f} ± {theirs.error:.4f}")
        print(f"ratio to it       {ratio['mean']:.5f} ± {ratio['error']:.5f}")
        print(f"KL divergence     {kl['mean']:z.5f} ± {kl['error']:.5f} nats")
        print(f"                  median {kl['median']:z.5f}, 99 % {kl['p99']:.4f}, worst {kl['max']:.3f}")
        print(f"same best token   {same['mean']:.2%} ± {same['error']:.2%}")
        print(f"its best is ours  among our best 5 in {rank['within_5']:.2%}, rank {rank['mean']:.3f} on average")
        print(f"true token        {d['probability_difference_rms']:.2%} rms change of its probability")


def print_tasks(result: TaskResult) -> None:
    whole, per_byte = result.accuracy, result.accuracy_per_byte
    chance = f"{result.num_questions} questions, chance {result.chance:.0%}"
    print(f"\nmultiple choice   {whole.mean:.1%} ± {whole.error:.1%} right, {chance}")
    print(f"                  {per_byte.mean:.1%} ± {per_byte.error:.1%} by the average byte of an answer")


app = typer.Typer(
    pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="GGUF file, first shard or folder.")],
    reference: Annotated[
        Path | None, typer.Option(help="A GGUF of the same model, or what --save wrote.", exists=True)
    ] = None,
    compare_with: Annotated[
        Literal["llama.cpp"] | None, typer.Option("--compare", help="The same file through llama-cpp-python.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write log-probabilities for a later --reference (.safetensors).")
    ] = None,
    text: Annotated[Path, typer.Option(help="Another text.", exists=True, dir_okay=False)] = TEXT,
    chunks: Annotated[int, typer.Option(help="Chunks of 512 tokens; 0: the whole text.", min=0)] = _DEFAULT_CHUNKS,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", help="CPU threads. Default: all cores.", min=1)
    ] = None,
    tasks: Annotated[bool, typer.Option("--tasks/--no-tasks", help="Multiple choice as well.")] = True,
    expert_share: Annotated[
        float | None,
        typer.Option(help="Of the routed experts in RAM; the others through the disk tier.", min=0.01, max=1),
    ] = None,
    cache_bias: Annotated[float, typer.Option(help="With --expert-share: prefer experts that are there.", min=0)] = 0.0,
    defer_experts: Annotated[
        int, typer.Option(help="Add so many of a token's experts one layer later; tokens run one by one.", min=0)
    ] = 0,
) -> None:
    """Measure the quality of a model file."""
    try:
        if cache_bias and expert_share is None:
            raise KimiLiteError("--cache-bias does nothing where all experts are in RAM.", "Add --expert-share 0.5.")
        if defer_experts and expert_share is not None:
            raise KimiLiteError("Experts that come from the disk are never deferred.", "Leave out --expert-share.")
        ours = OurLogits(model, threads, expert_share, cache_bias, defer_experts)
        is_decoding = cache_bias > 0 or defer_experts > 0
        _measure(ours, reference, compare_with is not None, save, text, chunks, threads, tasks, is_decoding)
    except KimiLiteError as error:
        print(f"quality: {error}", file=sys.stderr)
        sys.exit(2)


def _measure(
    ours: OurLogits, reference: Path | None, compares: bool, save: Path | None, text: Path, num_chunks: int,
    threads: int | None,
    has_tasks: bool, is_decoding: bool,
) -> None:  # fmt: skip
    with ExitStack() as stack:
        stack.callback(ours.close)
        ids = ours.tokenizer.encode(read_text(text, "The text", max_bytes=MAX_CORPUS_BYTES))
        chunks = list(chunks_of(ids, ours.bos_id, num_chunks))
        if not chunks:
            raise KimiLiteError(f"{text} has {len(ids):,} tokens; {CHUNK_TOKENS} are needed.", "Give a longer text.")
        num_chunks, by_kind = len(chunks), chunks_of_kinds(ours)
        kinds = place_kinds(by_kind, num_chunks)
        chunks += [chunk for each in by_kind.values() for chunk in each]
        references: list[ScoreSource] = []
        if reference:
            references.append(_open_reference(reference, chunks, threads, is_decoding))
        if compares:
            references.append(LlamaLogits(ours.store.path, ours.num_threads))
        for each in references:
            stack.callback(each.close)
        kept: list[np.ndarray] = []
        own, found = score_text(
            ours,
            references,
            chunks,
            lambda rows: kept.append(rows.astype(np.float16)) if save else None,
            _show_progress,
        )
        by_kind = score_kinds(kinds, own, found)
        own = own.of_chunks(0, num_chunks)
        named = [
            (each.name, theirs.of_chunks(0, num_chunks), divergence.of_chunks(0, num_chunks))
            for each, (theirs, divergence) in zip(references, found, strict=True)
        ]
        print_text(num_chunks, own, named)
        print_kinds(by_kind, [each.name for each in references])
        if counters := ours.expert_counters():
            found_share = counters["expert_hits"] / sum(
                counters[f"expert_{name}"] for name in ("hits", "late", "misses")
            )
            print(f"\nexperts there     {found_share:.1%} of those asked for, {counters['expert_slots']:,.0f} slots")
        if save:
            save_rows(save, kept, ours.name, hash_ids(chunks))
        result = answer_all(ours.logits, ours.tokenizer, ours.bos_id, load_questions()) if has_tasks else None
        if result:
            print_tasks(result)
        print(json.dumps(_document(ours, text, num_chunks, own, named, by_kind, result)))


def _open_reference(path: Path, chunks: Sequence[np.ndarray], threads: int | None, is_decoding: bool) -> ScoreSource:
    """is_decoding: tokens run one by one, as in the run that is compared, so that kernels round alike."""
    if path.suffix == ".safetensors":
        return StoredLogits(path, len(chunks), hash_ids(chunks))
    return OurLogits(path, threads, is_decoding=is_decoding)


def _document(
    ours: OurLogits, text: Path, num_chunks: int, own: Losses, named: Sequence[tuple[str, Losses, Divergence]],
    by_kind: Sequence[KindScores], result: TaskResult | None,
) -> dict:  # fmt: skip
    """JSON-ready."""
    return {
        "tool": "quality",
        "schema": 1,
        "environment": describe_environment(ours.num_threads),
        "model": describe_model(ours.store, ours.config),
        "text": text.name,
        "num_chunks": num_chunks,
        "num_scored_tokens": len(own.nats),
        "perplexity": _estimate(own.perplexity),
        "references": [
            {
                "name": name,
                "perplexity": _estimate(theirs.perplexity),
                **divergence.to_json(),
                "held_out_kl_nats": mean_divergence(by_kind, index),
            }
            for index, (name, theirs, divergence) in enumerate(named)
        ],
        "held_out": [
            {
                "kind": each.kind.name,
                "num_chunks": each.kind.last - each.kind.first,
                "perplexity": _estimate(each.perplexity),
                "kl_nats": [_estimate(Estimate.of(divergence.kl_nats)) for divergence in each.divergences],
            }
            for each in by_kind
        ],
        "multiple_choice": result
        and {
            "num_questions": result.num_questions,
            "accuracy": _estimate(result.accuracy),
            "accuracy_per_byte": _estimate(result.accuracy_per_byte),
            "chance": result.chance,
        },
    }


def _estimate(estimate) -> dict:
    return {"mean": estimate.mean, "error": estimate.error}
