"""`python -m tools.bench`: the same as `kimi-lite bench`."""

import sys

from kimi_lite.errors import KimiLiteError
from kimi_lite.tools.bench.command import app

try:
    app()
except KimiLiteError as error:
    print(f"kimi-lite bench: {error}", file=sys.stderr)
    sys.exit(2)
