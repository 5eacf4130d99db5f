"""A timeline of single operations: clocks between the kernels of the model's own programs.

While a tracer is attached, every program is replaced by one in which a tiny kernel notes the time before each operation
(all threads have then finished the one before). Without a tracer nothing of this exists, so tracing costs nothing when
it is off; on, it adds a barrier and a clock read to each operation.
"""

import ctypes
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file
from kimi_lite.model.cpu.transformer import Transformer
from kimi_lite.native.calls import call3
from kimi_lite.native.cpu.compiler import kernel
from kimi_lite.native.cpu.program import Op
from kimi_lite.native.simd import load_i64, store_i64
from kimi_lite.units import number

_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1
_RECORD_BYTES = 24  # operation, seconds, nanoseconds


@kernel
def _note_time_kernel(args, thread, team):
    if thread == 0:
        operation, clock_gettime, clock = load_i64(args), load_i64(args + 8), load_i64(args + 16)
        cursor, capacity = load_i64(args + 24), load_i64(args + 32)
        count = load_i64(cursor)
        if count < capacity:
            record = cursor + 8 + _RECORD_BYTES * count
            store_i64(record, operation)
            call3(clock_gettime, clock, record + 8, 0)
            store_i64(cursor, count + 1)


class Span(NamedTuple):
    part: str  # "layer 3", "embedding", "head"
    stage: str
    start_ns: int
    stop_ns: int

    @property
    def duration_ns(self) -> int:
        return self.stop_ns - self.start_ns


class Tracer:
    """Notes up to `capacity` operations. Raises KimiLiteError where there is no clock to read from a kernel."""

    def __init__(self, transformer: Transformer, capacity: int = 200_000) -> None:
        if sys.platform == "win32":
            raise KimiLiteError(
                "--trace needs clock_gettime, which Windows has not.", "Trace under Linux, macOS or WSL."
            )
        self._transformer = transformer
        self._notes = np.zeros(1 + 3 * capacity, np.int64)
        self._stages: list[tuple[str, str] | None] = []  # by operation number; None ends a program
        clock = ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value
        self._clock = (clock, _CLOCK_MONOTONIC, self._notes, capacity)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Programs note times inside this block."""
        plain = [(program, program.ops) for program, _ in self._transformer.programs]
        try:
            for program, stages in self._transformer.programs:
                program.replace(self._with_clocks(program.ops, stages))
            yield
        finally:
            for program, ops in plain:
                program.replace(ops)

    def spans(self) -> list[Span]:
        """What was noted, in order."""
        count = int(self._notes[0])
        notes = self._notes[1 : 1 + 3 * count].reshape(count, 3)
        times_ns = notes[:, 1] * 1_000_000_000 + notes[:, 2]
        operations = [self._stages[i] for i in notes[:, 0]]
        return [
            Span(*operation, int(start), int(stop))
            for operation, start, stop in zip(operations, times_ns, times_ns[1:], strict=False)
            if operation is not None
        ]

    def _with_clocks(self, ops: Sequence[Op], stages: Sequence[tuple[str, str]]) -> list[Op]:
        assert len(ops) == len(stages), (len(ops), len(stages))
        timed = []
        for op, stage in zip(ops, stages, strict=True):
            timed += [self._clock_op(stage), op]
        return [*timed, self._clock_op(None)]

    def _clock_op(self, stage: tuple[str, str] | None) -> Op:
        self._stages.append(stage)
        return Op.of(_note_time_kernel, len(self._stages) - 1, *self._clock)


def write_chrome_trace(path: Path, spans: Sequence[Span]) -> None:
    """For chrome://tracing and ui.perfetto.dev: layers above, their stages below, and the gaps between passes of the
    model."""
    if not spans:
        raise KimiLiteError("Nothing was traced.", "Generate at least one token.")
    zero_ns = spans[0].start_ns
    events = [_event(span.stage, span.part, span.start_ns - zero_ns, span.duration_ns, 1) for span in spans]
    for part, start_ns, stop_ns in _parts(spans):
        events.append(_event(part, "layer", start_ns - zero_ns, stop_ns - start_ns, 0))
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}}
        for tid, name in enumerate(("layers", "stages"))
    ]
    with whole_file(path) as file:
        json.dump({"traceEvents": names + events, "displayTimeUnit": "ms"}, file)


def _event(name: str, category: str, start_ns: int, duration_ns: int, row: int) -> dict:
    return {
        "ph": "X", "name": name, "cat": category, "pid": 0, "tid": row, "ts": start_ns / 1000,
        "dur": duration_ns / 1000,
    }  # fmt: skip


def _parts(spans: Sequence[Span]) -> list[tuple[str, int, int]]:
    """Neighbouring spans of one part as one: (part, start, stop)."""
    parts: list[tuple[str, int, int]] = []
    for span in spans:
        if parts and parts[-1][0] == span.part and parts[-1][2] == span.start_ns:
            parts[-1] = (span.part, parts[-1][1], span.stop_ns)
        else:
            parts.append((span.part, span.start_ns, span.stop_ns))
    return parts


def between_tokens_ns(spans: Sequence[Span]) -> int:
    """Time between the operations: Python, sampling, the engine."""
    return spans[-1].stop_ns - spans[0].start_ns - sum(span.duration_ns for span in spans)


def stage_table(spans: Sequence[Span], num_tokens: int) -> list[str]:
    """Lines: where a token's time goes, by stage over all layers, largest first."""
    total_ns: dict[str, int] = defaultdict(int)
    for span in spans:
        total_ns[span.stage] += span.duration_ns
    total_ns["between operations"] = between_tokens_ns(spans)
    whole_ns = sum(total_ns.values())
    lines = [f"| {'stage':<20} | {'ms a token':>10} | {'share':>6} |", f"|{'-' * 22}|{'-' * 11}:|{'-' * 7}:|"]
    for stage, stage_ns in sorted(total_ns.items(), key=lambda item: -item[1]):
        milliseconds = number(stage_ns / num_tokens / 1e6)
        lines.append(f"| {stage:<20} | {milliseconds:>10} | {stage_ns / whole_ns:>6.1%} |")
    return lines
