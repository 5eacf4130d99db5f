"""`python -m tools.bench`: the same as `kimi-lite bench`."""

import sys

from kimi_lite.errors import KimiLiteError
from kimi_lite.terminal import echo
from kimi_lite.tools.bench.command import app

try:
    app()
except KimiLiteError as error:
    echo(f"kimi-lite bench: {error}", to_stderr=True)
    sys.exit(2)
