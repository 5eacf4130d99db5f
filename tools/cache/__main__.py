"""`python -m tools.cache`: recorded or synthetic routing replayed through cache policies."""

from kimi_lite.tools.cache.sim import app

app()
