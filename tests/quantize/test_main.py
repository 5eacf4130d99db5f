"""`python -m quantize`, as a user types it."""

import subprocess
import sys
from pathlib import Path

from gguf import GGUFReader

from tests.checkpoints import make_checkpoint

REPOSITORY = Path(__file__).parents[2]


def quantize(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "quantize", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_a_folder_becomes_a_file(tmp_path):
    make_checkpoint(tmp_path / "hf", "kimi_int4")
    done = quantize(tmp_path / "hf", tmp_path / "out.gguf", "--type", "bf16")
    assert done.returncode == 0, done.stderr
    assert "note: vision tower" in done.stderr
    assert "52 tensors (35 BF16, 17 F32)" in done.stderr
    assert done.stdout == ""
    assert len(GGUFReader(tmp_path / "out.gguf").tensors) == 52
    again = quantize(tmp_path / "hf", tmp_path / "out.gguf")
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert quantize(tmp_path / "hf", tmp_path / "out.gguf", "--force").returncode == 0
    assert {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors} == {
        *("F32", "Q4_0", "Q8_0")  # the codes of the experts are kept
    }


def test_an_error_is_two_sentences_and_no_traceback(tmp_path):
    folder = tmp_path / "[red] brackets [0, 1] are text"
    folder.mkdir()
    failed = quantize(folder, tmp_path / "out.gguf")
    assert failed.returncode == 2
    assert f"{folder} has no config.json" in failed.stderr
    assert "Traceback" not in failed.stderr
