"""Shards, the journal, and what is left after kill -9 at random points: the same bytes as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.store import GGUFStore
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.write import job as quantize_job
from kimi_lite.quantize.write.job import Job, run_job
from kimi_lite.quantize.write.sharding import plan_shards
from kimi_lite.quantize.write.writer import Tensor, write_gguf
from tests.quantize.write.test_writer import METADATA

REPOSITORY = Path(__file__).parents[3]
TYPES = ("TQ1_0", "Q8_0", "F16", "TQ2_0", "BF16")
KILL_AND_RESUME = """
import os, random, signal, sys, time
from pathlib import Path
from kimi_lite.quantize.write.job import run_job
from tests.quantize.write.test_job import make_job, make_tensors
run_job(make_job(Path(sys.argv[1]) / "warm.gguf", make_tensors()))  # compiles
pauses = random.Random(int(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    child = os.fork()
    if not child:
        try:
            run_job(make_job(Path(sys.argv[1]) / "out.gguf", make_tensors()), lambda *state: time.sleep(0.008))
        finally:  # not back into this loop, whatever happened
            os._exit(0)
    time.sleep(pauses.uniform(0.005, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    journal = Path(sys.argv[1]) / "out.quantize.jsonl.partial"
    print(len(journal.read_bytes().splitlines()) if journal.exists() else -1, flush=True)
"""


def make_tensors(count: int = 30) -> list[Tensor]:
    def tensor(index: int) -> Tensor:
        rows = np.random.default_rng(index).standard_normal((48, 512), np.float32)
        return Tensor(
            f"t{index}.weight", (4, 12, 512), BY_NAME[TYPES[index % 5]], lambda: lambda start, stop: rows[start:stop]
        )

    return [tensor(index) for index in range(count)]


def make_job(path: Path, tensors: list[Tensor], max_bytes: int = 150_000, **options) -> Job:
    return Job(path, plan_shards(path, tensors, max_bytes), METADATA, "origin", **{"sync_bytes": 0} | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fail_at(name: str):
    def report(tensor: str, done: int, total: int) -> None:
        if tensor == name:
            raise KeyboardInterrupt

    return report


def test_one_file_is_what_write_gguf_writes(tmp_path):
    tensors = make_tensors(5)
    run_job(make_job(tmp_path / "a.gguf", tensors, max_bytes=10**9))
    write_gguf(tmp_path / "b.gguf", METADATA, tensors)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_shards_are_one_model(tmp_path):
    tensors = make_tensors()
    entries = run_job(make_job(tmp_path / "out.gguf", tensors))
    paths = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in paths] == [f"out-{i:05d}-of-{len(paths):05d}.gguf" for i in range(1, len(paths) + 1)]
    assert 3 <= len(paths) <= 10
    assert sorted(tmp_path.iterdir()) == sorted([*paths, tmp_path / "out.quantize.jsonl"])
    assert all(path.stat().st_size < 150_000 + 4096 for path in paths)
    store = GGUFStore.open(paths[0])
    assert [*store.tensors] == [tensor.name for tensor in tensors] == [entry.name for entry in entries]
    types = [GGUFReader(paths[1]).fields[f"split.{key}"].types[0].name for key in ("no", "count", "tensors.count")]
    assert types == ["UINT16", "UINT16", "INT32"]
    assert "some.words" not in GGUFReader(paths[1]).fields
    assert 0.3 < entries[0].error < 0.44
    assert entries[2].error < 3e-4


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    shards = plan_shards(tmp_path / "out.gguf", make_tensors(4), 1)
    assert [len(shard.tensors) for shard in shards] == [1, 1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_ten_times_and_resumed_the_bytes_are_the_same(tmp_path, seed):
    work, calm = tmp_path / "work", tmp_path / "calm"
    work.mkdir()
    command = [sys.executable, "-c", KILL_AND_RESUME, str(work), str(seed), "10"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    finished = [int(line) for line in done.stdout.split()]
    assert len(finished) == 10
    assert any(1 < lines < 31 for lines in finished), finished  # some kills fell into the work
    for path in work.glob("warm*"):
        path.unlink()
    if any(work.glob("*.partial")) or not any(work.iterdir()):
        run_job(make_job(work / "out.gguf", make_tensors()))
    run_job(make_job(calm / "out.gguf", make_tensors()))
    assert contents(work) == contents(calm)


def test_a_stop_at_every_tensor_and_a_torn_journal(tmp_path):
    """Ctrl-C in each tensor in turn; the journal's last line is cut each time, and bytes lie behind the last safe
    tensor."""
    rng, tensors = random.Random(3), make_tensors(12)
    job = make_job(tmp_path / "work" / "out.gguf", tensors)
    for tensor in tensors:
        with pytest.raises(KeyboardInterrupt):
            run_job(job, fail_at(tensor.name))
        if job.journal_path.exists():
            with job.journal_path.open("ab") as journal:
                journal.write(b'{"name": "t9.weight", "sha'[: rng.randrange(26)])
        for partial in tmp_path.glob("work/*.gguf.partial"):
            with partial.open("ab") as file:
                file.write(b"rubbish")
    run_job(job)
    run_job(make_job(tmp_path / "calm" / "out.gguf", tensors))
    assert contents(tmp_path / "work") == contents(tmp_path / "calm")


def test_finished_tensors_are_not_encoded_again(tmp_path):
    asked: list[str] = []

    def counted(tensor: Tensor) -> Tensor:
        return Tensor(tensor.name, tensor.shape, tensor.layout, lambda: asked.append(tensor.name) or tensor.open_rows())

    job = make_job(tmp_path / "out.gguf", [counted(tensor) for tensor in make_tensors(12)])
    with pytest.raises(KeyboardInterrupt):
        run_job(job, fail_at("t7.weight"))
    asked.clear()
    run_job(job)
    assert asked == [f"t{i}.weight" for i in range(7, 12)]


def test_killed_while_renaming(tmp_path, monkeypatch):
    job, replace, renamed = make_job(tmp_path / "out.gguf", make_tensors(12)), Path.replace, []

    def replace_twice(self, target):
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_twice)
    with pytest.raises(KeyboardInterrupt):
        run_job(job)
    monkeypatch.setattr(Path, "replace", replace)
    assert len([*tmp_path.glob("*.gguf")]) == 2
    run_job(job)
    assert len(GGUFStore.open(job.shards[0].path).tensors) == 12
    assert not [*tmp_path.glob("*.partial")]


def test_a_finished_shard_that_was_deleted_is_missed(tmp_path):
    job = make_job(tmp_path / "out.gguf", make_tensors(12))
    with pytest.raises(KeyboardInterrupt):
        run_job(job, fail_at("t11.weight"))
    job.shards[0].partial.unlink()
    with pytest.raises(KimiLiteError, match=r"should hold .* finished bytes, and does not"):
        run_job(job)
    run_job(job)
    assert len(GGUFStore.open(job.shards[0].path).tensors) == 12


def test_unfinished_work_of_other_settings_is_kept_unless_told(tmp_path):
    job = make_job(tmp_path / "out.gguf", make_tensors(12))
    with pytest.raises(KeyboardInterrupt):
        run_job(job, fail_at("t7.weight"))
    other = make_job(tmp_path / "out.gguf", make_tensors(11))
    before = contents(tmp_path)
    with pytest.raises(KimiLiteError, match=r"with other settings .* after [\d.]+ MiB"):
        run_job(other)
    assert contents(tmp_path) == before
    three = make_job(tmp_path / "out.gguf", make_tensors(11), max_bytes=60_000, is_overwriting=True)
    assert len(three.shards) != len(other.shards)
    run_job(three)
    assert len(GGUFStore.open(three.shards[0].path).tensors) == 11
    assert not [*tmp_path.glob("*.partial")]


def test_existing_shards_are_kept_unless_told(tmp_path):
    job = make_job(tmp_path / "out.gguf", make_tensors(12))
    run_job(job)
    before = contents(tmp_path)
    with pytest.raises(KimiLiteError, match=r"out-00001-of-0000\d\.gguf exists"):
        run_job(job)
    assert contents(tmp_path) == before
    run_job(make_job(tmp_path / "out.gguf", make_tensors(12), is_overwriting=True))
    assert contents(tmp_path) == before


def test_two_processes_do_not_write_one_output(tmp_path):
    job = make_job(tmp_path / "out.gguf", make_tensors(6))
    seen: list[str] = []

    def write_again(tensor: str, done: int, total: int) -> None:
        if not seen:
            seen.append(tensor)
            with pytest.raises(KimiLiteError, match="Another process is writing"):
                run_job(job)

    run_job(job, write_again)
    assert seen


def test_a_full_disk_is_found_first_or_can_be_continued(tmp_path, monkeypatch):
    job = make_job(tmp_path / "out.gguf", make_tensors(12))
    usage = quantize_job.check_space.__globals__["shutil"]._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(KimiLiteError, match=r"0\.0 MiB free"):
        run_job(job)
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()

    def full(tensor: str, done: int, total: int) -> None:
        if tensor == "t5.weight":
            raise OSError(28, "No space left on device")

    with pytest.raises(KimiLiteError, match="No space left") as caught:
        run_job(job, full)
    assert "goes on after" in caught.value.hint
    run_job(job)
    assert len(GGUFStore.open(job.shards[0].path).tensors) == 12


def test_a_weight_that_does_not_fit_leaves_nothing(tmp_path):
    tensors = make_tensors(3)
    bad = Tensor(
        "bad", (4, 512), BY_NAME["F16"], lambda: lambda start, stop: np.full((stop - start, 512), 1e6, np.float32)
    )
    with pytest.raises(KimiLiteError, match="bad: A weight of 1e"):
        run_job(make_job(tmp_path / "out.gguf", [*tensors, bad]))
    assert not [*tmp_path.iterdir()]


def test_the_log_has_type_bytes_checksum_and_error(tmp_path):
    run_job(make_job(tmp_path / "out.gguf", make_tensors(5)))
    lines = [json.loads(line) for line in (tmp_path / "out.quantize.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines[1:]] == list(TYPES)
    assert all(len(line["sha256"]) == 64 for line in lines[1:])
