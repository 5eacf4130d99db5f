"""Files that appear only when they are complete, whatever ends the program meanwhile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path, mode: str = "w", permissions: int = 0o666) -> Iterator[IO]:
    """A new file for `path`, "w" (UTF-8) or "wb": written beside it, synced and renamed at the end of the block.

    What was at `path` stays until then. An error in the block leaves it as it was and takes the unfinished file away.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, permissions)
    try:
        with open(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
