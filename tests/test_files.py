"""Files that are whole or not there."""

import os
import stat
from pathlib import Path

import pytest

from kimi_lite.files import whole_file


def test_it_appears_at_the_end_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as file:
        file.write("größer")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "größer"
    with whole_file(path, "wb", permissions=0o600) as file:
        file.write(b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.write("half", 1)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "missing" / "b"):
        pass
