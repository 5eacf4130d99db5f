"""Optimizers at equal cost: how many steps fit follows from what a step costs, and a comparison goes on where it was
stopped."""

from pathlib import Path

import pytest

from kimi_lite.tools.train import compare as module
from kimi_lite.tools.train.compare import Trial, compare
from kimi_lite.tools.train.train import Run, Settings, read_metrics

TRIED = [("adamw", 0.004), ("muonclip", 0.01)]


@pytest.fixture
def base(source, text) -> Settings:
    return Settings(
        model=str(source),
        texts=(str(text),),
        batch_size=2,
        length=32,
        warmup_steps=1,
        is_bf16=False,
        held_out_batches=1,
    )


def run(folder: Path, base: Settings, cpu_s: float, num_seeds: int = 2) -> tuple[list[Trial], list[Trial]]:
    folder.mkdir(exist_ok=True)
    seen: list[Trial] = []
    return compare(folder, base, TRIED, cpu_s, num_seeds, lambda metrics, settings: None, seen.append), seen


def test_each_costs_what_was_allowed(tmp_path, base):
    allowed_s = 0.5
    best_first, seen = run(tmp_path, base, allowed_s)
    assert [(trial.optimizer, trial.lr) for trial in seen] == TRIED
    assert best_first == sorted(seen, key=lambda trial: sum(trial.losses))
    for trial in seen:
        assert len(trial.losses) == len(trial.cpu_s) == 2 and len(set(trial.losses)) == 2, trial  # seeds differ
        step_s = [each_s / trial.num_steps for each_s in trial.cpu_s]
        assert all(allowed_s / 3 < each_s < allowed_s * 3 + max(step_s) for each_s in trial.cpu_s), trial
        assert f"{trial.num_steps} steps" in str(trial) and " ± " in str(trial)
        for seed in range(2):
            assert len(list(read_metrics(tmp_path / f"{trial.optimizer}-{trial.lr:g}-{seed}"))) == trial.num_steps


def test_goes_on_where_it_was_stopped(tmp_path, base, monkeypatch):
    _, whole = run(tmp_path, base, 0.05)
    monkeypatch.setattr(module, "_steps_within", lambda path, settings, cpu_s: int(path.read_text()))
    monkeypatch.setattr(Run, "_take_step", lambda self: pytest.fail("a run that is done is not run again"))
    _, again = run(tmp_path, base, 0.05)
    assert [trial.losses for trial in again] == [trial.losses for trial in whole]


def test_what_is_left_of_a_killed_probe_is_thrown_away(tmp_path, base):
    (tmp_path / "adamw-0.004-steps.probe").mkdir()
    (tmp_path / "adamw-0.004-steps.probe/settings.json").write_text("{")
    run(tmp_path, base, 0.02, num_seeds=1)
    assert not list(tmp_path.glob("*.probe"))
