"""The plan against reality: memory that the process came to hold, and speeds against their limits, on this machine.

    python -m tools.plan_check -m model.gguf          # default: the demo model
    python -m tools.plan_check -m kimi-k2.5-00001-of-00006.gguf -c 8K

Loads the model, reads a prompt that fills the context but for the answer (so that every expert and every page of the
cache is used), generates, and compares. Run it twice: compiling kernels takes memory that a plan does not count. The
last line is JSON; the exit code is 1 where memory is off by more than 5 % or a limit was exceeded.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from kimi_lite.apps.model_path import find_model
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.hardware import bandwidth
from kimi_lite.hardware import speed as hardware_speed
from kimi_lite.options import Options
from kimi_lite.plan.plan import make_plan
from kimi_lite.units import MIB, parse_token_count

MAX_MEMORY_ERROR = 0.05
_ANSWER_TOKENS = 32
_OFF = 1  # exit code


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was planned and what came."""

    planned_bytes: int
    resident_bytes: int
    decode_expected_tok_s: float
    decode_limit_tok_s: float
    decode_tok_s: float
    prompt_expected_tok_s: float
    prompt_limit_tok_s: float
    prompt_tok_s: float

    @property
    def memory_error(self) -> float:
        """Of the plan, relative to what came: above 0, it planned for too much."""
        return self.planned_bytes / self.resident_bytes - 1

    @property
    def is_good(self) -> bool:
        within = abs(self.memory_error) <= MAX_MEMORY_ERROR
        return within and self.decode_tok_s <= self.decode_limit_tok_s and self.prompt_tok_s <= self.prompt_limit_tok_s


def compare(path: Path, context_length: int, num_threads: int | None) -> Comparison:
    """Loads and runs the model in this process, which must have loaded nothing else."""
    with load(path, Options(context_length=context_length, num_threads=num_threads, device="cpu")) as engine:
        plan = engine.plan
        prompt = np.random.default_rng(0).integers(
            0, engine.tokenizer.vocab_size, engine.context_length - _ANSWER_TOKENS - 1
        )
        sampling = SamplingParams(temperature=0, max_tokens=_ANSWER_TOKENS, ignore_eos=True)
        request = Request("check", tuple(prompt.tolist()), sampling)
        *_, last = engine.generate([request])
        engine.model._layers.token_embd.data[:, ::4096].max()  # rows of the vocabulary that the prompt had no need of
        resident_bytes = psutil.Process().memory_info().rss
    speed = bandwidth.measure_ram(plan.num_threads)
    plan = make_plan(plan.sizes, hardware_speed.measured(plan.hardware, ram=speed), plan.limits)
    return Comparison(
        planned_bytes=plan.process_bytes,
        resident_bytes=resident_bytes,
        decode_expected_tok_s=plan.decode.expected_tok_s,
        decode_limit_tok_s=plan.decode.limit_tok_s,
        decode_tok_s=last.stats.generation_tok_s or 0.0,
        prompt_expected_tok_s=plan.prompt.expected_tok_s,
        prompt_limit_tok_s=plan.prompt.limit_tok_s,
        prompt_tok_s=last.stats.prompt_tok_s or 0.0,
    )


def main(
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="GGUF file, first shard or folder. Default: demo.")
    ] = None,
    context: Annotated[str, typer.Option("-c", "--ctx", help="Context in tokens.")] = "2K",
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", help="CPU threads. Default: all cores.", min=1)
    ] = None,
) -> None:
    """Compare the plan with what a model really takes and does."""
    found = compare(find_model(Options(model=str(model) if model else None)), parse_token_count(context), threads)
    planned, resident = found.planned_bytes / MIB, found.resident_bytes / MIB
    print(f"memory   planned {planned:,.0f} MiB, resident {resident:,.0f} MiB: {found.memory_error:+.1%}")
    for name, tok_s, expected, limit in (
        ("decode", found.decode_tok_s, found.decode_expected_tok_s, found.decode_limit_tok_s),
        ("prompt", found.prompt_tok_s, found.prompt_expected_tok_s, found.prompt_limit_tok_s),
    ):
        share = f"{tok_s / limit:.0%} of the limit"
        print(f"{name}   {tok_s:,.1f} tokens/s, expected {expected:,.1f}, limit {limit:,.1f}: {share}")
    print(
        json.dumps(
            {"tool": "plan_check", **asdict(found), "memory_error": found.memory_error, "is_good": found.is_good}
        )
    )
    if not found.is_good:
        raise typer.Exit(_OFF)


if __name__ == "__main__":
    try:
        typer.run(main)
    except KimiLiteError as error:
        print(f"plan_check: {error}", file=sys.stderr)
        sys.exit(2)
