"""`python -m kimi_lite` is `kimi-lite`."""

from kimi_lite.cli import main

main()
