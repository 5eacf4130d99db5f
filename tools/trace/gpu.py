"""What GPU and CPU do at the same time while tokens are generated: a timeline and a table. For the hybrid path.

    python -m tools.trace -m MODEL -o trace.json -n 16

The timeline (chrome://tracing, ui.perfetto.dev) is torch's profiler's, with a span for the CPU's experts of every layer
next to the kernels and copies of the GPU. The table says how long a token keeps the GPU busy, the CPU's experts, both
at once, and neither: the part that is neither is lost to launching, waiting and Python. A GPU that waits for the CPU's
answer (its kernel `await_answer_kernel`) counts as not busy.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.model.hybrid.transformer import HybridTransformer
from kimi_lite.options import Options

CPU_EXPERTS, STEP, _WAIT = "experts on the CPU", "step", "await_answer"
_WARM_UP_TOKENS = 8  # kernels are compiled and graphs captured
_PROMPT = "Tell me about the sea."
Interval = tuple[float, float]  # microseconds


class Shares(NamedTuple):
    """Milliseconds, of all traced steps together."""

    whole_ms: float
    gpu_ms: float
    cpu_ms: float
    both_ms: float

    @property
    def neither_ms(self) -> float:
        return self.whole_ms - self.gpu_ms - self.cpu_ms + self.both_ms


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The same stretches of time without overlaps, in order."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def common(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Where both are; both united."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            found.append((start, stop))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def shares_of(steps: Iterable[Interval], gpu: Iterable[Interval], cpu: Iterable[Interval]) -> Shares:
    """What of the steps' time the GPU works, the CPU computes experts, and both do."""
    inside = united(steps)
    on_gpu, on_cpu = common(united(gpu), inside), common(united(cpu), inside)
    return Shares(
        *(sum(stop - start for start, stop in part) / 1000 for part in (inside, on_gpu, on_cpu, common(on_gpu, on_cpu)))
    )


def table(shares: Shares, num_tokens: int) -> list[str]:
    """Lines of Markdown, milliseconds a token."""
    rows = [
        ("a token", shares.whole_ms),
        ("GPU busy", shares.gpu_ms),
        (CPU_EXPERTS, shares.cpu_ms),
        ("both at once", shares.both_ms),
        ("neither", shares.neither_ms),
    ]
    head = [f"| {'':<18} | {'ms a token':>10} | {'share':>6} |", f"|{'-' * 20}|{'-' * 11}:|{'-' * 7}:|"]
    return head + [f"| {name:<18} | {ms / num_tokens:>10.3f} | {ms / shares.whole_ms:>6.1%} |" for name, ms in rows]


class TracedStep(NamedTuple):
    """A pass of the model: when it began, and int64 (turns, 2), when the CPU's experts ran; `time.monotonic_ns`."""

    begun_ns: int
    computed_ns: np.ndarray

    def spans(self, start: float) -> list[Interval]:
        """Of the CPU's experts, on a clock on which the pass began at `start` microseconds."""
        return [(start + (a - self.begun_ns) / 1e3, start + (b - self.begun_ns) / 1e3) for a, b in self.computed_ns]


@contextmanager
def steps_of(model: HybridTransformer) -> Iterator[list[TracedStep]]:
    """Inside, every pass of the model is a span of the profile, and one of what is yielded."""
    from torch.profiler import record_function

    plain, found = model.forward, []

    def spanned(*arguments: object, **named: object) -> object:
        with record_function(STEP):
            begun_ns = time.monotonic_ns()
            result = plain(*arguments, **named)
        found.append(TracedStep(begun_ns, model.experts.server.computed_ns))
        return result

    model.forward = spanned
    try:
        yield found
    finally:
        del model.forward


def trace(engine: Engine, num_tokens: int, path: Path | None) -> Shares:
    """Generate `num_tokens` tokens under the profiler; the timeline goes to `path`. Raises KimiLiteError on the CPU
    path."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    model = engine.model
    experts = getattr(model, "experts", None)
    if experts is None:
        raise KimiLiteError(
            "There is nothing to trace here: no GPU is used, or no expert is routed.", "See kimi-lite bench --trace."
        )
    prompt = tuple(engine.tokenizer.encode(_PROMPT))
    sampling = SamplingParams(temperature=0, max_tokens=_WARM_UP_TOKENS + num_tokens, ignore_eos=True)
    tokens = engine.generate([Request("trace", prompt, sampling)])
    for _ in range(_WARM_UP_TOKENS):
        next(tokens)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with steps_of(model) as steps, profile(activities=activities) as profiler:
        for _ in tokens:
            pass
    if path is not None:
        _write_timeline(profiler, steps, path)
    events = [
        (event.name, str(event.device_type), (event.time_range.start, event.time_range.end))
        for event in profiler.events()
    ]
    on_host = sorted(span for name, device, span in events if device.endswith("CPU") and name == STEP)
    on_device = [
        span for name, device, span in events if not device.endswith("CPU") and name != STEP and _WAIT not in name
    ]
    computed = [span for step, (start, _) in zip(steps, on_host, strict=True) for span in step.spans(start)]
    return shares_of(on_host, on_device, computed)


def _write_timeline(profiler: object, steps: Sequence[TracedStep], path: Path) -> None:
    """torch's, with spans of the CPU's experts in a row of their own."""
    partial = path.with_name(path.name + ".partial")
    profiler.export_chrome_trace(str(partial))
    timeline = json.loads(partial.read_text(encoding="utf-8"))
    events = timeline["traceEvents"]
    passes = sorted(
        (each for each in events if each.get("name") == STEP and "dur" in each), key=lambda each: each["ts"]
    )
    passes = [each for each in passes if each.get("cat") != "gpu_user_annotation"]
    for step, each in zip(steps, passes, strict=True):
        row = {"ph": "X", "cat": "cpu_op", "name": CPU_EXPERTS, "pid": each["pid"], "tid": CPU_EXPERTS}
        events.extend(row | {"ts": start, "dur": stop - start} for start, stop in step.spans(each["ts"]))
    partial.write_text(json.dumps(timeline), encoding="utf-8")
    partial.replace(path)


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="GGUF file, first shard or folder.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the timeline to FILE.")] = None,
    num_tokens: Annotated[int, typer.Option("-n", help="Tokens to trace.", min=1)] = 16,
    device: Annotated[str, typer.Option("--device", help="A CUDA device.")] = "cuda",
    context: Annotated[int, typer.Option("-c", "--ctx", help="Context in tokens.")] = 4096,
) -> None:
    """Trace decoding on the hybrid path."""
    try:
        with load(model, Options(context_length=context, device=device)) as engine:
            for line in table(trace(engine, num_tokens, output), num_tokens):
                typer.echo(line)
    except KimiLiteError as error:
        typer.echo(f"trace_gpu: {error}", err=True)
        raise typer.Exit(2) from error
