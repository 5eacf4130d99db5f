"""What GPU and CPU do at the same time while tokens are generated: a timeline and a table. For the hybrid path.

    python -m tools.trace -m MODEL -o trace.json -n 16

The timeline (chrome://tracing, ui.perfetto.dev) is torch's profiler's, with a span for the CPU's experts of every layer
next to the kernels and copies of the GPU. The table says how long a token keeps the GPU busy, the CPU's experts, both
at once, and neither: the part that is neither is lost to launching, waiting and Python.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import Options

CPU_EXPERTS, STEP = "experts on the CPU", "step"
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


@contextmanager
def marked(owner: object, name: str, span: str) -> Iterator[None]:
    """Inside, every call of `owner.name` is a span of the profile."""
    from torch.profiler import record_function

    plain = getattr(owner, name)

    def spanned(*arguments: object, **named: object) -> object:
        with record_function(span):
            return plain(*arguments, **named)

    setattr(owner, name, spanned)
    try:
        yield
    finally:
        delattr(owner, name)


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
    with (
        marked(experts.cpu, "compute", CPU_EXPERTS),
        marked(model, "forward", STEP),
        profile(activities=activities) as profiler,
    ):
        for _ in tokens:
            pass
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        profiler.export_chrome_trace(str(partial))
        partial.replace(path)
    events = [
        (event.name, str(event.device_type), (event.time_range.start, event.time_range.end))
        for event in profiler.events()
    ]
    on_host = [(name, span) for name, device, span in events if device.endswith("CPU")]
    on_device = [
        span for name, device, span in events if not device.endswith("CPU") and name not in (CPU_EXPERTS, STEP)
    ]
    return shares_of(
        [span for name, span in on_host if name == STEP],
        on_device,
        [span for name, span in on_host if name == CPU_EXPERTS],
    )


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
