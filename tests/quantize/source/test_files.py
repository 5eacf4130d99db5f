"""A conversion reads what it began with, and never writes over what it reads."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.errors import KimiLiteError
from kimi_lite.quantize.app import Settings, run
from kimi_lite.quantize.convert import convert
from tests.checkpoints import make_checkpoint
from tests.tiny import write_tiny_gguf


def settings(src: Path, dst: Path, **changes) -> Settings:
    return Settings(src, dst, None, "q8_0", (), None, "45G", True, **changes)


def same_file(place: Path) -> tuple[Path, Path]:
    source = write_tiny_gguf(place / "a.gguf", np.random.default_rng(0))
    return source, source


def relative(place: Path) -> tuple[Path, Path]:
    source, _ = same_file(place)
    return source, place / "sub" / ".." / "a.gguf"


def link(place: Path) -> tuple[Path, Path]:
    source, _ = same_file(place)
    (place / "b.gguf").symlink_to(source)
    return source, place / "b.gguf"


def source_by_link(place: Path) -> tuple[Path, Path]:
    source, _ = same_file(place)
    (place / "b.gguf").symlink_to(source)
    return place / "b.gguf", source


def hard_link(place: Path) -> tuple[Path, Path]:
    source, _ = same_file(place)
    os.link(source, place / "b.gguf")
    return source, place / "b.gguf"


def later_shard(place: Path) -> tuple[Path, Path]:
    first = write_tiny_gguf(place / "a.gguf", np.random.default_rng(0), max_tensors_per_shard=20)
    return first, Path(re.sub("00001-of", "00002-of", str(first)))


def folder(place: Path) -> tuple[Path, Path]:
    source, _ = same_file(place)
    return place, source


def partial_is_a_link(place: Path) -> tuple[Path, Path]:
    source, _ = same_file(place)
    (place / "b.gguf.partial").symlink_to(source)
    return source, place / "b.gguf"


def weights_of_a_checkpoint(place: Path) -> tuple[Path, Path]:
    make_checkpoint(place / "hf", "kimi")
    return place / "hf", next((place / "hf").glob("*.safetensors"))


def config_of_a_checkpoint(place: Path) -> tuple[Path, Path]:
    make_checkpoint(place / "hf", "kimi")
    return place / "hf", place / "hf" / "config.json"


WAYS = (same_file, relative, link, source_by_link, hard_link, later_shard, folder, partial_is_a_link,
        weights_of_a_checkpoint, config_of_a_checkpoint)  # fmt: skip


@pytest.mark.parametrize("is_dry", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_source_is_never_the_target(tmp_path, way, is_dry):
    (tmp_path / "sub").mkdir()
    src, dst = way(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KimiLiteError, match="would be overwritten"):
        run(settings(src, dst), lambda name, done, total: None, is_dry, False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_importance_matrix_is_a_source_too(tmp_path):
    source, _ = same_file(tmp_path)
    (tmp_path / "i.dat").write_bytes(
        b"\x01\0\0\0" + b"\x01\0\0\0" + b"x" + b"\x01\0\0\0" + b"\x01\0\0\0" + np.float32(1).tobytes()
    )
    asked = Settings(source, tmp_path / "i.dat", None, "tq2_0", (), tmp_path / "i.dat", "45G", True)
    with pytest.raises(KimiLiteError, match=r"i\.dat is what is read here"):
        run(asked, lambda name, done, total: None, False, False)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    stat = path.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def delete(path: Path) -> None:
    path.unlink()


CHANGES = (append, truncate, overwrite, replace, delete)


def change_midway(path: Path, change):
    """A progress report that changes the file when half is done."""
    state = {"is_done": False}

    def report(name: str, done: int, total: int) -> None:
        if not state["is_done"] and done > total // 2:
            state["is_done"] = True
            change(path)

    return report


@pytest.mark.parametrize("kind", ["gguf", "checkpoint"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_meanwhile_is_named(tmp_path, change, kind):
    if kind == "gguf":
        source = changing = write_tiny_gguf(tmp_path / "a.gguf", np.random.default_rng(0))
    else:
        make_checkpoint(tmp_path / "hf", "kimi")
        source, changing = tmp_path / "hf", max((tmp_path / "hf").glob("*.safetensors"), key=os.path.getsize)
    with pytest.raises(KimiLiteError) as caught:
        convert(source, tmp_path / "out.gguf", "q8_0", change_midway(changing, change))
    assert str(changing) in caught.value.message, caught.value.message
    assert "out.gguf" not in caught.value.message
    assert not list(tmp_path.glob("out*"))
