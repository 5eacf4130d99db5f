"""The embedded demo model: SmolLM2-135M-Instruct in the K2.5 architecture, built once on the user's machine. See
CARD.md."""
