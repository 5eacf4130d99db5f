"""Runs stages as processes, a group at a time, each with a limit of its own; a failure, a crash or a hang is a result
like any other, and the next stage begins. Only the standard library: a bare machine has nothing else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .settings import Settings

_LEAST_S = 2.0  # a stage that has less is not begun
_LOG_LINES = 6  # of a stage that failed, told with it


@dataclass(frozen=True, slots=True)
class Stage:
    """`limit_s` of a run of 8 minutes. `num_shards`: processes among which its cases are divided."""

    name: str
    limit_s: float
    num_shards: int = 1


@dataclass(slots=True, eq=False)
class _Running:
    name: str  # with its shard
    process: subprocess.Popen
    log: Path
    start_s: float
    limit_s: float
    num_failed: int = 0
    thread: threading.Thread | None = None


class Results:
    """Every line goes to a file at once, and stays here for the table."""

    def __init__(self, path: Path, show: Callable[[dict], None]) -> None:
        self.lines: list[dict] = []
        self._file, self._show, self._lock = path.open("a", encoding="utf-8"), show, threading.Lock()

    def add(self, line: dict) -> None:
        with self._lock:
            self.lines.append(line)
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._show(line)

    def close(self) -> None:
        self._file.close()


def run_groups(
    groups: Sequence[Sequence[Stage]],
    settings: Settings,
    minutes: float,
    faults: Mapping[str, str],
    environment: Mapping[str, str],
    results: Results,
) -> None:
    """Stages of a group run at the same time; what earlier ones did not need is added to their limits. faults: what
    happens to a stage in place of its work."""
    start_s, scale = time.monotonic(), minutes / 8
    for number, group in enumerate(groups):
        left_s = start_s + 60 * minutes - time.monotonic()
        later_s = scale * sum(max(stage.limit_s for stage in later) for later in groups[number + 1 :])
        running = []
        for stage in group:
            limit_s = min(left_s, max(scale * stage.limit_s, left_s - later_s))
            if limit_s < _LEAST_S:
                results.add(_ended(stage.name, "skipped", 0.0, "no time is left"))
                continue
            for shard in range(stage.num_shards):
                own = replace(settings, fault=faults.get(stage.name, ""), shard=shard, num_shards=stage.num_shards)
                running.append(_start(stage, own, limit_s, environment, results))
        _finish(running, results)


def _start(
    stage: Stage, settings: Settings, limit_s: float, environment: Mapping[str, str], results: Results
) -> _Running:
    name = stage.name if stage.num_shards == 1 else f"{stage.name}-{settings.shard}"
    log = settings.out / f"{name}.log"
    command = [sys.executable, "-m", "kimi_lite.tools.gpu_check.stage", stage.name, settings.to_json()]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment), start_new_session=True
        )
    running = _Running(name, process, log, time.monotonic(), limit_s)
    running.thread = threading.Thread(target=_read, args=(running, stage.name, results), daemon=True)
    running.thread.start()
    return running


def _read(running: _Running, stage: str, results: Results) -> None:
    """Its results as they come; what else it prints goes to its log."""
    for text in running.process.stdout:
        line = _parsed(text)
        if line is None:
            with running.log.open("a") as log:
                log.write(text)
            continue
        running.num_failed += not line["ok"]
        results.add({"stage": stage, **line})


def _parsed(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"name", "ok"} <= line.keys() else None


def _finish(running: Sequence[_Running], results: Results) -> None:
    """Waits for each until its limit, then ends it and what it started."""
    for each in running:
        try:
            code = each.process.wait(max(0.0, each.start_s + each.limit_s - time.monotonic()))
            end = "done" if code == 0 else "failed" if code > 0 else f"died of signal {-code}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {each.limit_s:.0f} s"
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()
        each.thread.join(5)
        if end == "done" and each.num_failed:
            end = f"{each.num_failed} wrong"
        words = "" if end == "done" else " | ".join(each.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        results.add(_ended(each.name, end, time.monotonic() - each.start_s, words))


def _ended(stage: str, end: str, seconds: float, words: str) -> dict:
    return {"stage": stage, "name": "stage", "value": end, "unit": "", "ok": end == "done", "s": round(seconds, 1),
            "log": words}  # fmt: skip
