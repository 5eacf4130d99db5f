"""Optimizers at equal cost: each trains the same model on the same text for the same CPU time.

python -m tools.train compare cmp small --text corpus/shakespeare.txt --minutes 5 --try muonclip:0.01 --try adamw:0.004

CPU time is the clock, not steps, since a step of Muon costs more; and not seconds, since other programs take those. A
run's schedule wants the number of its steps beforehand: a few steps of a run that is thrown away say how many fit.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

from kimi_lite.tools.train.train import Report, Run, Settings, read_metrics

_PROBE_STEPS = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting, trained from several seeds. `losses`: nats a token of held-out text at the end, one a seed."""

    optimizer: str
    lr: float
    num_steps: int
    cpu_s: tuple[float, ...]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        spread = f" ± {stdev(self.losses):.3f}" if len(self.losses) > 1 else ""
        cost = f"{self.num_steps:6} steps {mean(self.cpu_s):6.0f} CPU s"
        return f"{self.optimizer + f' {self.lr:g}':16} {cost}   held out {mean(self.losses):.3f}{spread}"


def compare(
    folder: Path,
    base: Settings,
    tried: Sequence[tuple[str, float]],
    cpu_s: float,
    num_seeds: int,
    report: Report,
    on_trial: Callable[[Trial], None],
) -> list[Trial]:
    """`tried`: optimizers and their learning rates; `cpu_s`: what each run may cost. Best first.

    Runs lie in `folder` and go on where they were stopped. Raises KimiLiteError.
    """
    trials = []
    for optimizer, lr in tried:
        settings = replace(base, optimizer=optimizer, lr=lr)
        num_steps = _steps_within(folder / f"{optimizer}-{lr:g}-steps.txt", settings, cpu_s)
        costs, losses = [], []
        for seed in range(num_seeds):
            one = replace(
                settings, num_steps=num_steps, checkpoint_steps=num_steps, held_out_steps=num_steps, seed=seed
            )
            run_folder = folder / f"{optimizer}-{lr:g}-{seed}"
            Run.open(run_folder, one).train(report)
            steps = list(read_metrics(run_folder))
            costs.append(sum(metrics.cpu_seconds for metrics in steps))
            losses.append(steps[-1].held_out)
        trials.append(Trial(optimizer, lr, num_steps, tuple(costs), tuple(losses)))
        on_trial(trials[-1])
    return sorted(trials, key=lambda trial: mean(trial.losses))


def _steps_within(path: Path, settings: Settings, cpu_s: float) -> int:
    """How many steps of this setting `cpu_s` buys, as measured once: it must not change when the comparison goes on."""
    if path.is_file():
        return int(path.read_text(encoding="utf-8"))
    probe = path.with_suffix(".probe")
    shutil.rmtree(probe, ignore_errors=True)
    Run.open(probe, replace(settings, num_steps=10**6, checkpoint_steps=10**6, held_out_steps=10**6)).train(
        until=_PROBE_STEPS
    )
    step_s = median(metrics.cpu_seconds for metrics in list(read_metrics(probe))[1:])  # the first prepares kernels
    shutil.rmtree(probe)
    num_steps = max(1, round(cpu_s / step_s))
    path.write_text(str(num_steps), encoding="utf-8")
    return num_steps
