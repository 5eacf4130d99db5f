"""`python -m tools.trace`: a timeline of GPU and CPU while tokens are generated."""

import typer

from kimi_lite.tools.trace.gpu import main

typer.run(main)
