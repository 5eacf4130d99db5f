"""Runs that are killed by SIGKILL again and again, in a program of its own: torch is imported once, each attempt is a
fork that trains until it dies.

    python -m tests.tools.train.killed MODEL,TEXT,FOLDER,end 'MODEL,TEXT,OTHER,step 4,save 2 0.5,end'
"""

import os
import signal
import sys
from pathlib import Path

import torch

from kimi_lite.tools.train.train import Run, Settings


def settings(model: Path, text: Path) -> Settings:
    return Settings(
        model=str(model), texts=(str(text),), num_steps=11, batch_size=2, accumulate=2, length=24, warmup_steps=2,
        tau=0.02, checkpoint_steps=3, held_out_steps=4, held_out_batches=1,
    )  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(folder: Path, wanted: Settings, how: str) -> None:
    """Trains until what `how` says: "step N" has been written, "line N" half of a line after it, "save N SHARE" a
    share of a checkpoint's bytes, or the end."""
    what, *numbers = how.split()
    run = Run.open(folder, wanted)
    if what == "save":
        save, left = torch.save, int(numbers[0])

        def save_a_part(state: dict, file) -> None:
            nonlocal left
            left -= 1
            save(state, file)
            if left == 0:
                file.flush()
                os.ftruncate(file.fileno(), int(file.tell() * float(numbers[1])))
                die()

        torch.save = save_a_part

    def report(metrics, _) -> None:
        if what in ("step", "line") and metrics.step == int(numbers[0]):
            if what == "line":
                (folder / "metrics.jsonl").open("a").write('{"step": 99, "lo')
            die()

    run.train(report)


def main(*arguments: str) -> None:
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    torch.optim.AdamW([weight]).step()  # a first step imports for seconds
    for run in arguments:
        model, text, folder, *ways = run.split(",")
        for how in ways:
            child = os.fork()
            if child == 0:
                attempt(Path(folder), settings(Path(model), Path(text)), how)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) == (how != "end"), (how, status)


if __name__ == "__main__":
    main(*sys.argv[1:])
