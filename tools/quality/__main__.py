"""`python -m tools.quality`: perplexity, KL divergence and tasks of a model."""

from kimi_lite.tools.quality.quality import app

app()
