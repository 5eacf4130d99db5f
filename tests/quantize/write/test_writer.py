"""The output file appears whole or not at all, and what cannot end well is refused before any work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from kimi_lite.errors import KimiLiteError
from kimi_lite.gguf.metadata import array, text, u32
from kimi_lite.native.layouts import BY_NAME
from kimi_lite.quantize.write import writer
from kimi_lite.quantize.write.writer import Tensor, write_gguf

METADATA = {"general.architecture": text("deepseek2"), "some.count": u32(7), "some.words": array(["a", "b c", ""])}
REPOSITORY = Path(__file__).parents[3]
WRITE_SLOWLY = """
import sys, time
import numpy as np
from pathlib import Path
from tests.quantize.write.test_writer import METADATA, make_tensor
from kimi_lite.quantize.write.writer import write_gguf
def report(name, done, total):
    print(name, done, total, flush=True)
    time.sleep(0.02)
write_gguf(Path(sys.argv[1]), METADATA, [make_tensor(f"t{i}", (64, 8192)) for i in range(40)], report)
"""


def make_tensor(name: str, shape: tuple[int, ...], type_name: str = "F32", value: float | None = None) -> Tensor:
    rows = np.random.default_rng(len(name)).standard_normal((np.prod(shape[:-1], dtype=int), shape[-1]), np.float32)
    if value is not None:
        rows[-1, -1] = value
    return Tensor(name, shape, BY_NAME[type_name], lambda: lambda start, stop: rows[start:stop])


def test_what_is_written_is_read_back(tmp_path):
    tensors = [
        make_tensor("odd", (3, 5, 7)),
        make_tensor("long.weight", (1000, 640), "F16"),
        make_tensor("flat", (33,)),
    ]
    num_bytes = write_gguf(tmp_path / "new" / "out.gguf", METADATA, tensors)
    reader = GGUFReader(tmp_path / "new" / "out.gguf")
    assert num_bytes == (tmp_path / "new" / "out.gguf").stat().st_size
    assert reader.fields["some.words"].contents() == ["a", "b c", ""]
    for tensor, found in zip(tensors, reader.tensors, strict=True):
        rows = tensor.open_rows()(0, 10**9)
        assert (found.name, tuple(reversed(found.shape.tolist()))) == (tensor.name, tensor.shape)
        assert np.array_equal(found.data.reshape(rows.shape), rows.astype(found.data.dtype))
        assert found.data_offset % writer.ALIGNMENT == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.gguf"]


def test_memory_stays_small(tmp_path):
    """A tensor of 64 MB is asked for in pieces of a megabyte, and few of them ahead."""
    asked: list[tuple[int, int]] = []

    def read_rows(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return np.zeros((stop - start, 1024), np.float32)

    write_gguf(tmp_path / "out.gguf", METADATA, [Tensor("big", (16384, 1024), BY_NAME["BF16"], lambda: read_rows)])
    assert sorted(asked) == [(start, start + 256) for start in range(0, 16384, 256)]


def test_an_existing_file_is_kept_unless_told(tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(KimiLiteError, match=r"exists \(4 bytes\)") as caught:
        write_gguf(out, METADATA, [make_tensor("t", (4, 4))])
    assert "--force" in caught.value.hint
    assert out.read_text() == "mine"
    write_gguf(out, METADATA, [make_tensor("t", (4, 4))], is_overwriting=True)
    assert len(GGUFReader(out).tensors) == 1


def test_a_failure_leaves_nothing_and_names_the_tensor(tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    tensors = [make_tensor("good", (64, 64), "F16"), make_tensor("bad", (64, 64), "F16", value=1e6)]
    with pytest.raises(KimiLiteError, match=r"bad: A weight of 1e\+06 does not fit F16"):
        write_gguf(out, METADATA, tensors, is_overwriting=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_text() == "mine"


def test_a_small_disk_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    tensor = Tensor("big", (1024, 50_000), BY_NAME["F32"], lambda: pytest.fail("read before the check"))
    with pytest.raises(KimiLiteError, match=r"needs 0\.3 GiB and .* has 95\.4 MiB free") as caught:
        write_gguf(tmp_path / "out.gguf", METADATA, [tensor])
    assert "Free 0.2 GiB" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KimiLiteError, match="Cannot write in"):
        write_gguf(tmp_path / "file" / "out.gguf", METADATA, [])
    with pytest.raises(KimiLiteError, match="is a folder"):
        write_gguf(tmp_path, METADATA, [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.gguf").symlink_to("pipe")
    for name in ("pipe", "link.gguf"):
        with pytest.raises(KimiLiteError, match="is a device or a pipe"):
            write_gguf(tmp_path / name, METADATA, [], is_overwriting=True)
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_during_the_work_is_explained(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with (
        pytest.raises(KimiLiteError, match=r"Writing .* failed: No space left"),
        writer._partial_file(tmp_path / "out.gguf"),
        open("/dev/full", "wb") as full,
    ):
        full.write(b"x")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_only_a_partial_file_that_the_next_removes(tmp_path):
    out = tmp_path / "out.gguf"
    process = subprocess.Popen([sys.executable, "-c", WRITE_SLOWLY, str(out)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.kill()
    process.wait()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(f"out.gguf.{process.pid}-")
    assert partial.name.endswith(".partial")
    alive = tmp_path / f"out.gguf.{os.getppid()}-000000.partial"
    alive.touch()
    write_gguf(out, METADATA, [make_tensor("t", (4, 4))])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out.gguf", alive.name])


def test_two_writers_of_one_output_do_not_mix(tmp_path):
    out = tmp_path / "out.gguf"
    process = subprocess.Popen([sys.executable, "-c", WRITE_SLOWLY, str(out)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    write_gguf(out, METADATA, [make_tensor("t", (4, 4))])
    assert len(GGUFReader(out).tensors) == 1
    process.stdout.read()
    assert process.wait() == 0
    tensors = GGUFReader(out).tensors
    assert [tensor.name for tensor in tensors] == [f"t{i}" for i in range(40)]
    assert np.array_equal(tensors[39].data, make_tensor("t39", (64, 8192)).open_rows()(0, 64))
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert time.time() - out.stat().st_mtime < 60
