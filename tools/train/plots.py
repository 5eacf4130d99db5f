"""Pictures of runs: loss, the largest attention logit, how evenly experts are loaded, and each head's logits.

Drawn in the style of `tools.plot`, from `metrics.jsonl`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.plot import INK, PALETTE, save_figure
from kimi_lite.tools.train.train import Metrics, read_metrics

_MAX_POINTS = 200  # of a line: means over equal numbers of steps, of logits the largest


def draw_runs(path: Path, folders: Sequence[Path]) -> None:
    """One SVG or PNG with all runs. Raises KimiLiteError where a run has no steps, or matplotlib is missing."""
    runs = {folder.name: list(read_metrics(folder)) for folder in folders}
    for name, steps in runs.items():
        if not steps:
            raise KimiLiteError(f"The run {name} has no steps yet.", "Name folders with a metrics.jsonl.")

    def draw(figure) -> None:
        figure.set_size_inches(10, 3.2)
        losses, logits, loads = figure.subplots(1, 3)
        for (name, steps), colour in zip(runs.items(), PALETTE, strict=False):
            size = -(-len(steps) // _MAX_POINTS)
            bins = [steps[start : start + size] for start in range(0, len(steps), size)]
            numbers = [each[-1].step for each in bins]
            means = [float(np.mean([metrics.loss for metrics in each])) for each in bins]
            losses.plot(numbers, means, color=colour, label=name)
            measured = [metrics for metrics in steps if metrics.held_out is not None]
            held_out = [metrics.held_out for metrics in measured]
            losses.plot([metrics.step for metrics in measured], held_out, "o", color=colour, markersize=3)
            logits.plot(numbers, [max(metrics.max_logit for metrics in each) for each in bins], color=colour)
            loads.plot(
                numbers, [float(np.mean([metrics.imbalance for metrics in each])) for each in bins], color=colour
            )
        losses.set(title="loss, nats; dots: held out", xlabel="step")
        logits.set(title="largest attention logit", xlabel="step", yscale="symlog")
        loads.set(title="most loaded expert, x the mean", xlabel="step")
        losses.legend(frameon=False, labelcolor=INK)

    save_figure(path, draw)


def describe(steps: Sequence[Metrics]) -> str:
    """A line of a run: where it ended."""
    last = steps[-1]
    held_out = next((metrics.held_out for metrics in reversed(steps) if metrics.held_out is not None), float("nan"))
    largest = max(metrics.max_logit for metrics in steps)
    return f"step {last.step}: loss {last.loss:.3f}, held out {held_out:.3f}, largest logit {largest:.1f}"
