"""How this package's own child processes are started: those that decode what strangers wrote."""

import sys
from pathlib import Path


def isolated_python(module: str, *numbers: int) -> list[str]:
    """The command that calls `serve(*numbers)` of one of our modules in a Python of its own: without site-packages'
    start-up code, with the folders of this process on its path, and no more."""
    package = str(Path(__file__).parents[1])  # wherever it was found
    folders = [package, *filter(None, sys.path)]  # "" would be the folder we are in, which may hold strangers' files
    values = ", ".join(map(str, numbers))
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import serve; serve({values})"
    return [sys.executable, "-I", "-S", "-c", code, *folders]
